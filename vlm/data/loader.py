"""Shards to finished batches: what step s trains on is a function of (seed, s) and of nothing else.

So a run can stop and go on at any step, with any number of workers, cache or not, and see the same batches.
"""

import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm.data.augment import Augment, Cut
from vlm.data.batch import Batch, collate
from vlm.data.features import Transform
from vlm.data.image import BadSample, ImageTransform
from vlm.data.mixture import Mixture
from vlm.data.pictures import Pictures
from vlm.data.plan import AUGMENT, SAMPLE, WINDOW, Order, Plan, randomness
from vlm.data.shards import RawSample, Sample, check_bad
from vlm.data.talk_batch import TalkForm, collate_talks
from vlm.data.template import Template
from vlm.data.text import Tokenizer

MAX_TRIES = 100  # replacements in a row for one bad sample
MAX_WARNINGS = 10  # bad samples that are named in the log; the rest are only counted

T = TypeVar("T")

log = logging.getLogger(__name__)


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

    `template`, `image_tokens`, `reply_start`: as of `collate`.
    `captions_per_image`: captions drawn per sample in training, the first ones in evaluation; 0: all of them.
    `keep_first`: the first caption of a sample is always among those drawn.
    `talks`: conversations, and how they become text; then no caption is drawn, and `template` is not used.
    `window`: samples that are mixed in training, see `Order`; not `shuffle`: in the order of the shards.
    `cache_mb`: memory for decoded pictures, shared out among `workers`; what does not fit is decoded anew each time.
    They are kept as they are before anything random: at the encoder's size, or whole where parts of them are cut.
    `seen` counts the samples met so far, `bad` the unusable ones by reason; above the shards' `max_bad_fraction` of
    them: ValueError.
    """

    def __init__(
        self,
        shards: Pictures,
        transform: Transform,
        tokenizer: Tokenizer,
        batch_size: int,
        *,
        max_tokens: int,
        template: str | Template | None,
        image_tokens: int,
        reply_start: int | None = None,
        captions_per_image: int = 1,
        keep_first: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        workers: int = 0,
        cache_mb: int = 0,
        shuffle: bool = True,
        window: int = WINDOW,
        talks: TalkForm | None = None,
    ) -> None:
        """Nothing is read before the first batch."""
        numbers = {"captions_per_image": captions_per_image, "workers": workers, "cache_mb": cache_mb}
        positive = {"batch_size": batch_size, "window": window}
        for name, value in (positive | numbers).items():
            if value < (least := int(name in positive)):
                raise ValueError(f"{name}={value}: must be at least {least}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed}: must be from 0 to 2**63 - 1")
        self.shards, self.transform, self.tokenizer, self.batch_size = shards, transform, tokenizer, batch_size
        self.max_tokens, self.template, self.image_tokens = max_tokens, template, image_tokens
        self.reply_start = reply_start
        self.captions_per_image, self.keep_first = captions_per_image, keep_first
        self.seed, self.cut, self.augment = seed, None, augment
        if augment is not None and isinstance(transform, ImageTransform):
            self.cut, self.augment = augment.split(transform)
        self.workers, self.shuffle, self.talks = workers, shuffle, talks
        self.steps_per_epoch = -(-len(shards) // batch_size)
        self._plan: Plan = (
            shards.plan(seed, window)
            if isinstance(shards, Mixture)
            else Order(shards.starts, len(shards), seed, window)
        )
        self.bad: Counter[str] = Counter()
        self.seen = 0
        self._cache: dict[tuple[int, bool], Sample] = {}
        self._room = cache_mb * 2**20 // max(1, workers)

    def train(self, numbers: Iterable[int]) -> Iterator[Batch]:
        """Finished batches by their numbers in the stream, augmented by draws of (seed, number).

        A batch may hold the end of one epoch and the start of the next.
        """
        self._plan.refuse_batch(self.batch_size)
        return self._batches(self._train_step, numbers)

    def once(self, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Every usable sample once, in the order of the shards, not augmented; the last batch may be short.

        Of `ranks` that go through them together, number `rank` gets every so-manieth batch, maybe none.
        """
        usable = False
        for batch in self.part(range(rank, self.steps_per_epoch, ranks)):
            usable = True
            yield batch
        if not usable and ranks == 1:
            raise ValueError(f"{self.shards.files[0]}: no sample is usable: {dict(self.bad)}")

    def part(self, steps: Iterable[int]) -> Iterator[Batch]:
        """Some of the batches of `once`, by their numbers; one without a usable sample is left out."""
        return self._batches(self._once_step, steps)

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
                    worker_init_fn=_begin_worker,
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
        self.seen += work.seen
        if work.error:
            raise ValueError(work.error)
        check_bad(self.bad, self.seen, self.shards.max_bad_fraction, str(self.shards.files[0]))

    def _train_step(self, step: int) -> _Work:
        bad: list[tuple[str, str]] = []
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        batch = self._collate([self._draw(position, bad) for position in positions])
        pixels = batch.pixels
        if self.augment is not None:
            seed = int(randomness(self.seed, AUGMENT, step).integers(2**63))
            pixels = self.augment(pixels, torch.Generator().manual_seed(seed))
        return _Work(replace(batch, images=pixels), bad, len(positions) + len(bad))

    def _once_step(self, step: int) -> _Work:
        bad: list[tuple[str, str]] = []
        first, count = step * self.batch_size, self.captions_per_image
        indices = range(first, min(first + self.batch_size, len(self.shards)))
        found = {index: sample for index in indices if (sample := self._sample(index, bad)) is not None}
        if not found:
            return _Work(None, bad, len(indices))
        if (talks := self.talks) is not None:
            batch = self._collate([talks.drawn(sample, None) for sample in found.values()])
        else:
            some = [replace(sample, captions=sample.captions[: count or None]) for sample in found.values()]
            batch = self._collate(some)
        return _Work(replace(batch, places=list(found)), bad, len(indices))

    def _collate(self, samples: list[Sample]) -> Batch:
        if self.talks is not None:
            assert isinstance(self.transform, ImageTransform)
            return collate_talks(samples, self.talks, self.transform.size)
        wanted = self.max_tokens, self.template, self.image_tokens, self.reply_start
        return collate(samples, self.tokenizer, *wanted)

    def _draw(self, position: int, bad: list[tuple[str, str]]) -> Sample:
        """The sample of a position with its captions drawn; a bad one is replaced by another drawn for it."""
        index = self._plan(position) if self.shuffle else position % len(self.shards)
        for attempt in range(1, MAX_TRIES + 1):
            random = randomness(self.seed, SAMPLE, position, attempt)
            sample = self._sample(index, bad, self.cut)
            if sample is not None:
                return self._drawn(sample, random)
            unusable, index = index, self._plan.instead(position, attempt, random)
        raise ValueError(
            f"{self.shards.where(unusable)}: unusable, and so were {MAX_TRIES - 1} others tried in its place"
        )

    def _drawn(self, sample: Sample, random: np.random.Generator) -> Sample:
        if self.talks is not None:
            chosen = self.talks.drawn(sample, random)
        else:
            chosen = replace(sample, captions=self._pick(sample.captions, random))
        cut, pixels = self.cut, sample.pixels
        if cut is None:
            return chosen
        return replace(
            chosen, pixels=[cut(one, random) for one in pixels] if isinstance(pixels, list) else cut(pixels, random)
        )

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
            sample = self._read(self.shards.raw(index), (cut or self.transform).read)
        except BadSample as error:
            bad.append((error.reason, f"{self.shards.where(index)}: {error}"))
            return None
        pictures = sample.pixels if isinstance(sample.pixels, list) else [sample.pixels]
        size = sum(picture.nbytes for picture in pictures) + sum(map(len, sample.captions))
        if size <= self._room:
            self._room -= size
            self._cache[place] = sample
        return sample

    def _read(self, raw: RawSample, read: Callable[[bytes], Tensor]) -> Sample:
        if self.talks is not None:
            return self.talks.sample(raw, read)
        return Sample(raw.key, raw.id, read(raw.image), raw.captions, frozenset(raw.captions))


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
            worker_init_fn=_begin_worker,
        )
    )


def _unchanged(work: Any) -> Any:
    return work


def _begin_worker(worker: int) -> None:
    """What asks the job to stop is the main process's to handle, which may need a batch yet; workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _unless_main_ended


def _unless_main_ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What fails in a worker, main tells; only the thread that hands over tensors prints, when main has gone."""
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)
