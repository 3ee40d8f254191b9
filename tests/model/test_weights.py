"""Tables of weights, both ways and strict; files that are damaged or too much."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.parity.noise import noise
from vlm.model.language import llama
from vlm.model.weights.blip2 import INSTRUCTBLIP, lavis_heads_table, lavis_qformer_table, qformer_table, retrieval_table
from vlm.model.weights.conversion import Transposed
from vlm.model.weights.files import differences, load_into, load_strict, read
from vlm.model.weights.llama import llama_table, qwen2_table, qwen3_table
from vlm.model.weights.open_clip import hf_clip_vision_table, open_clip_table
from vlm.model.weights.opt import opt_table
from vlm.model.weights.retnet import retnet_table
from vlm.model.weights.rows import Experts, Row, linear
from vlm.model.weights.table import Table
from vlm.model.weights.vit import blip2_vit_table

TABLE = Table(
    "toy",
    (
        Row("layer.{i}.qkv", ("blocks.{i}.query", "blocks.{i}.key", "blocks.{i}.value")),
        Row("layer.{i}.proj", "blocks.{i}.out", Transposed()),
        *linear("norm", "final"),
    ),
    ignored=(r".*position_ids",),
)


def theirs() -> dict[str, Tensor]:
    return {
        "layer.0.qkv": torch.randn(6, 3),
        "layer.11.qkv": torch.randn(6, 3),
        "layer.0.proj": torch.randn(2, 3),
        "layer.11.proj": torch.randn(2, 3),
        "norm.weight": torch.randn(3),
        "norm.bias": torch.randn(3),
    }


def test_rows_by_hand_and_back() -> None:
    published = theirs()
    ours = TABLE.to_ours(published)
    assert torch.equal(ours["blocks.11.key"], published["layer.11.qkv"][2:4])
    assert torch.equal(ours["blocks.0.out"], published["layer.0.proj"].T)
    assert torch.equal(ours["final.bias"], published["norm.bias"])
    back = TABLE.to_theirs(ours)
    assert set(back) == set(published)
    assert all(torch.equal(back[name], published[name]) for name in published)


def test_a_published_tensor_that_no_row_knows_is_listed() -> None:
    strangers = {"layer.0.gate": torch.zeros(1), "layer.x.qkv": torch.zeros(3), "normXweight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"toy: published tensors .*: layer\.0\.gate, layer\.x\.qkv, normXweight$"):
        TABLE.to_ours({**theirs(), **strangers})


def test_ours_that_no_row_knows_and_halves_of_a_fused_one_are_listed() -> None:
    ours = TABLE.to_ours(theirs())
    del ours["blocks.0.key"]
    ours["head.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"toy: our tensors that are missing beside others: blocks\.0\.key$"):
        TABLE.to_theirs(ours)
    del ours["blocks.0.query"], ours["blocks.0.value"]
    with pytest.raises(ValueError, match=r"toy: tensors of ours that the table does not know: head\.weight$"):
        TABLE.to_theirs(ours)


def test_many_leftovers_are_counted() -> None:
    with pytest.raises(ValueError, match=r"x7, … \(20 in all\)"):
        TABLE.to_ours({f"x{i}": torch.zeros(1) for i in range(20)})


def test_position_ids_are_ignored() -> None:
    assert TABLE.to_ours({"embeddings.position_ids": torch.arange(3)}) == {}


EXPERTS = Table(
    "experts",
    (
        Row("layer.{i}.gate", "blocks.{i}.router"),
        Experts(("layer.{i}.expert.{e}.gate", "layer.{i}.expert.{e}.up"), "blocks.{i}.both"),
        Experts(("layer.{i}.expert.{e}.down",), "blocks.{i}.down"),
    ),
)


def published_experts(count: int = 11) -> dict[str, Tensor]:
    """In an order that is not that of their numbers."""
    sizes = {"up": (2, 3), "down": (3, 2), "gate": (2, 3)}
    numbers = [(i, e) for i in (4, 0) for e in reversed(range(count))]
    found = {f"layer.{i}.expert.{e}.{part}": torch.randn(size) for i, e in numbers for part, size in sizes.items()}
    return found | {f"layer.{i}.gate": torch.randn(count, 3) for i in (4, 0)}


def test_experts_are_stacked_by_number_and_taken_apart() -> None:
    published = published_experts()
    ours = EXPERTS.to_ours(published)
    assert set(ours) == {f"blocks.{i}.{part}" for i in (0, 4) for part in ("both", "down", "router")}
    assert ours["blocks.4.both"].shape == (11, 4, 3)
    assert torch.equal(ours["blocks.4.both"][10, :2], published["layer.4.expert.10.gate"])
    assert torch.equal(ours["blocks.4.both"][2, 2:], published["layer.4.expert.2.up"])
    assert torch.equal(ours["blocks.0.down"][10], published["layer.0.expert.10.down"])
    back = EXPERTS.to_theirs(ours)
    assert set(back) == set(published)
    assert all(torch.equal(back[name], published[name]) for name in published)


def test_experts_that_lack_or_that_no_row_knows_are_listed() -> None:
    published = published_experts()
    with pytest.raises(ValueError, match=r"experts: published tensors .*: layer\.0\.expert\.3\.bias$"):
        EXPERTS.to_ours({**published, "layer.0.expert.3.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"tensors of ours .*: blocks\.0\.bias$"):
        EXPERTS.to_theirs({**EXPERTS.to_ours(published), "blocks.0.bias": torch.zeros(1)})
    del published["layer.4.expert.5.up"], published["layer.4.expert.7.up"]
    with pytest.raises(ValueError, match=r"missing beside others: layer\.4\.expert\.5\.up, .*expert\.7\.up$"):
        EXPERTS.to_ours(published)


@pytest.mark.parametrize(
    "table",
    [
        *(make(tied) for make in (llama_table, qwen2_table, qwen3_table, opt_table) for tied in (True, False)),
        retnet_table(),
        qformer_table(),
        qformer_table(INSTRUCTBLIP),
        lavis_qformer_table(["Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias"]),
        lavis_heads_table(),
        retrieval_table(blip2_vit_table()),
        open_clip_table(),
        hf_clip_vision_table(),
    ],
)
def test_no_table_names_a_tensor_twice(table: Table) -> None:
    def names(side: object) -> tuple[str, ...]:
        return (side,) if isinstance(side, str) else side  # type: ignore[return-value]

    pairs = [(names(row.theirs), names(row.ours)) for row in table.rows]
    for side in zip(*pairs, strict=True):
        every = [name for group in side for name in group]
        assert len(set(every)) == len(every)
    assert all(len({"{i}" in name for name in (*theirs, *ours)}) == 1 for theirs, ours in pairs)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_of_a_whole_model(tied: bool) -> None:
    model, other = (llama(30, 16, 2, 4, 2, tied=tied) for _ in range(2))
    noise(model)
    table = llama_table(tied)
    load_strict(other, table.to_ours(table.to_theirs(model.state_dict())), "round trip")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_tied_head_is_not_read_twice() -> None:
    published = llama_table(False).to_theirs(llama(30, 16, 1, 4, tied=False).state_dict())
    assert "head.weight" not in llama_table(True).to_ours(published)


def test_differences_are_listed_and_nothing_is_loaded() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    given = {"weight": torch.zeros(2, 4), "scale": torch.tensor(1.0)}
    assert differences(model.state_dict(), given) == [
        "missing: bias 2",
        "not in the model: scale scalar",
        "other shape: weight is 2x4, the model's is 2x3",
    ]
    with pytest.raises(ValueError, match=r"file\.pt does not fit this model:\n  missing: bias 2\n"):
        load_strict(model, given, "file.pt")
    assert torch.equal(model.weight, before)
    assert differences(model.state_dict(), model.state_dict()) == []


def test_long_lists_of_differences_are_cut() -> None:
    with pytest.raises(ValueError, match="… and 10 more"):
        load_strict(
            nn.Linear(1, 1), {**nn.Linear(1, 1).state_dict(), **{f"x{i}": torch.zeros(1) for i in range(22)}}, "f"
        )


def test_a_model_on_the_meta_device_takes_the_tensors_over() -> None:
    weights = nn.Linear(3, 2).state_dict()
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    load_strict(model, weights, "memory")
    assert not model.weight.is_meta and torch.equal(model.weight, weights["weight"])


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrap: object) -> None:
    assert callable(wrap)
    weights = nn.Linear(3, 2).state_dict()
    torch.save(wrap({f"module.{name}": value for name, value in weights.items()}), tmp_path / "w.pt")
    found = read(tmp_path / "w.pt")
    assert set(found) == {"weight", "bias"}
    assert torch.equal(found["weight"], weights["weight"])


def test_leftovers_are_allowed_by_module_not_by_first_letters(tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 2)})
    save_file({**model.state_dict(), "head.weight": torch.zeros(1)}, tmp_path / "head.safetensors")
    load_into(model, tmp_path / "head.safetensors", optional=("head",))
    save_file({**model.state_dict(), "header.weight": torch.zeros(1)}, tmp_path / "header.safetensors")
    with pytest.raises(ValueError, match=r"not in the model: header\.weight"):
        load_into(model, tmp_path / "header.safetensors", optional=("head",))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    save_file(nn.Linear(30, 20).state_dict(), tmp_path / "w.safetensors")
    torch.save(nn.Linear(30, 20).state_dict(), tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        whole = (tmp_path / name).read_bytes()
        for part in (whole[: len(whole) // 2], b"", b"rubbish" * 9):
            (tmp_path / name).write_bytes(part)
            with pytest.raises(ValueError, match=name):
                read(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_wherever_a_file_is_damaged_it_is_read_or_refused_in_words(tmp_path: Path, kind: str) -> None:
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    weights = nn.Linear(3, 2).state_dict()
    if kind == "safetensors":
        save_file(weights, file)
    else:
        torch.save({"state_dict": weights, "epoch": 1}, file, _use_new_zipfile_serialization=kind == "zip")
    whole, refused = file.read_bytes(), 0
    for position in range(0, len(whole), max(1, len(whole) // 150)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            read(file)
        except ValueError as error:
            refused += str(file) in str(error)
    assert refused > 10
    with pytest.raises(FileNotFoundError):
        read(file.with_name("missing" + file.suffix))


@pytest.mark.parametrize("content", [[1, 2], {"weight": 3}, torch.zeros(2), {"state_dict": {"weight": "text"}}])
def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: holds no plain table of tensors"):
        read(tmp_path / "w.pt")
