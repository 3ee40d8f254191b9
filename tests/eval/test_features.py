"""Features of an evaluation: in a folder as in memory, taken up after a kill to the same bytes, never stale."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tests.eval.noisy import noisy
from tests.tiny import members, pack, picture
from vlm import build_data
from vlm.data.loader import Loader
from vlm.eval import feature_files
from vlm.eval.features import Features, extract, match_pairs
from vlm.eval.origin import data_fingerprint
from vlm.restore import Ready

SAMPLES = 22
BPE = {"kind": "bpe", "vocab": 280}
PARTS = {f"part-0000{n}.safetensors" for n in range(3)}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of four make a part: three parts, the last one short."""
    monkeypatch.setattr("vlm.eval.features.PART", 8)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return noisy(tmp_path_factory.mktemp("noisy"), "qformer", tokenizer=BPE)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return pack(tmp_path / "data.tar", members(SAMPLES))


def loader(ready: Ready, shard: Path, **settings: Any) -> Loader:
    data = ready.data.model_copy(update={"max_bad_fraction": 0.5, **settings})
    source = build_data.shards(data, str(shard))
    transform = build_data.transform(ready.vision, ready.model, source)
    return build_data.evaluation_loader(data, source, transform, ready.tokenizer, ready.batch_size)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Encoded:
    """Counts the pictures that a model encodes, and stops it before the batch of this number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ready: Ready, stop: int = 1000) -> None:
        self.pictures, self._batches, encode = 0, 0, ready.model.encode

        def counted(images: torch.Tensor) -> torch.Tensor:
            if self._batches == stop:
                raise KeyboardInterrupt
            self._batches += 1
            self.pictures += len(images)
            return encode(images)

        monkeypatch.setattr(ready.model, "encode", counted)


def equal(left: Features, right: Features) -> None:
    for name in ("image", "text", "image_ids", "text_ids", "owner", "places"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert (list(left.names), list(left.strings)) == (list(right.names), list(right.strings))
    assert [row.tolist() for row in map(left.words.__getitem__, range(len(left.words)))] == [
        row.tolist() for row in map(right.words.__getitem__, range(len(right.words)))
    ]
    assert left.made_of == right.made_of


# --- what they are ---------------------------------------------------------------------------------------------------


def test_in_a_folder_as_in_memory(ready: Ready, shard: Path, tmp_path: Path) -> None:
    memory = extract(ready.model, loader(ready, shard), keep_tokens=True)
    first = extract(ready.model, loader(ready, shard), True, folder=tmp_path / "features")
    again = extract(ready.model, loader(ready, shard), True, folder=tmp_path / "features")
    for found in (first, again):
        equal(found, memory)
        assert found.tokens is not None and memory.tokens is not None
        assert torch.equal(torch.stack(list(found.tokens)), torch.stack(list(memory.tokens)))
    assert first.image.dtype == torch.float32
    assert list(first.names)[:2] == ["0000", "0001"]
    assert first.strings[1] == "a green square"
    (batch,) = loader(ready, shard).part([1])
    seen = ready.model.see(batch.to("cpu").pixels)
    torch.testing.assert_close(first.image[4:8], ready.model.embed_image(seen))


def test_tokens_of_a_folder_are_mapped(ready: Ready, shard: Path, tmp_path: Path) -> None:
    found = extract(ready.model, loader(ready, shard), True, folder=tmp_path / "features")
    assert found.tokens is not None
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count("tokens-0000") >= 3
    image, text = torch.cartesian_prod(torch.tensor([3, 9, 21]), torch.arange(SAMPLES)).unbind(1)
    memory = extract(ready.model, loader(ready, shard), True)
    assert torch.equal(match_pairs(ready.model, found, image, text), match_pairs(ready.model, memory, image, text))


def test_match_pairs_needs_tokens(ready: Ready, shard: Path) -> None:
    found = extract(ready.model, loader(ready, shard), keep_tokens=False)
    with pytest.raises(ValueError, match="image tokens: extract with keep_tokens"):
        match_pairs(ready.model, found, torch.tensor([0]), torch.tensor([0]))


def test_half_precision_vectors_become_fp32_and_tokens_stay(
    ready: Ready, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encode, connect = ready.model, ready.model.encode, ready.model.connect
    monkeypatch.setattr(model, "encode", lambda images: encode(images).bfloat16())
    monkeypatch.setattr(model, "connect", lambda image: connect(image.float()))
    found = extract(model, loader(ready, shard), True, folder=tmp_path / "features")
    assert found.tokens is not None
    assert (found.tokens.take(torch.tensor([1])).dtype, found.image.dtype) == (torch.bfloat16, torch.float32)


def test_ids_and_owners_of_several_captions(ready: Ready, tmp_path: Path) -> None:
    samples = []
    for name, group, captions in (("a", "x", 2), ("b", "y", 1), ("c", "x", 3)):
        text = "\n".join(f"{name} {n}" for n in range(captions))
        samples += [(f"{name}.png", picture("red")), (f"{name}.txt", text.encode())]
        samples += [(f"{name}.json", f'{{"same": "{group}"}}'.encode())]
    found = extract(ready.model, loader(ready, pack(tmp_path / "s.tar", samples), id="same"), False)
    assert found.image_ids.tolist() == [0, 1, 0]
    assert found.owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert found.text_ids.tolist() == [0, 0, 1, 0, 0, 0]
    some = found.select(torch.tensor([0, 2]))
    assert list(some.names) == ["a", "c"]
    assert list(some.strings) == ["a 0", "a 1", "c 0", "c 1", "c 2"]
    assert (some.owner.tolist(), some.places.tolist()) == ([0, 0, 1, 1, 1], [0, 2])
    assert torch.equal(some.text, found.text[[0, 1, 3, 4, 5]])
    assert [some.words[row].tolist() for row in (1, 4)] == [found.words[row].tolist() for row in (1, 5)]


def test_images_alone(ready: Ready, shard: Path) -> None:
    found = extract(ready.model, loader(ready, shard), False, texts=False)
    assert (len(found.text), len(found.text_ids), len(found.words)) == (0, 0, 0)
    assert len(found.strings) == SAMPLES


# --- taken up again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5])
def test_goes_on_where_it_stopped(
    ready: Ready, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    extract(ready.model, loader(ready, shard), True, folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        Encoded(patch, ready, stop)
        with pytest.raises(KeyboardInterrupt):
            extract(ready.model, loader(ready, shard), True, folder=tmp_path / "killed")
    encoded = Encoded(monkeypatch, ready)
    extract(ready.model, loader(ready, shard), True, folder=tmp_path / "killed")
    assert encoded.pictures == SAMPLES - stop // 2 * 8  # whole parts are not made again
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.eval.noisy import noisy
from tests.eval.test_features import BPE, loader
from vlm.eval import features
features.PART = 8
ready = noisy(Path(sys.argv[1]), "qformer", tokenizer=BPE)
encode, batches = ready.model.encode, []
def dies(images):
    batches.append(len(images))
    if len(batches) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(images)
ready.model.encode = dies
features.extract(ready.model, loader(ready, Path(sys.argv[2])), True, folder=Path(sys.argv[3]))
"""


def test_killed_for_real(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = noisy(tmp_path, "qformer", tokenizer=BPE)
    arguments = [str(tmp_path), str(shard), str(tmp_path / "killed")]
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, *arguments]
    died = subprocess.run(command, check=False, cwd=root, env={**os.environ, "PYTHONPATH": "."})
    assert died.returncode == -signal.SIGKILL
    assert {"part-00000.safetensors", "tokens-00000.safetensors"} < set(contents(tmp_path / "killed"))
    (tmp_path / "killed" / "part-00001.tmp").write_bytes(b"half a file, had it died while it wrote")
    extract(ready.model, loader(ready, shard), True, folder=tmp_path / "whole")
    encoded = Encoded(monkeypatch, ready)
    extract(ready.model, loader(ready, shard), True, folder=tmp_path / "killed")
    assert encoded.pictures == SAMPLES - 8
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_bad_samples_are_counted_again(ready: Ready, tmp_path: Path) -> None:
    samples = members(SAMPLES)
    samples[6] = (samples[6][0], b"no picture")  # of sample 3
    for place in range(8, 16):  # a whole part
        samples[2 * place] = (samples[2 * place][0], b"no picture")
    shard = pack(tmp_path / "holes.tar", samples)
    for _ in range(2):
        reader = loader(ready, shard)
        found = extract(ready.model, reader, True, folder=tmp_path / "features")
        assert (reader.bad, reader.seen) == (Counter({"not an image": 9}), SAMPLES)
        assert found.places.tolist() == [0, 1, 2, *range(4, 8), *range(16, SAMPLES)]
        assert found.names[3] == "0004"


def test_tokens_may_be_asked_for_later(
    ready: Ready, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "features"
    extract(ready.model, loader(ready, shard), False, folder=folder)
    before = contents(folder)
    assert set(before) == PARTS | {"manifest.json"}
    found = extract(ready.model, loader(ready, shard), True, folder=folder)
    assert found.tokens is not None and len(found.tokens) == SAMPLES
    assert {name: data for name, data in contents(folder).items() if name in before} == before
    encoded = Encoded(monkeypatch, ready)
    assert extract(ready.model, loader(ready, shard), False, folder=folder).tokens is None
    assert encoded.pictures == 0


# --- stale, damaged, strange -----------------------------------------------------------------------------------------


def test_another_model(ready: Ready, shard: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "features"
    extract(ready.model, loader(ready, shard), True, folder=folder)
    other = noisy(tmp_path, "qformer", seed=3, tokenizer=BPE)
    found = extract(other.model, loader(other, shard), False, folder=folder)
    assert f"{folder}: features of another origin (weights); made anew" in caplog.text
    equal(found, extract(other.model, loader(other, shard), False))
    assert set(contents(folder)) == PARTS | {"manifest.json"}


@pytest.mark.parametrize(
    ("settings", "batch_size", "texts", "named"),
    [({"max_tokens": 9}, 4, True, "texts"), ({}, 8, True, "batch_size"), ({}, 4, False, "texts")],
)
def test_other_settings(
    ready: Ready,
    shard: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, int],
    batch_size: int,
    texts: bool,
    named: str,
) -> None:
    folder = tmp_path / "features"
    extract(ready.model, loader(ready, shard), False, folder=folder)
    other = loader(replace(ready, batch_size=batch_size), shard, **settings)
    extract(ready.model, other, False, folder=folder, texts=texts)
    assert f"features of another origin ({named}); made anew" in caplog.text


@pytest.mark.parametrize(("place", "again"), [(0, SAMPLES), (10, SAMPLES - 8), (21, SAMPLES - 16)])
@pytest.mark.parametrize("what", ["picture", "caption"])
def test_changed_data(
    ready: Ready, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, again: int, what: str
) -> None:
    folder, changed = tmp_path / "features", members(SAMPLES)
    extract(ready.model, loader(ready, shard), True, folder=folder)
    row = 2 * place + (what == "caption")
    changed[row] = (changed[row][0], picture("pink") if what == "picture" else b"a pink square")
    other = pack(tmp_path / "changed.tar", changed)
    encoded = Encoded(monkeypatch, ready)
    found = extract(ready.model, loader(ready, other), True, folder=folder)
    assert encoded.pictures == again  # from the part of the change on
    equal(found, extract(ready.model, loader(ready, other), True))


@pytest.mark.parametrize(("count", "again"), [(30, 14), (16, 0), (5, 5)])
def test_more_or_fewer_samples(
    ready: Ready, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, again: int
) -> None:
    folder = tmp_path / "features"
    extract(ready.model, loader(ready, shard), True, folder=folder)
    other = pack(tmp_path / "other.tar", members(count))
    encoded = Encoded(monkeypatch, ready)
    found = extract(ready.model, loader(ready, other), True, folder=folder)
    assert encoded.pictures == again
    equal(found, extract(ready.model, loader(ready, other), True))
    assert len(list(folder.glob("part-*"))) == -(-count // 8)


def test_the_sum_of_the_data_does_not_depend_on_parts(
    ready: Ready, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = loader(ready, shard)
    assert extract(ready.model, reader, False).made_of["data"] == data_fingerprint(reader.shards)
    monkeypatch.setattr("vlm.eval.features.PART", 4)
    assert extract(ready.model, reader, False).made_of["data"] == data_fingerprint(reader.shards)


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
