"""The n-grams of captions and their references as arrays: what BLEU and CIDEr-D both count.

Letters: T texts, K distinct n-grams of all texts, E entries (an n-gram of a text, once for each text that has it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

MAX_N = 4
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = Sequence[str]


@dataclass(frozen=True)
class Grams:
    """Entries in order of text, then of n-gram."""

    text: Ints  # of each entry, E
    gram: Ints  # of each entry, its number, E
    count: Ints  # of each entry, how often the text has it, E
    order: Ints  # of each n-gram, n - 1, K
    length: Ints  # of each text, words, T

    @cached_property
    def place(self) -> Ints:
        """Where counts by text and order belong in a flat array, E."""
        return self.text * MAX_N + self.order[self.gram]


@dataclass(frozen=True)
class Counted:
    """One candidate an image, and its references; both number their n-grams alike."""

    candidates: Grams  # text i is that of image i
    references: Grams
    image: Ints  # of each reference
    words: Words  # of all texts
    first: Ints  # of each n-gram, where in `words` it is found, K

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.candidates.length)

    @property
    def grams(self) -> list[tuple[str, ...]]:
        """The words of each n-gram."""
        ends = self.first + self.candidates.order + 1
        return [tuple(self.words[at:end]) for at, end in zip(self.first.tolist(), ends.tolist(), strict=True)]

    def key(self, grams: Grams) -> Ints:
        """A number for each entry's image and n-gram."""
        image = grams.text if grams is self.candidates else self.image[grams.text]
        return image * len(grams.order) + grams.gram


def count(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Counted:
    """The n-grams of 1 to 4 words. ValueError: not one list of references per candidate, none, an empty one."""
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{len(candidates)} captions, {len(references)} of: list of references; give one list of references per "
            "caption, at least one"
        )
    if not all(references):
        raise ValueError(f"caption {[bool(group) for group in references].index(False)} has no reference")
    texts = [*candidates, *(words for group in references for words in group)]
    words = [word for text in texts for word in text]
    length = np.array([len(text) for text in texts], np.int64)
    both, first = _grams(words, length)
    border, cut = len(candidates), int(np.searchsorted(both.text, len(candidates)))
    return Counted(
        Grams(both.text[:cut], both.gram[:cut], both.count[:cut], both.order, length[:border]),
        Grams(both.text[cut:] - border, both.gram[cut:], both.count[cut:], both.order, length[border:]),
        np.repeat(np.arange(len(references)), [len(group) for group in references]),
        words,
        first,
    )


def _grams(words: Words, length: Ints) -> tuple[Grams, Ints]:
    """Of texts of these lengths, one after the other; and where each n-gram is found first."""
    vocabulary: dict[str, int] = {}
    ids = np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words], np.int64)
    owner, end = np.repeat(np.arange(len(length)), length), np.repeat(np.cumsum(length), length)
    place, code = np.arange(len(ids)), ids
    owners, numbers, orders, firsts, known = list[Ints](), list[Ints](), list[Ints](), list[Ints](), 0
    for n in range(MAX_N):
        fits = place + n < end[place]
        place = place[fits]
        # The same n - 1 words and the same next one: the same number.
        _, found, code = np.unique(code[fits] * len(vocabulary) + ids[place + n], True, True)
        owners.append(owner[place])
        numbers.append(code + known)
        firsts.append(place[found])
        orders.append(np.full(len(found), n))
        known += len(found)
    key = np.concatenate(owners) * known + np.concatenate(numbers)
    entries, counts = np.unique(key, return_counts=True)
    divisor = max(1, known)
    grams = Grams(entries // divisor, entries % divisor, counts, np.concatenate(orders), length)
    return grams, np.concatenate(firsts)


def per_text(place: Ints, values: Ints | Floats, texts: int) -> Floats:
    """Sums of entries' values by text and order, T MAX_N."""
    return np.bincount(place, values, texts * MAX_N).astype(np.float64).reshape(texts, MAX_N)


def at_keys(keys: Ints, values: Ints | Floats, wanted: Ints) -> Floats:
    """Values by ascending keys, 0 where a wanted key is not there."""
    if not len(keys):
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: Floats = np.where(keys[place] == wanted, values[place], 0.0)
    return found
