"""Features of an evaluation: in a folder as in memory, taken up after a kill to the same bytes, never stale."""

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.eval.extracting import BPE, PARTS, SAMPLES, Encoded, contents, equal, loader
from tests.eval.noisy import noisy
from tests.tiny import members, pack, picture
from vlm.data.batch import Text
from vlm.eval.features import extract, match_pairs
from vlm.eval.origin import data_fingerprint
from vlm.model.vlm import Seen
from vlm.restore import Ready

pytestmark = pytest.mark.usefixtures("small_parts")


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


def test_pairs_are_matched_in_parts_that_fit(ready: Ready, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = extract(ready.model, loader(ready, shard), True)
    image, text = torch.tensor([0, 0, 3, 3, 3, 7, 9]), torch.tensor([0, 5, 1, 2, 3, 4, 6])
    whole, asked, logits = match_pairs(ready.model, features, image, text), list[int](), ready.model.match_logits

    def counted(seen: Seen, text: Text) -> torch.Tensor:
        asked.append(len(seen.soft))
        assert seen.state is None  # what matching does not read is not copied
        return logits(seen, text)

    monkeypatch.setattr(ready.model, "match_logits", counted)
    assert features.tokens is not None
    memory = ready.model.connect(features.tokens.take(image[:1])).memory
    assert memory is not None and memory.blocks[0] is not None
    keys = memory.blocks[0].key.nbytes
    monkeypatch.setattr("vlm.eval.features.PAIR_BYTES", 2 * 2 * keys)
    torch.testing.assert_close(match_pairs(ready.model, features, image, text), whole)
    assert asked == [2, 2, 2, 1]


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
