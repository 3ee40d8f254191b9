"""What captions are like apart from references: exact names, lengths, repetition, vocabulary, signs of collapse."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vlm.eval.words import tokenize

REPEATED = (1, 2, 3, 4)  # orders of n-grams


def exact(candidates: Sequence[str], names: Sequence[str]) -> float:
    """Percent of candidates equal to their name, apart from case and white space."""
    _check_pairs(candidates, names, "name")
    return 100 * sum(map(same, candidates, names)) / len(candidates)


def same(text: str, other: str) -> bool:
    """Whether two texts are equal apart from case and white space."""
    return fold(text) == fold(other)


def fold(text: str) -> str:
    """In small letters, runs of white space as one space and none at either end."""
    return " ".join(text.lower().split())


def identical(candidates: Sequence[str]) -> float:
    """Percent of candidates that are the most frequent caption: near 100, the model does not look at the image."""
    if not candidates:
        raise ValueError("identical: there is no caption to count")
    return 100 * Counter(map(fold, candidates)).most_common(1)[0][1] / len(candidates)


def mean_words(candidates: Sequence[str]) -> float:
    """Mean length of the candidates in words (`tokenize`)."""
    if not candidates:
        raise ValueError("mean_words: there is no caption to count")
    return sum(len(tokenize(candidate)) for candidate in candidates) / len(candidates)


def repetition(words: Sequence[str], n: int) -> float:
    """The share of a caption's n-grams, 0 to 1, that it has had before; 0 where it has none."""
    grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def statistics(tokens: Sequence[Sequence[str]], cut: Sequence[bool] | None = None) -> dict[str, Any]:
    """Of captions in words: lengths, repetition, words used. `cut`: which of them ended at the limit, where known.

    `lengths`: how many captions have 0, 1, 2 … words. `repeated`: percent of n-grams that a caption has had before,
    mean over captions. `distinct`: different captions in percent. ValueError: no caption.
    """
    if not tokens:
        raise ValueError("statistics: there is no caption to count")
    lengths = np.array([len(words) for words in tokens])
    vocabulary = Counter(word for words in tokens for word in words)
    most = Counter(map(tuple, tokens)).most_common()
    return {
        "words": {"mean": float(lengths.mean()), "min": int(lengths.min()), "max": int(lengths.max())},
        "lengths": np.bincount(lengths).tolist(),
        "repeated": {str(n): 100 * sum(repetition(words, n) for words in tokens) / len(tokens) for n in REPEATED},
        "vocabulary": len(vocabulary),
        "identical": 100 * most[0][1] / len(tokens),
        "distinct": 100 * len(most) / len(tokens),
        "empty": int((lengths == 0).sum()),
        "at_limit": None if cut is None else 100 * sum(cut) / len(cut),
    }


def _check_pairs(candidates: Sequence[str], others: Sequence[Iterable[str]], what: str) -> None:
    if len(candidates) != len(others) or not candidates:
        raise ValueError(
            f"{len(candidates)} captions, {len(others)} of: {what}; give one {what} per caption, at least one"
        )
