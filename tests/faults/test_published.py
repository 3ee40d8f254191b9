"""Published checkpoints that are incomplete, damaged, of something else, or that would run code: refused in words."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.model.language import llama
from vlm.model.published.family import known, unknown_family
from vlm.model.published.hub import read_json
from vlm.model.weights.fill import fill
from vlm.model.weights.hollow import hollow
from vlm.model.weights.llama import llama_table
from vlm.model.weights.opt import opt_table
from vlm.model.weights.save import save
from vlm.model.weights.source import open_weights

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A whole Llama in three shards."""
    save(llama(30, 16, 2, 4, tied=False), llama_table(False), tmp_path, shard_bytes=14_000)
    assert (tmp_path / SECOND).is_file()
    return tmp_path


def loaded(path: Path) -> nn.Module:
    with hollow():
        model = llama(30, 16, 2, 4, tied=False)
    fill(model, llama_table(False), open_weights(path))
    return model


def refused(path: Path, action: Callable[[Path], object] = loaded) -> str:
    """The one message."""
    with pytest.raises(ValueError) as told:
        action(path)
    return str(told.value)


def edit(published: Path, **changes: str) -> None:
    """Says of tensors that they lie elsewhere."""
    index = json.loads((published / INDEX).read_text())
    index["weight_map"] |= {name.replace("__", "."): file for name, file in changes.items()}
    (published / INDEX).write_text(json.dumps(index))


def test_the_fixture_itself_loads(published: Path) -> None:
    assert not any(tensor.is_meta for tensor in loaded(published).parameters())


def test_a_shard_that_is_missing_is_named(published: Path) -> None:
    (published / SECOND).unlink()
    assert refused(published) == (
        f"{published / INDEX}: names shards that are not there: {SECOND}; fetch them into the same folder"
    )


def test_an_index_that_names_what_is_not_there(published: Path) -> None:
    edit(published, lm_head__weight="model-00009-of-00009.safetensors")
    assert "names shards that are not there: model-00009-of-00009.safetensors" in refused(published)
    edit(published, lm_head__weight=SECOND, model__norm__weight=SECOND, extra=SECOND)
    assert "names tensors that its shards do not hold: " in (told := refused(published))
    assert f"extra in {SECOND}" in told


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_that_leads_out_of_its_folder(published: Path, name: str) -> None:
    edit(published, lm_head__weight=name)
    assert refused(published) == f"{published / INDEX}: names shards outside its folder: {name}"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\x80"])
def test_an_index_that_is_none(published: Path, text: str) -> None:
    (published / INDEX).write_text(text, encoding="latin-1")
    assert "is no index of shards (JSON with a weight_map" in refused(published)


@pytest.mark.parametrize("keep", [0, 7, 100, 3000, -1])
def test_a_shard_that_is_cut_off_is_named(published: Path, keep: int) -> None:
    whole = (published / SECOND).read_bytes()
    (published / SECOND).write_bytes(whole[:keep])
    assert refused(published).startswith(f"{published / SECOND}: not a whole safetensors file (")


def test_a_file_that_is_cut_off_after_it_was_opened(published: Path) -> None:
    weights = open_weights(published)
    os.truncate(published / SECOND, 3000)
    with pytest.raises(ValueError, match=rf"{SECOND}: ends \d+ bytes too early: it is cut off, fetch it again"):
        for name in weights:
            weights.read(name)


def test_a_tensor_of_another_shape_or_name_or_type(tmp_path: Path) -> None:
    tensors = llama_table(False).to_theirs(llama(30, 16, 2, 4, tied=False).state_dict())
    tensors |= {"model.norm.weight": torch.zeros(8), "model.layers.0.bias": torch.zeros(1)}
    save_file({name: tensor for name, tensor in tensors.items() if "1.mlp.up" not in name}, tmp_path / "w.safetensors")
    assert refused(tmp_path).splitlines() == [
        f"{tmp_path} does not fit this model:",
        "  not in the model: model.layers.0.bias 1",
        "  missing: stack.blocks.1.ffn.up.weight 64x16",
        "  other shape: stack.norm.weight is 8, the model's is 16",
    ]
    save_file({"weight": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "w.safetensors")
    assert "w.safetensors: weight is of type C64, which vlm does not read (F64, F32" in refused(tmp_path)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pt", "model.ckpt"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, name: str, legacy: bool) -> None:
    marker = tmp_path / "marker"
    torch.save(
        {"weight": torch.zeros(2), "x": Evil(marker)}, tmp_path / name, _use_new_zipfile_serialization=not legacy
    )
    told = refused(tmp_path)
    assert told.startswith(f"{tmp_path / name}: refused, for it is damaged or holds more than plain tensors (")
    assert len(told.splitlines()) == 1 and not marker.exists()
    torch.load(tmp_path / name, weights_only=False)  # the file does what it is said to do
    assert marker.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archive_of_torchscript(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "ViT-B-32.pt")
    recwarn.clear()
    told = refused(tmp_path)
    assert told == (
        f"{tmp_path / 'ViT-B-32.pt'}: refused, for it is a TorchScript archive, which holds code: take a copy of these "
        "weights as safetensors, or save the state_dict() of the module in it"
    )
    assert not recwarn.list


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(1)],
        {"weight": 3},
        {"state_dict": {"weight": "text"}},
        {"weight": torch.zeros(2, 2).to_sparse()},
        {"model": {"layers": {"weight": torch.zeros(1)}}},
    ],
)
def test_a_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert refused(tmp_path) == f"{tmp_path / 'w.pth'}: holds no plain table of tensors"


def test_a_pickle_whose_tensors_reach_beyond_their_memory(tmp_path: Path) -> None:
    torch.save({"weight": torch.arange(6.0)}, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[:-200])
    assert "w.pth: refused, for it is damaged" in refused(tmp_path)


def test_no_weights_in_the_folder(tmp_path: Path) -> None:
    assert refused(tmp_path) == (
        f"{tmp_path}: holds no weights that vlm reads (.safetensors, .bin, .pth, .pt, .ckpt); it holds nothing"
    )
    for name in ("config.json", "tf_model.h5"):
        (tmp_path / name).touch()
    assert refused(tmp_path).endswith("; it holds config.json, tf_model.h5")
    for i in (1, 2):
        save_file({f"w{i}": torch.zeros(1)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    assert refused(tmp_path) == (
        f"{tmp_path}: holds several files of weights and no {INDEX}: model-00001-of-00002.safetensors, "
        "model-00002-of-00002.safetensors; name one of them"
    )
    assert refused(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such file or folder"


def test_settings_that_are_missing_or_no_json(tmp_path: Path) -> None:
    def read(folder: Path) -> object:
        return read_json(folder, "config.json")

    (tmp_path / "model.safetensors").touch()
    assert refused(tmp_path, read) == f"{tmp_path / 'config.json'}: is missing; there is model.safetensors"
    for text, told in (("{", "is no JSON (Expecting"), ("\x80", "is no JSON ("), ("[1]", "is no table of settings")):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        assert told in refused(tmp_path, read)


def test_weights_of_an_unknown_family() -> None:
    families = {"llama": llama_table(False), "opt": opt_table(False)}
    names: dict[str, Tensor] = llama_table(False).to_theirs(llama(30, 16, 2, 4, tied=False).state_dict())
    strange = [*names, "model.layers.0.self_attn.sinks", "model.rotary_emb.inv_freq"]
    assert (known(strange, families["llama"]), known(strange, families["opt"])) == (len(names) + 1, 1)
    told = unknown_family(strange, families, "folder")
    assert told == (
        "folder: is of no family that vlm knows (llama, opt); its tensors: lm_head.weight, model.embed_tokens.weight, "
        "model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight, … (23 in all); the nearest is "
        "llama, which knows 22 of them"
    )
    assert unknown_family(["a"], families, "f").endswith("its tensors: a; no family knows any of them")
