"""Shards to finished batches: what step s trains on is a function of (seed, s) and of nothing else.

So a run can stop and go on at any step, with any number of workers, cache or not, and see the same batches.
"""

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from vlm.data.augment import Augment, Cut
from vlm.data.batch import Batch, collate
from vlm.data.features import Transform
from vlm.data.image import BadSample, ImageTransform
from vlm.data.pictures import Pictures
from vlm.data.shards import Sample, check_bad
from vlm.data.text import Tokenizer

MAX_TRIES = 100  # replacements in a row for one bad sample
MAX_WARNINGS = 10  # bad samples that are named in the log; the rest are only counted
_ORDER, _SAMPLE, _AUGMENT = range(3)  # streams of random numbers

T = TypeVar("T")

log = logging.getLogger(__name__)


def _random(seed: int, stream: int, *place: int) -> np.random.Generator:
    """Independent generator of a place: Philox (Salmon et al. 2011) counts, it has no state to carry along."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, *place, *[0] * (3 - len(place))]))


def order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch: a permutation of 0..count-1."""
    return _random(seed, _ORDER, epoch).permutation(count).astype(np.int64, copy=False)


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return order(count, seed, epoch)


@dataclass(frozen=True)
class _Work:
    """What a worker sends back: a batch (None when every sample was bad), what it met, and why it had to stop."""

    batch: Batch | None
    bad: list[tuple[str, str]]  # reason, message
    seen: int
    error: str = ""


class _Steps(Dataset[_Work]):
    """Step number to work, for `DataLoader`."""

    def __init__(self, work: Callable[[int], _Work]) -> None:
        self._work = work

    def __getitem__(self, step: int) -> _Work:
        try:
            return self._work(step)
        except ValueError as error:  # a message for the user, which should not arrive inside a worker's traceback
            return _Work(None, [], 0, str(error))


class Loader:
    """Batches for training and for evaluation from one set of shards, or of pictures in any other form.

    `captions_per_image`: captions drawn per sample in training, the first ones in evaluation; 0: all of them.
    `keep_first`: the first caption of a sample is always among those drawn.
    `cache_mb`: memory for decoded pictures, shared out among `workers`; what does not fit is decoded anew each time.
    They are kept as they are before anything random: at the encoder's size, or whole where parts of them are cut.
    `bad` counts the unusable samples met so far by reason; above the shards' `max_bad_fraction` of them: ValueError.
    """

    def __init__(
        self,
        shards: Pictures,
        transform: Transform,
        tokenizer: Tokenizer,
        batch_size: int,
        *,
        max_tokens: int,
        template: str | None,
        image_tokens: int,
        captions_per_image: int = 1,
        keep_first: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        workers: int = 0,
        cache_mb: int = 0,
        shuffle: bool = True,
    ) -> None:
        """Nothing is read before the first batch."""
        numbers = {"captions_per_image": captions_per_image, "workers": workers, "cache_mb": cache_mb}
        for name, value in ({"batch_size": batch_size} | numbers).items():
            if value < (least := int(name == "batch_size")):
                raise ValueError(f"{name}={value}: must be at least {least}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed}: must be from 0 to 2**63 - 1")
        self.shards, self.transform, self.tokenizer, self.batch_size = shards, transform, tokenizer, batch_size
        self.max_tokens, self.template, self.image_tokens = max_tokens, template, image_tokens
        self.captions_per_image, self.keep_first = captions_per_image, keep_first
        self.seed, self.cut, self.augment = seed, None, augment
        if augment is not None and isinstance(transform, ImageTransform):
            self.cut, self.augment = augment.split(transform)
        self.workers, self.shuffle = workers, shuffle
        self.steps_per_epoch = len(shards) // batch_size
        self.bad: Counter[str] = Counter()
        self._seen = 0
        self._cache: dict[tuple[int, bool], Sample] = {}
        self._room = cache_mb * 2**20 // max(1, workers)

    def train(self, start: int = 0) -> Iterator[Batch]:
        """Finished batches of the steps `start`, `start` + 1, … without end, augmented by draws of (seed, step)."""
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size={self.batch_size} exceeds the {len(self.shards)} usable samples; make it smaller"
            )
        return self._batches(self._train_step, _Count(start, None))

    def once(self) -> Iterator[Batch]:
        """Every usable sample once, in the order of the shards, not augmented; the last batch may be short."""
        usable = False
        for batch in self._batches(self._once_step, _Count(0, -(-len(self.shards) // self.batch_size))):
            usable = True
            yield batch
        if not usable:
            raise ValueError(f"{self.shards.files[0]}: no sample is usable: {dict(self.bad)}")

    def _batches(self, work: Callable[[int], _Work], steps: Iterable[int]) -> Iterator[Batch]:
        done: Iterator[_Work] = map(work, steps)
        if self.workers:
            # Forked after a tokenizer was trained, its threads would make the library warn at every start.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            done = iter(
                DataLoader(
                    _Steps(work),
                    batch_size=None,
                    sampler=steps,
                    num_workers=self.workers,
                    collate_fn=_unchanged,
                    worker_init_fn=_ignore_signals,
                    generator=torch.Generator(),  # else starting the workers would draw from the global one
                )
            )
        for result in done:
            self._account(result)
            if result.batch is not None:
                yield replace(result.batch, normalize=self.transform.normalize)

    def _account(self, work: _Work) -> None:
        for reason, message in work.bad:
            if self.bad.total() < MAX_WARNINGS:
                log.warning("unusable sample %s", message)
            self.bad[reason] += 1
        self._seen += work.seen
        if work.error:
            raise ValueError(work.error)
        check_bad(self.bad, self._seen, self.shards.max_bad_fraction, str(self.shards.files[0]))

    def _train_step(self, step: int) -> _Work:
        epoch, within = divmod(step, self.steps_per_epoch)
        bad: list[tuple[str, str]] = []
        places = range(within * self.batch_size, (within + 1) * self.batch_size)
        batch = self._collate([self._draw(epoch, place, bad) for place in places])
        pixels = batch.pixels
        if self.augment is not None:
            seed = int(_random(self.seed, _AUGMENT, step).integers(2**63))
            pixels = self.augment(pixels, torch.Generator().manual_seed(seed))
        return _Work(replace(batch, images=pixels), bad, len(places) + len(bad))

    def _once_step(self, step: int) -> _Work:
        bad: list[tuple[str, str]] = []
        first, count = step * self.batch_size, self.captions_per_image
        indices = range(first, min(first + self.batch_size, len(self.shards)))
        found = [sample for index in indices if (sample := self._sample(index, bad)) is not None]
        if not found:
            return _Work(None, bad, len(indices))
        batch = self._collate([replace(sample, captions=sample.captions[: count or None]) for sample in found])
        return _Work(batch, bad, len(indices))

    def _collate(self, samples: list[Sample]) -> Batch:
        return collate(samples, self.tokenizer, self.max_tokens, self.template, self.image_tokens)

    def _draw(self, epoch: int, place: int, bad: list[tuple[str, str]]) -> Sample:
        """The sample of a place in the epoch with its captions drawn; a bad one is replaced by another drawn for it."""
        count = len(self.shards)
        for attempt in range(MAX_TRIES):
            random = _random(self.seed, _SAMPLE, epoch, place, attempt)
            if attempt:
                index = int(random.integers(count))
            else:
                index = int(_order(count, self.seed, epoch)[place]) if self.shuffle else place
            sample = self._sample(index, bad, self.cut)
            if sample is not None:
                captions = self._pick(sample.captions, random)
                pixels = sample.pixels if self.cut is None else self.cut(sample.pixels, random)
                return replace(sample, pixels=pixels, captions=captions)
        raise ValueError(f"{self.shards.where(index)}: unusable, and so were {MAX_TRIES - 1} others tried in its place")

    def _pick(self, captions: list[str], random: np.random.Generator) -> list[str]:
        fixed = captions[:1] if self.keep_first else []
        others = captions[len(fixed) :]
        wanted = (self.captions_per_image or len(captions)) - len(fixed)
        return fixed + [others[i] for i in random.permutation(len(others))[:wanted].tolist()]

    def _sample(self, index: int, bad: list[tuple[str, str]], cut: Cut | None = None) -> Sample | None:
        """Decoded (`cut`: to be cut), with all its captions; None and an entry in `bad` when it cannot be used."""
        place = index, cut is not None
        if place in self._cache:
            return self._cache[place]
        try:
            raw = self.shards.raw(index)
            pixels = (cut or self.transform).read(raw.image)
        except BadSample as error:
            bad.append((error.reason, f"{self.shards.where(index)}: {error}"))
            return None
        sample = Sample(raw.key, raw.id, pixels, raw.captions, frozenset(raw.captions))
        size = pixels.nbytes + sum(map(len, raw.captions))
        if size <= self._room:
            self._room -= size
            self._cache[place] = sample
        return sample


class _Count:
    """The numbers from `start` on, up to `stop` or without end."""

    def __init__(self, start: int, stop: int | None) -> None:
        self._start, self._stop = start, stop

    def __iter__(self) -> Iterator[int]:
        step = self._start
        while self._stop is None or step < self._stop:
            yield step
            step += 1


def in_order(items: Dataset[T], count: int, workers: int) -> Iterator[T]:
    """The first `count` items, made here or by `workers` processes."""
    if not workers:
        return (items[index] for index in range(count))
    return iter(
        DataLoader(
            items,
            batch_size=None,
            sampler=range(count),
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_signals,
        )
    )


def _unchanged(work: Any) -> Any:
    return work


def _ignore_signals(worker: int) -> None:
    """What asks the job to stop is the main process's to handle, which may need a batch yet; workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
