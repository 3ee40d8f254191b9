"""The same batches whatever the start, the workers and the cache; bad samples replaced, counted and limited."""

import itertools
import pickle
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.shard_files import numbered, picture, write
from vlm.data.augment import Augment
from vlm.data.batch import Batch
from vlm.data.image import ImageTransform, decode
from vlm.data.loader import Loader, _unless_main_ended
from vlm.data.shards import Shards
from vlm.data.text import Tokenizer, train_bpe

TRANSFORM = ImageTransform((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([f"the {i}th thing" for i in range(50)], 290)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards")
    for i in range(2):
        write(folder / f"{i}.tar", numbered(20 * i, 12))
    return Shards(str(folder))


def _loader(shards: Shards, bpe: Tokenizer, batch_size: int = 5, **options: Any) -> Loader:
    return Loader(
        shards, TRANSFORM, bpe, batch_size, max_tokens=16, template="{image}{text}", image_tokens=2, **options
    )


def _assert_same(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys and one.strings == other.strings and one.image_ids == other.image_ids
    assert one.prompts is not None and other.prompts is not None
    for a, b in (
        (one.images, other.images),
        (one.owner, other.owner),
        (one.positive, other.positive),
        (one.captions.ids, other.captions.ids),
        (one.prompts.labels, other.prompts.labels),
    ):
        assert torch.equal(a, b)


AUGMENT = Augment(scale=(0.5, 1.0), flip=True, brightness=0.3, contrast=0.3, erase=0.5)  # before and after resizing
CUT = Augment(scale=(0.2, 1.0), ratio=0.3, flip=True)  # before it
TURNED = Augment(scale=(0.5, 1.2), rotate=20.0, grey=0.3)  # after it


@pytest.mark.parametrize("augment", [AUGMENT, CUT, TURNED], ids=["both", "cut", "turned"])
@pytest.mark.parametrize(
    "options",
    [{"workers": 1}, {"workers": 2}, {"cache_mb": 1}, {"workers": 2, "cache_mb": 1}],
    ids=["one worker", "two workers", "cache", "two workers with cache"],
)
def test_step_is_all_that_matters(shards: Shards, bpe: Tokenizer, options: dict[str, int], augment: Augment) -> None:
    common: dict[str, Any] = {"augment": augment, "seed": 3, "captions_per_image": 2}
    expected = list(itertools.islice(_loader(shards, bpe, **common).train(count()), 11))  # 4.8 steps an epoch
    for start in (0, 3, 4):
        got = itertools.islice(_loader(shards, bpe, **common, **options).train(count(start)), 11 - start)
        for one, other in zip(got, expected[start:], strict=True):
            _assert_same(one, other)


def test_epochs_and_seeds(shards: Shards, bpe: Tokenizer) -> None:
    loader = _loader(shards, bpe, batch_size=6)
    assert loader.steps_per_epoch == 4
    batches = list(itertools.islice(loader.train(count()), 8))
    for epoch in (batches[:4], batches[4:]):
        assert sorted(key for batch in epoch for key in batch.keys) == [shards.key(i) for i in range(24)]
    assert batches[0].keys != batches[4].keys
    assert next(_loader(shards, bpe, batch_size=6, seed=1).train(count())).keys != batches[0].keys
    # The last batch of an epoch is filled up from the next: nothing is dropped.
    assert next(_loader(shards, bpe, shuffle=False).train([4])).keys == [shards.key(i) for i in (20, 21, 22, 23, 0)]


def test_captions_are_drawn_evenly_and_without_repeats(shards: Shards, bpe: Tokenizer) -> None:
    seen: Counter[int] = Counter()
    for batch in itertools.islice(_loader(shards, bpe, batch_size=24, captions_per_image=2).train(count()), 50):
        for index, (first, second) in enumerate(zip(batch.strings[::2], batch.strings[1::2], strict=True)):
            known = [f"number {int(batch.keys[index][1:])}", f"the {int(batch.keys[index][1:])}th thing", "a thing"]
            assert first != second
            seen.update((known.index(first), known.index(second)))
    assert all(700 < seen[place] < 900 for place in range(3)) and seen.total() == 2400
    assert len(next(_loader(shards, bpe, captions_per_image=0).train(count())).strings) == 15
    assert len(next(_loader(shards, bpe, captions_per_image=9).train(count())).strings) == 15


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_are_bytes_until_they_are_where_they_are_used(shards: Shards, bpe: Tokenizer, workers: int) -> None:
    batch = next(_loader(shards, bpe, workers=workers).train(count()))
    assert batch.images.dtype == torch.uint8
    index = int(batch.keys[2][1:]) % 20 + 12 * (int(batch.keys[2][1:]) // 20)
    there = batch.to("cpu")
    assert torch.equal(there.images[2], TRANSFORM(decode(shards.raw(index).image)))
    assert torch.equal(there.to("cpu").images, there.images)  # once is enough
    cut = next(_loader(shards, bpe, workers=workers, augment=CUT).train(count()))
    assert cut.images.dtype == torch.uint8
    for changed in (cut, next(_loader(shards, bpe, workers=workers, augment=AUGMENT).train(count()))):
        assert changed.keys == batch.keys and changed.strings == batch.strings
        assert not torch.equal(changed.to("cpu").images, there.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_once_is_everything_in_order(shards: Shards, bpe: Tokenizer, workers: int) -> None:
    loader = _loader(shards, bpe, batch_size=7, captions_per_image=0, workers=workers, augment=AUGMENT)
    for _ in range(2):
        batches = list(loader.once())
        assert [len(batch.keys) for batch in batches] == [7, 7, 7, 3]
        assert [key for batch in batches for key in batch.keys] == [shards.key(i) for i in range(24)]
        assert [text for batch in batches for text in batch.strings] == list(shards.captions())
    assert torch.equal(batches[0].to("cpu").images[0], TRANSFORM(decode(shards.raw(0).image)))
    first = next(_loader(shards, bpe, batch_size=100).once())
    assert first.strings == [shards.raw(i).captions[0] for i in range(24)]


def test_global_random_numbers_are_left_alone(shards: Shards, bpe: Tokenizer) -> None:
    states = []
    for workers in (0, 1):
        torch.manual_seed(0)
        next(_loader(shards, bpe, workers=workers, augment=AUGMENT).train(count()))
        states.append(torch.rand(1).item())
    torch.manual_seed(0)
    assert states == [torch.rand(1).item()] * 2


def _damaged(path: Path, count: int, every: int) -> str:
    samples = numbered(0, count)
    for i in range(0, count, every):
        samples[i]["png"] = picture(i)[:-30] if i % 2 else b"text"
    return str(write(path, samples))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_counted(workers: int, bpe: Tokenizer, tmp_path: Path) -> None:
    shards = Shards(_damaged(tmp_path / "s.tar", 60, 15), max_bad_fraction=0.5)
    bad = {shards.key(i) for i in range(0, 60, 15)}
    loader, expected = _loader(shards, bpe, batch_size=12, workers=workers), _loader(shards, bpe, batch_size=12)
    batches = list(itertools.islice(loader.train(count()), 5))
    for one, other in zip(batches, expected.train(count()), strict=False):
        _assert_same(one, other)
        assert len(one.keys) == 12 and not bad & set(one.keys)
    assert loader.bad == expected.bad and set(loader.bad) == {"not an image", "corrupt image"}
    assert loader.bad.total() >= 4
    evaluation = _loader(shards, bpe, batch_size=12, workers=workers)
    kept = [key for batch in evaluation.once() for key in batch.keys]
    assert len(kept) == 56 and not bad & set(kept)
    assert evaluation.bad == {"not an image": 2, "corrupt image": 2}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(workers: int, bpe: Tokenizer, tmp_path: Path) -> None:
    shards = Shards(_damaged(tmp_path / "s.tar", 150, 5))
    message = r"samples are unusable \(.*not an image: .*more than max_bad_fraction=0.05; repair"
    for batches in (
        _loader(shards, bpe, workers=workers).train(count()),
        _loader(shards, bpe, workers=workers).once(),
    ):
        with pytest.raises(ValueError, match=message):
            for _ in zip(range(100), batches, strict=False):
                pass


@pytest.mark.parametrize("workers", [0, 1])
def test_all_bad(workers: int, bpe: Tokenizer, tmp_path: Path) -> None:
    shards = Shards(_damaged(tmp_path / "s.tar", 10, 1))
    with pytest.raises(ValueError, match=r"s.tar: k0000\d: unusable, and so were 99 others"):
        next(_loader(shards, bpe, workers=workers).train(count()))
    with pytest.raises(ValueError, match="no sample is usable"):
        next(_loader(shards, bpe, workers=workers).once())


def test_bad_samples_are_named_in_the_log(bpe: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = Shards(_damaged(tmp_path / "s.tar", 60, 3), max_bad_fraction=1.0)
    list(_loader(shards, bpe).once())
    assert len(caplog.messages) == 10
    assert "s.tar: k00000: not an image (no JPEG, " in caplog.messages[0]


def test_cache_of_whole_pictures_is_not_mistaken_for_that_of_finished_ones(shards: Shards, bpe: Tokenizer) -> None:
    loader = _loader(shards, bpe, cache_mb=1, augment=CUT)
    expected = [batch.images for batch in _loader(shards, bpe).once()]
    for _ in range(2):
        next(loader.train(count()))
        assert all(torch.equal(a.images, b) for a, b in zip(loader.once(), expected, strict=True))


def test_cache_is_bounded_and_spares_the_disk(shards: Shards, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[int] = Counter()
    raw = Shards.raw

    def counting(self: Shards, index: int) -> Any:
        reads[index] += 1
        return raw(self, index)

    monkeypatch.setattr(Shards, "raw", counting)
    loader = _loader(shards, bpe, batch_size=24, cache_mb=1)
    list(itertools.islice(loader.train(count()), 3))
    assert reads.total() == 24
    loader = _loader(shards, bpe, batch_size=24)
    loader._room = 700  # room for three pictures of 192 bytes with their captions
    list(itertools.islice(loader.train(count()), 3))
    assert reads.total() == 24 + 3 * 24 - 2 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"captions_per_image": -1}, "captions_per_image=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"cache_mb": -1}, "cache_mb=-1"),
    ],
)
def test_settings_out_of_range(options: dict[str, int], message: str, shards: Shards, bpe: Tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        _loader(shards, bpe, **options)


def test_batch_larger_than_the_set(shards: Shards, bpe: Tokenizer) -> None:
    with pytest.raises(ValueError, match="batch_size=25 exceeds the 24 usable samples"):
        _loader(shards, bpe, batch_size=25).train(count())


def test_loader_can_be_pickled(shards: Shards, bpe: Tokenizer) -> None:
    loader = _loader(shards, bpe)
    _assert_same(next(pickle.loads(pickle.dumps(loader)).train(count(7))), next(loader.train(count(7))))


def test_the_first_caption_can_be_kept(tmp_path: Path, bpe: Tokenizer) -> None:
    members = {"__key__": "a", "png": picture((8, 8)), "txt": "name\nfirst\nsecond\nthird"}
    write(tmp_path / "0.tar", [members])
    loader = _loader(Shards(str(tmp_path)), bpe, batch_size=1, captions_per_image=2, keep_first=True)
    drawn = [batch.strings for batch in itertools.islice(loader.train(count()), 40)]
    assert all(strings[0] == "name" and len(strings) == 2 for strings in drawn)
    assert {strings[1] for strings in drawn} == {"first", "second", "third"}


def test_a_worker_says_nothing_when_main_has_ended_while_it_hands_over_tensors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _unless_main_ended(EOFError, EOFError(), None)
    _unless_main_ended(ConnectionResetError, ConnectionResetError(104, "reset"), None)
    assert capsys.readouterr().err == ""
    _unless_main_ended(KeyError, KeyError("told"), None)
    assert "KeyError: 'told'" in capsys.readouterr().err
