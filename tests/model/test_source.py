"""Published weights on disk, in every layout: names and shapes first, numbers when they are asked for."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.model.weights.files import read
from vlm.model.weights.source import PIECE, InMemory, Weights, open_weights


def tensors() -> dict[str, Tensor]:
    """Of many types and shapes."""
    shared = torch.randn(6, 4)
    return {
        "matrix": torch.randn(5, 3),
        "half": torch.randn(4).half(),
        "brain": torch.randn(2, 2, 2).bfloat16(),
        "tiny": torch.randn(3).to(torch.float8_e4m3fn),
        "number": torch.tensor(2.5),
        "count": torch.tensor([1, -(2**40)]),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "first": shared,
        "tied": shared,
        "view": shared[2:5],
        "turned": shared.T,
        "steps": shared[::2, 1],
        "spread": torch.randn(3, 1).expand(3, 4),
    }


def dense() -> dict[str, Tensor]:
    """The same as safetensors can hold them."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors().items()}


def shards(folder: Path, parts: list[Mapping[str, Tensor]], stem: str = "model", ending: str = "safetensors") -> Path:
    """A sharded folder and its index."""
    places = dict[str, str]()
    for i, part in enumerate(parts):
        name = f"{stem}-{i + 1:05d}-of-{len(parts):05d}.{ending}"
        write = save_file if ending == "safetensors" else torch.save
        write(dict(part), folder / name)
        places |= dict.fromkeys(part, name)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def halves() -> list[Mapping[str, Tensor]]:
    items = list(dense().items())
    return [dict(items[:6]), dict(items[6:])]


def same(weights: Weights, expected: Mapping[str, Tensor]) -> bool:
    """In names, shapes, types and numbers."""
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        like, found = weights[name], weights.read(name)
        assert like.is_meta
        assert (like.shape, like.dtype) == (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        assert found.is_contiguous() and found.untyped_storage().nbytes() == found.nbytes
        if not torch.equal(
            found.view(torch.uint8) if found.dim() else found, _bytes(tensor) if found.dim() else tensor
        ):
            return False
    return True


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": lambda folder: save_file(dense(), folder / "model.safetensors"),
    "sharded safetensors": lambda folder: shards(folder, halves()),
    "pytorch_model.bin": lambda folder: torch.save(tensors(), folder / "pytorch_model.bin"),
    "sharded bin": lambda folder: shards(folder, halves(), "pytorch_model", "bin"),
    "other safetensors": lambda folder: save_file(dense(), folder / "open_clip_model.safetensors"),
    "the only pth": lambda folder: torch.save({"model": tensors(), "epoch": 3}, folder / "last.pth"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_in_each_layout(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(1)
    LAYOUTS[layout](tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.manual_seed(1)
    assert same(open_weights(tmp_path), tensors())
    torch.manual_seed(2)
    assert not same(open_weights(tmp_path), tensors())


def test_safetensors_go_before_pickles_and_whole_before_shards(tmp_path: Path) -> None:
    for i, name in enumerate(("pytorch_model.bin", "open_clip_pytorch_model.bin", "optimizer.pt")):
        torch.save({"weight": torch.full((1,), float(i))}, tmp_path / name)
    assert open_weights(tmp_path).read("weight") == 0
    save_file({"weight": torch.full((1,), 7.0)}, tmp_path / "a.safetensors")
    assert open_weights(tmp_path).read("weight") == 0  # the name of the format first
    shards(tmp_path, [{"weight": torch.full((1,), 8.0)}])
    assert open_weights(tmp_path).read("weight") == 8
    save_file({"weight": torch.full((1,), 9.0)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).read("weight") == 9


@pytest.mark.parametrize("ending", ["safetensors", "pth", "pt", "bin", "ckpt"])
def test_a_single_file(tmp_path: Path, ending: str) -> None:
    file, expected = tmp_path / f"w.{ending}", dense()
    (save_file if ending == "safetensors" else torch.save)(expected, file)
    assert same(open_weights(file), expected)
    assert all(
        torch.equal(_bytes(value.view(-1)), _bytes(expected[name].view(-1))) for name, value in read(file).items()
    )


def test_an_index_may_be_named_itself(tmp_path: Path) -> None:
    shards(tmp_path, [{"a": torch.ones(2)}, {"b": torch.zeros(3)}])
    assert set(open_weights(tmp_path / "model.safetensors.index.json")) == {"a", "b"}


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", None])
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_and_prefixes_of_pickles(tmp_path: Path, wrapper: str | None, legacy: bool) -> None:
    inner = {f"module.{name}": value for name, value in tensors().items()} | {"module.p": nn.Parameter(torch.ones(3))}
    del inner["module.tiny"]  # torch cannot read it from the legacy format
    whole = inner if wrapper is None else {wrapper: inner, "optimizer": {"x": torch.ones(9)}, "epoch": 1}
    torch.save(whole, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert same(open_weights(tmp_path), {name.removeprefix("module."): value.detach() for name, value in inner.items()})


def test_where_torch_tells_no_positions_the_file_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tensors()
    torch.save(expected, tmp_path / "w.pth")
    monkeypatch.setattr("vlm.model.weights.source._start", lambda *_: None)
    weights = open_weights(tmp_path)
    assert all(isinstance(stored, InMemory) for stored in weights._stored.values())
    assert same(weights, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(3, 5), (2, PIECE // 4 + 7), (0,), ()])
def test_reading_into_memory_of_another_type(tmp_path: Path, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    value = torch.randn(size)
    save_file({"weight": value, "beside": torch.ones(1)}, tmp_path / "model.safetensors")
    out = torch.full(size, 9.0, dtype=dtype)
    open_weights(tmp_path).read_into("weight", out)
    assert torch.equal(out, value.to(dtype))


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path, halves())
    torch.save(dense(), tmp_path / "w.pth")

    def refuse(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("vlm.model.weights.source.InFile._fill", refuse)
    for path in (tmp_path, tmp_path / "w.pth"):
        weights = open_weights(path)
        assert weights["matrix"].shape == (5, 3)
        with pytest.raises(AssertionError, match="read"):
            weights.read("matrix")
