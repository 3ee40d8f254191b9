"""Several sources of pictures as one, each seen as often as its weight says."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from vlm.data.pictures import Pictures
from vlm.data.plan import Indices, Mix, Order, quotas
from vlm.data.remote import Place
from vlm.data.shards import RawSample


class Mixture:
    """`Pictures` that number the samples of several sources one after the other.

    Keys and ids bear the number of their source, `1:0042`: equal names in two sources are two pictures.
    """

    def __init__(
        self, sources: Sequence[Pictures], names: Sequence[str], weights: Sequence[float], max_bad_fraction: float
    ) -> None:
        """`names` of the sources, for people; `weights` beside each other. ValueError: one too small to count."""
        self.sources, self.names, self.weights = list(sources), list(names), list(weights)
        self.files: list[Place] = [file for source in sources for file in source.files]
        self.bad: Counter[str] = sum((source.bad for source in sources), Counter())
        self.max_bad_fraction = max_bad_fraction
        self._firsts = np.cumsum([0, *map(len, sources)])
        quotas(weights)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def starts(self) -> Indices:
        """Of all sources."""
        return np.concatenate(
            [first + source.starts for first, source in zip(self._firsts, self.sources, strict=False)]
        )

    def plan(self, seed: int, window: int) -> Mix:
        """The order of training; each source has a window of its own."""
        orders = [Order(s.starts, len(s), seed, window, number) for number, s in enumerate(self.sources)]
        return Mix(orders, self.weights, seed)

    def key(self, index: int) -> str:
        """Name of a sample, after the number of its source."""
        number, place = self._place(index)
        return f"{number}:{self.sources[number].key(place)}"

    def where(self, index: int) -> str:
        """As its source says."""
        number, place = self._place(index)
        return self.sources[number].where(place)

    def raw(self, index: int) -> RawSample:
        """Read one sample. Errors: as of its source."""
        number, place = self._place(index)
        raw = self.sources[number].raw(place)
        return replace(raw, key=f"{number}:{raw.key}", id=f"{number}:{raw.id}")

    def captions(self) -> Iterator[str]:
        """All captions of all sources, each once whatever the weights."""
        return chain.from_iterable(source.captions() for source in self.sources)

    def table(self, total: int, seed: int) -> str:
        """What the first `total` samples of training are, for people."""
        plan = self.plan(seed, 1)
        rows = [("source", "samples", "weight", "share", f"of {total:,}", "epochs")]
        columns = self.names, self.sources, self.weights, plan.seen(plan.block), plan.seen(total)
        for name, source, weight, quota, count in zip(*columns, strict=True):
            share, epochs = f"{quota / plan.block:.1%}", f"{count / len(source):.2f}"
            rows.append((name, f"{len(source):,}", f"{weight:g}", share, f"{count:,}", epochs))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        )

    def _place(self, index: int) -> tuple[int, int]:
        number = int(self._firsts.searchsorted(index, "right")) - 1
        return number, index - int(self._firsts[number])
