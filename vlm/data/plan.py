"""Which sample stands at a position of the endless training stream: a function of (seed, position) and of nothing else.

An epoch permutes the shards (or blocks of neighbouring samples), then the samples within windows of several shards, so
that little but the shards of one window is read at a time. In memory are a window and a number for each shard.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

BLOCK = 1024  # neighbouring samples read together where there are no shards
WINDOW = 100_000  # samples
MIX_LEAST, MIX_MOST = 100, 10_000  # positions in which every source of a mixture has its exact share
NEAR_TRIES = 10  # replacements in a row from the same window, before they may come from anywhere
ORDER, SAMPLE, AUGMENT, SHARDS, SOURCES = range(5)  # streams of random numbers
_KEPT = 2  # windows, epochs and blocks remembered: a batch may stand across the border of two

Indices = npt.NDArray[np.int64]
K = TypeVar("K")
V = TypeVar("V")


def randomness(seed: int, stream: int, *place: int) -> np.random.Generator:
    """Independent generator of a place: Philox (Salmon et al. 2011) counts, it has no state to carry along."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, *place, *[0] * (3 - len(place))]))


def blocks(count: int) -> Indices:
    """Where blocks of neighbouring samples begin, for what is not in shards."""
    return np.arange(0, count, BLOCK)


class Plan(Protocol):
    """Position in the stream to sample."""

    def __call__(self, position: int) -> int:
        """The sample at a position from 0 on."""
        ...

    def instead(self, position: int, attempt: int, random: np.random.Generator) -> int:
        """A sample in place of the one at a position, which is unusable; `attempt` counts from 1."""
        ...

    def refuse_batch(self, size: int) -> None:
        """ValueError when a batch would have to hold a sample twice all the time."""
        ...


class Order:
    """One set, epoch after epoch: every sample once in each, in a new order each time.

    `starts`: where shards begin (`Pictures.starts`); `window`: samples that are mixed, at least a whole shard.
    A set no larger than a window is fully shuffled. `number`: sets of other numbers have independent orders.
    """

    def __init__(self, starts: Indices, count: int, seed: int, window: int = WINDOW, number: int = 0) -> None:
        """Nothing is permuted yet."""
        sizes = np.diff(starts, append=count)
        self.count, self._seed, self._number = count, seed, number
        self._starts, self._sizes = starts[sizes > 0], sizes[sizes > 0]
        self._span = -(-count // -(-count // window)) if count else 1  # windows of equal size, so none is a mere rest
        self._layouts: dict[int, tuple[Indices, Indices, Indices]] = {}
        self._windows: dict[tuple[int, int], Indices] = {}

    def __call__(self, position: int) -> int:
        """The sample at a position."""
        samples, place = self._window(position)
        return int(samples[place])

    def instead(self, position: int, attempt: int, random: np.random.Generator) -> int:
        """From the same window, whose shards are at hand; later from anywhere: a whole shard may be unusable."""
        if attempt > NEAR_TRIES:
            return int(random.integers(self.count))
        samples, _ = self._window(position)
        return int(samples[random.integers(len(samples))])

    def refuse_batch(self, size: int) -> None:
        """ValueError when the set is smaller than a batch."""
        if size > self.count:
            raise ValueError(f"batch_size={size} exceeds the {self.count} usable samples; make it smaller")

    def _window(self, position: int) -> tuple[Indices, int]:
        """The samples of a position's window, permuted, and the place among them."""
        epoch, place = divmod(position, self.count)
        shards, firsts, begins = self._layout(epoch)
        number = int(begins.searchsorted(place, "right")) - 1
        samples = self._windows.get((epoch, number))
        if samples is None:
            samples = self._permuted(epoch, number, np.sort(shards[firsts[number] : firsts[number + 1]]))
            _keep(self._windows, (epoch, number), samples)
        return samples, place - int(begins[number])

    def _layout(self, epoch: int) -> tuple[Indices, Indices, Indices]:
        """The shards of an epoch in their order; of each window the first of them, and where in the epoch it begins."""
        found = self._layouts.get(epoch)
        if found is None:
            shards = randomness(self._seed, SHARDS, epoch, self._number).permutation(len(self._starts))
            begins = np.cumsum(self._sizes[shards]) - self._sizes[shards]
            firsts = np.flatnonzero(np.diff(begins // self._span, prepend=-1))
            found = shards, np.append(firsts, len(shards)), begins[firsts]
            _keep(self._layouts, epoch, found)
        return found

    def _permuted(self, epoch: int, number: int, shards: Indices) -> Indices:
        sizes = self._sizes[shards]
        ends = np.cumsum(sizes)
        samples = np.repeat(self._starts[shards] - (ends - sizes), sizes) + np.arange(ends[-1])
        return randomness(self._seed, ORDER, epoch, number, self._number).permutation(samples)


class Mix:
    """Several sets by weight: each goes through epochs of its own, in its own order, without repeats or skips.

    In every block of positions each set has its exact share, in a random order; samples are numbered set after set.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        """ValueError: a weight that is too small beside the others."""
        self._orders, self._seed = orders, seed
        self._quotas = np.array(quotas(weights))
        self._offsets = np.cumsum([0, *(order.count for order in orders)]).tolist()
        self.block = int(self._quotas.sum())
        self._blocks: dict[int, tuple[Indices, Indices]] = {}

    def __call__(self, position: int) -> int:
        """The sample at a position."""
        which, cursor = self.place(position)
        return int(self._offsets[which]) + self._orders[which](cursor)

    def instead(self, position: int, attempt: int, random: np.random.Generator) -> int:
        """From the same set."""
        which, cursor = self.place(position)
        return int(self._offsets[which]) + self._orders[which].instead(cursor, attempt, random)

    def refuse_batch(self, size: int) -> None:
        """ValueError when a set is smaller than its share of a batch."""
        for number, (order, quota) in enumerate(zip(self._orders, self._quotas.tolist(), strict=True)):
            share = size * quota / self.block
            if share > order.count:
                raise ValueError(
                    f"batch_size={size}: data.train.{number} has {order.count} usable samples, and its weight gives it "
                    f"{share:.1f} of a batch; make one of the two smaller"
                )

    def place(self, position: int) -> tuple[int, int]:
        """Which set a position takes, and the position in that set's own stream."""
        number, place = divmod(position, self.block)
        sets, before = self._in_block(number)
        which = int(sets[place])
        return which, number * int(self._quotas[which]) + int(before[place])

    def seen(self, positions: int) -> list[int]:
        """Samples that each set gives to the first `positions`."""
        number, place = divmod(positions, self.block)
        part = np.bincount(self._in_block(number)[0][:place], minlength=len(self._quotas))
        counts: list[int] = (number * self._quotas + part).tolist()
        return counts

    def _in_block(self, number: int) -> tuple[Indices, Indices]:
        """Of each position in a block: its set, and how many of that set stand before it."""
        found = self._blocks.get(number)
        if found is None:
            every = np.repeat(np.arange(len(self._quotas)), self._quotas)
            sets = randomness(self._seed, SOURCES, number).permutation(every)
            before = np.empty_like(sets)
            before[sets.argsort(kind="stable")] = (
                np.arange(self.block) - (np.cumsum(self._quotas) - self._quotas)[every]
            )
            found = sets, before
            _keep(self._blocks, number, found)
        return found


def quotas(weights: Sequence[float]) -> list[int]:
    """Positions of each source in a block, which is short where the weights allow, and by largest remainder at worst.

    ValueError: a weight so small that its source would never be seen.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    total = sum(whole) // math.gcd(*whole)
    size = min(total * max(1, MIX_LEAST // total), MIX_MOST)
    shares = [Fraction(weight * size, sum(whole)) for weight in whole]
    found = [int(share) for share in shares]
    most = sorted(range(len(found)), key=lambda source: found[source] - shares[source])
    for source in most[: size - sum(found)]:
        found[source] += 1
    if 0 in found:
        number = found.index(0)
        raise ValueError(
            f"data.train.{number}.weight={weights[number]:g}: beside the other weights that is less than one sample in "
            f"{size}; raise it, or leave the source out"
        )
    return found


def _keep(kept: dict[K, V], key: K, value: V) -> None:
    """One more, the oldest forgotten. (functools.lru_cache would keep the loader from being pickled.)"""
    if len(kept) == _KEPT:
        del kept[next(iter(kept))]
    kept[key] = value
