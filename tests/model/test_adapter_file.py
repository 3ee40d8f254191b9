"""Folders of adapters as peft publishes them: there and back, nothing of the base in them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.model import small
from tests.model.test_lora import EVERYWHERE, logits, spread
from vlm.model.adapter_file import CONFIG, WEIGHTS, load_adapter, save_adapter
from vlm.model.lora import Lora, add_lora
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.adapter import adapters


@pytest.fixture
def model() -> VisionLanguageModel:
    made = small.llava()
    add_lora(made, EVERYWHERE)
    spread(made)
    return made


@pytest.fixture
def folder(model: VisionLanguageModel, tmp_path: Path) -> Path:
    save_adapter(model, tmp_path / "adapter", base="some/model")
    return tmp_path / "adapter"


def change(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(folder: Path, renamed: dict[str, str] | None = None, header: bool = False, **replaced: Any) -> None:
    """The tensors under other names or with other values; the header is left out unless asked for."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        kept = file.metadata()
    tensors = load_file(folder / WEIGHTS) | replaced
    tensors = {(renamed or {}).get(name, name): value for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata=kept if header else None)


def refusal(folder: Path, model: nn.Module | None = None) -> str:
    """What is said; the model must stay as it was."""
    model = small.llava() if model is None else model
    before = list(model.state_dict())
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    assert list(model.state_dict()) == before
    return str(caught.value)


def test_there_and_back(model: VisionLanguageModel, folder: Path) -> None:
    again = small.llava()
    assert set(load_adapter(again, folder)) == set(adapters(model))
    assert torch.equal(logits(again), logits(model))
    for name, own in adapters(again).items():
        old = adapters(model)[name]
        assert torch.equal(own.down.weight, old.down.weight) and own.scale == pytest.approx(old.scale)


def test_the_folder_holds_adapters_alone(model: VisionLanguageModel, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    held = load_file(folder / WEIGHTS)
    stem = "base_model.model.language.stack.blocks.1.mixer.query"
    assert {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"} < set(held)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in held) and len(held) == 20
    values = sum(own.down.weight.numel() + own.up.weight.numel() for own in adapters(model).values())
    assert sum(value.numel() for value in held.values()) == values
    assert (folder / WEIGHTS).stat().st_size < 4 * values + 4096


def test_settings_as_peft_reads_them(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["base_model_name_or_path"], config["bias"]) == ("LORA", "some/model", "none")
    assert len(config["target_modules"]) == 10
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == {2, 3, 5} and len(config["rank_pattern"]) == 6
    assert all(pattern.startswith("^") for pattern in config["rank_pattern"])


def test_an_existing_folder_stays(model: VisionLanguageModel, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="adapter"):
        save_adapter(model, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="has no adapters to save"):
        save_adapter(small.llava(), folder.with_name("other"))
    assert not folder.with_name("other").exists()


def test_rank_stabilised(model: VisionLanguageModel, folder: Path) -> None:
    change(
        folder, use_rslora=True, r=3, lora_alpha=6.0, alpha_pattern={}, rank_pattern={"gate|down": 5, "layers.[02]": 2}
    )
    again = small.llava()
    load_adapter(again, folder)
    scales = {name.rpartition(".")[2]: own.scale for name, own in adapters(again).items()}
    assert scales["query"] == pytest.approx(6 / 3**0.5) and scales["gate"] == pytest.approx(6 / 5**0.5)


def test_another_base_is_refused(folder: Path) -> None:
    other = small.llava()
    with torch.no_grad():
        other.language.stack.blocks[1].ffn.gate.weight[0, 0] += 1
    message = f"{folder}: these adapters were trained beside other weights than this model's (or in another dtype)"
    assert refusal(folder, other) == message
    rewrite(folder)  # without a header nothing is known of the base
    assert len(load_adapter(other, folder)) == 10


def test_layers_without_adapters_may_be_others(folder: Path) -> None:
    other = small.llava()
    nn.init.zeros_(other.vision.patches.weight)
    assert len(load_adapter(other, folder)) == 10


def test_pickles_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")
    assert refusal(folder) == f"{folder}: adapter_model.bin is refused, for a pickle can run code; save it as {WEIGHTS}"
    (folder / "adapter_model.bin").unlink()
    assert refusal(folder) == f"{folder}: no folder of adapters: it has no {WEIGHTS}"
    assert refusal(folder / "x").endswith(f"it has no {CONFIG} and no {WEIGHTS}")


def test_layers_and_shapes_that_do_not_fit_are_listed(folder: Path) -> None:
    stem = "base_model.model.language.stack.blocks"
    rewrite(
        folder,
        {f"{stem}.0.mixer.query.lora_{half}.weight": f"{stem}.0.mixer.q_proj.lora_{half}.weight" for half in "AB"}
        | {f"{stem}.0.mixer.value.lora_{half}.weight": f"{stem}.0.mixer.lora_{half}.weight" for half in "AB"},
        **{f"{stem}.1.ffn.gate.lora_A.weight": torch.zeros(5, 7)},
    )
    lines = refusal(folder).splitlines()
    assert lines[0] == f"{folder} does not fit this model:"
    assert sorted(line.strip() for line in lines[1:]) == [
        "language.stack.blocks.0.mixer is no linear layer here",
        "language.stack.blocks.0.mixer.q_proj is not in the model",
        "language.stack.blocks.1.ffn.gate has A (5, 7) and B (64, 5), which at rank 5 must be (5, 24) and (64, 5)",
    ]


def test_a_rank_that_the_settings_deny(folder: Path) -> None:
    change(folder, rank_pattern={})
    assert "at rank 3 must be (3, 24)" in refusal(folder) or "at rank 2 must be" in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; LORA alone can be read"),
        ({"use_dora": True}, "plain LoRA alone can be read, not use_dora=True"),
        ({"modules_to_save": ["head"]}, r"not modules_to_save=\['head'\]"),
        ({"bias": "all"}, "not bias='all'"),
        ({"init_lora_weights": "pissa"}, "not init_lora_weights='pissa'"),
        ({"some_later_kind": 3}, "not some_later_kind=3"),
    ],
)
def test_other_kinds_of_adapters(folder: Path, settings: dict[str, Any], expected: str) -> None:
    change(folder, **settings)
    with pytest.raises(ValueError, match=expected):
        load_adapter(small.llava(), folder)


def test_files_that_are_no_adapters(folder: Path) -> None:
    rewrite(folder, **{"base_model.model.language.embedding.lora_embedding_A": torch.zeros(2, 2)})
    assert "not the adapters of linear layers alone: base_model.model.language.embedding.lora_emb" in refusal(folder)
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(2, 2)}, folder / WEIGHTS)
    assert "base_model.model.a.lora_B (missing)" in refusal(folder)
    save_file({}, folder / WEIGHTS)
    assert "alone: empty" in refusal(folder)
    (folder / WEIGHTS).write_bytes(b"x" * 20)
    assert "not a whole safetensors file" in refusal(folder)
    (folder / CONFIG).write_text("{")
    assert "not JSON" in refusal(folder)


def test_a_model_with_adapters_takes_no_others_on_the_same_layers(folder: Path) -> None:
    model = small.llava()
    add_lora(model, [Lora(r"language\..*0\.mixer\.query")])
    assert "language.stack.blocks.0.mixer.query has an adapter already: merge it first" in refusal(folder, model)
