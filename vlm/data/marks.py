"""Who is who in a batch, as numbers that processes can exchange: pictures, their known captions, texts.

Letters: B images, M texts, L numbers.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vlm.data.batch import Batch, positives


class Marks(NamedTuple):
    """64-bit hashes: equal ids show the same thing, a text describes every picture that knows it."""

    ids: list[int]  # B
    known: list[list[int]]  # B: every caption of each picture
    owners: list[int]  # M: id of the picture each text was drawn from
    texts: list[int]  # M

    def fit(self, of: "Marks") -> Bool[Tensor, "B M"]:
        """Which texts `of` another set describe which pictures of this one."""
        return positives(self.ids, self.known, of.owners, of.texts)

    def pack(self) -> Int64[Tensor, "L"]:
        """As one row of numbers."""
        counts = [len(texts) for texts in self.known]
        parts = self.ids, counts, chain.from_iterable(self.known), self.owners, self.texts
        return torch.tensor([len(self.ids), len(self.texts), *chain.from_iterable(parts)])


def marks(batches: Sequence[Batch]) -> Marks:
    """Of several batches, in order."""
    return join(
        Marks(
            [_mark(name) for name in batch.image_ids],
            [[_mark(text) for text in texts] for texts in batch.known],
            [_mark(batch.image_ids[index]) for index in batch.owner.tolist()],
            [_mark(text) for text in batch.strings],
        )
        for batch in batches
    )


def join(parts: Iterable[Marks]) -> Marks:
    """One after the other."""
    return Marks(*(list(chain.from_iterable(column)) for column in zip(*parts, strict=True)))


def unpack(row: Int64[Tensor, "L"]) -> Marks:
    """What `pack` made a row of."""
    numbers = iter(row.tolist())
    images, texts = next(numbers), next(numbers)

    def take(count: int) -> list[int]:
        return list(islice(numbers, count))

    ids, counts = take(images), take(images)
    return Marks(ids, [take(count) for count in counts], take(texts), take(texts))


def _mark(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True
    )
