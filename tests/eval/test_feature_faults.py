"""Features of an evaluation where something goes wrong: damaged files, full disks, vectors that are not finite."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tests.eval.extracting import SAMPLES, Encoded, contents, loader
from tests.tiny import pack
from vlm.eval import feature_files
from vlm.eval.features import extract
from vlm.restore import Ready

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "tokens cut"])
def test_damaged_files_are_made_anew(
    ready: Ready, shard: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = tmp_path / "features"
    extract(ready.model, loader(ready, shard), True, folder=folder)
    before = contents(folder)
    name = "tokens-00001.safetensors" if damage == "tokens cut" else "part-00001.safetensors"
    data = bytearray(before[name])
    if damage == "flipped":
        data[-1] ^= 1
    (folder / name).write_bytes(b"" if damage == "emptied" else data if damage == "flipped" else data[:-40])
    extract(ready.model, loader(ready, shard), True, folder=folder)
    assert contents(folder) == before
    assert f"{folder / 'part-00001.safetensors'}: damaged (" in caplog.text


def test_a_lost_manifest(ready: Ready, shard: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "features"
    extract(ready.model, loader(ready, shard), False, folder=folder)
    before = contents(folder)
    (folder / "manifest.json").write_text("{")
    extract(ready.model, loader(ready, shard), False, folder=folder)
    assert contents(folder) == before


def test_a_folder_of_something_else(ready: Ready, shard: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("work of years")
    message = f"{tmp_path / 'mine'}: holds thesis.tex, which is no part of features; choose another folder"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        extract(ready.model, loader(ready, shard), False, folder=tmp_path / "mine")
    assert set(contents(tmp_path / "mine")) == {"thesis.tex"}


def test_a_file_for_a_folder(ready: Ready, shard: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(shard))}: is a file; features are kept in a folder of "):
        extract(ready.model, loader(ready, shard), False, folder=shard)


def test_too_little_room(ready: Ready, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_files.shutil, "disk_usage", lambda _: Room(5000))
    message = f"{tmp_path / 'features'}: features of {SAMPLES} samples take 0.0 GiB, and only 0.0 are free; name a "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}folder on another disk$"):
        extract(ready.model, loader(ready, shard), True, folder=tmp_path / "features")
    assert set(contents(tmp_path / "features")) == {"manifest.json"}


def test_a_full_disk_loses_nothing_that_is_there(
    ready: Ready, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, save = tmp_path / "features", feature_files.save_file

    def full(tensors: Any, path: Path, facts: Any) -> None:
        save(tensors, path, facts)
        if path.name == "part-00001.tmp":
            raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_files, "save_file", full)
        message = f"could not write {folder / 'part-00001.safetensors'}: No space left on device; the parts before it "
        with pytest.raises(OSError, match=f"^{re.escape(message)}are whole$"):
            extract(ready.model, loader(ready, shard), False, folder=folder)
    assert set(contents(folder)) == {"manifest.json", "part-00000.safetensors"}
    encoded = Encoded(monkeypatch, ready)
    extract(ready.model, loader(ready, shard), False, folder=folder)
    assert encoded.pictures == SAMPLES - 8


class Room:
    """What is left of a disk."""

    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(
    ("way", "what"), [("embed_image", "picture '0004'"), ("embed_text", "caption 'a black square'")]
)
def test_vectors_that_are_not_finite(
    ready: Ready, shard: Path, monkeypatch: pytest.MonkeyPatch, way: str, what: str
) -> None:
    embed, calls = getattr(ready.model, way), []

    def broken(given: Any) -> torch.Tensor:
        calls.append(1)
        vectors: torch.Tensor = embed(given)
        if len(calls) == 2:
            vectors[0] = torch.nan
        return vectors

    monkeypatch.setattr(ready.model, way, broken)
    kind = way.removeprefix("embed_")
    message = f"the model gives {kind} vectors that are not finite (NaN or infinite), of {what} first: nothing can be "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}ranked by them$"):
        extract(ready.model, loader(ready, shard), False)


def test_no_usable_sample(ready: Ready, tmp_path: Path) -> None:
    shard = pack(tmp_path / "bad.tar", [("a.png", b"no"), ("a.txt", b"a"), ("b.png", b"no"), ("b.txt", b"b")])
    with pytest.raises(ValueError, match=f"^{re.escape(str(shard))}: no sample is usable: {{'not an image': 2}}$"):
        extract(ready.model, loader(ready, shard), False)
