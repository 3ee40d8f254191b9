"""Several sources as one: equal names kept apart, shares by weight, the same batches from any start."""

import itertools
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.shard_files import numbered, write
from tests.data.source_files import folder
from vlm.data.image import ImageTransform
from vlm.data.loader import Loader
from vlm.data.mixture import Mixture
from vlm.data.plan import BLOCK, Order
from vlm.data.shards import Shards
from vlm.data.sources import open_pictures
from vlm.data.text import Tokenizer, train_bpe

TRANSFORM = ImageTransform((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([f"the {i}th thing" for i in range(50)], 290)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Two tars of 12 and 3, a folder of 32, and one tar whose names and pictures are those of the first."""
    place = tmp_path_factory.mktemp("mixture")
    (place / "tars").mkdir()
    write(place / "tars" / "0.tar", numbered(0, 12))
    write(place / "tars" / "1.tar", numbered(12, 3))
    sources = [Shards(str(place / "tars")), open_pictures(folder(place / "folder"))]
    sources.append(Shards(str(write(place / "again.tar", numbered(0, 8)))))
    return Mixture(sources, ["tars", "folder", "again"], [2.0, 1.0, 1.0], 0.05)


def _loader(source: Mixture | Shards, bpe: Tokenizer, batch_size: int = 5, **options: Any) -> Loader:
    return Loader(source, TRANSFORM, bpe, batch_size, max_tokens=16, template=None, image_tokens=0, **options)


def test_samples_are_those_of_the_sources_one_after_the_other(mixture: Mixture) -> None:
    assert len(mixture) == 15 + 32 + 8
    index = 0
    for number, source in enumerate(mixture.sources):
        for place in range(len(source)):
            raw, found = source.raw(place), mixture.raw(index)
            assert (found.image, found.captions, found.fields) == (raw.image, raw.captions, raw.fields)
            assert found.key == mixture.key(index) == f"{number}:{source.key(place)}"
            assert mixture.where(index) == source.where(place)
            index += 1
    assert list(mixture.captions()) == [text for source in mixture.sources for text in source.captions()]
    assert mixture.starts.tolist() == [0, 12, 15, 47]


def test_equal_names_are_two_pictures(mixture: Mixture, bpe: Tokenizer) -> None:
    """Unlike samples of one source with one id, they are no positives of each other but by their captions."""
    assert mixture.raw(0).image == mixture.raw(47).image and mixture.raw(0).id != mixture.raw(47).id
    assert len({mixture.raw(index).id for index in range(len(mixture))}) == len(mixture)


def test_what_is_unusable_is_summed(tmp_path: Path) -> None:
    sources = []
    for number, many in enumerate((2, 3)):
        bad = [{"__key__": f"b{i}", "txt": "no picture"} for i in range(many)]
        sources.append(Shards(str(write(tmp_path / f"{number}.tar", numbered(0, 9) + bad)), max_bad_fraction=0.5))
    mixture = Mixture(sources, ["a", "b"], [1.0, 1.0], 0.5)
    assert mixture.bad == {"no image": 5} and [file.name for file in mixture.files] == ["0.tar", "1.tar"]


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"workers": 2, "cache_mb": 1}], ids=str)
def test_shares_and_orders_in_batches(mixture: Mixture, bpe: Tokenizer, options: dict[str, int]) -> None:
    """Each source's samples come in the order of its own, and the stream is the same from any start."""
    batches = list(itertools.islice(_loader(mixture, bpe, 4, seed=5).train(count()), 40))
    keys = [key for batch in batches for key in batch.keys]
    assert Counter(key[0] for key in keys) == dict(zip("012", mixture.plan(5, 1).seen(160), strict=True))
    for number, source in enumerate(mixture.sources):
        order = Order(source.starts, len(source), 5, number=number)
        own = [key for key in keys if key.startswith(f"{number}:")]
        assert own == [f"{number}:{source.key(order(position))}" for position in range(len(own))]
    for start in (0, 7, 29):
        again = itertools.islice(_loader(mixture, bpe, 4, seed=5, **options).train(count(start)), 3)
        assert [b.keys for b in again] == [b.keys for b in batches[start : start + 3]]


def test_bad_samples_are_replaced_from_the_same_source(mixture: Mixture, bpe: Tokenizer, tmp_path: Path) -> None:
    spoilt = [sample | {"png": b"no picture"} if i % 3 == 0 else sample for i, sample in enumerate(numbered(0, 12))]
    sources = [Shards(str(write(tmp_path / "bad.tar", spoilt)), max_bad_fraction=1.0), mixture.sources[0]]
    loader = _loader(Mixture(sources, ["bad", "good"], [1.0, 1.0], 1.0), bpe, 8)
    keys = [key for batch in itertools.islice(loader.train(count()), 20) for key in batch.keys]
    assert Counter(key[0] for key in keys) == dict(zip("01", loader.shards.plan(0, 1).seen(160), strict=True))
    assert loader.bad["not an image"] > 20


def test_once_is_every_sample_whatever_its_weight(mixture: Mixture, bpe: Tokenizer) -> None:
    keys = [key for batch in _loader(mixture, bpe).once() for key in batch.keys]
    assert keys == [mixture.key(index) for index in range(len(mixture))]


def test_table(mixture: Mixture) -> None:
    assert mixture.table(40_000, 0).splitlines() == [
        "source  samples  weight  share  of 40,000   epochs",
        "tars         15       2  50.0%     20,000  1333.33",
        "folder       32       1  25.0%     10,000   312.50",
        "again         8       1  25.0%     10,000  1250.00",
    ]


def test_a_source_smaller_than_its_share_of_a_batch(mixture: Mixture, bpe: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"batch_size=36: data.train.0 has 15 usable samples, .* 18.0 of a batch"):
        _loader(mixture, bpe, 36).train([0])


def test_a_weight_that_never_counts(mixture: Mixture) -> None:
    with pytest.raises(ValueError, match=r"data.train.0.weight=1e-06: .* less than one sample in 10000"):
        Mixture(mixture.sources[:2], ["a", "b"], [1e-6, 1.0], 0.05)


# --- where files and blocks begin ------------------------------------------------------------------------------------


def test_shards_of_any_size(tmp_path: Path, bpe: Tokenizer) -> None:
    """1, 7, 0 and 2 samples: an empty tar among others holds nothing up."""
    first = 0
    for number, many in enumerate((1, 7, 0, 2)):
        write(tmp_path / f"{number}.tar", numbered(first, many))
        first += many
    shards = Shards(str(tmp_path))
    assert shards.starts.tolist() == [0, 1, 8, 8] and len(shards) == 10 and not shards.bad
    for window in (1, 5, 100):
        batches = list(itertools.islice(_loader(shards, bpe, 3, window=window).train(count()), 10))
        keys = [key for batch in batches for key in batch.keys]
        for epoch in range(3):
            assert sorted(keys[10 * epoch : 10 * epoch + 10]) == [shards.key(index) for index in range(10)]


def test_shards_after_repeats_were_dropped(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", numbered(0, 4))
    write(tmp_path / "1.tar", numbered(0, 3))
    write(tmp_path / "2.tar", numbered(3, 4))
    shards = Shards(str(tmp_path), max_bad_fraction=1.0)
    assert shards.starts.tolist() == [0, 4, 4] and len(shards) == 7


def test_a_window_keeps_to_its_shards(tmp_path: Path, bpe: Tokenizer) -> None:
    for number in range(8):
        write(tmp_path / f"{number}.tar", numbered(5 * number, 5))
    loader = _loader(Shards(str(tmp_path)), bpe, 10, window=10)
    shards_of = [{int(key[1:]) // 5 for key in batch.keys} for batch in itertools.islice(loader.train(count()), 4)]
    assert [len(shards) for shards in shards_of] == [2] * 4 and set.union(*shards_of) == set(range(8))


def test_blocks_of_a_source(mixture: Mixture) -> None:
    assert np.array_equal(mixture.sources[1].starts, [0]) and BLOCK > 32


def test_window_out_of_range(mixture: Mixture, bpe: Tokenizer) -> None:
    with pytest.raises(ValueError, match="window=0: must be at least 1"):
        _loader(mixture, bpe, window=0)
