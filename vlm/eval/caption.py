"""Scores of captions against references: CIDEr-D as COCO's code computes it, exact names, signs of collapse.

CIDEr-D: Vedantam et al. 2015 (arXiv 1411.5726), section 5 and the variant of the COCO caption server: n-grams of 1 to 4
words, weights tf x log(N / df) with the document frequencies of the evaluated references, clipped cosine, a Gaussian of
sigma 6 on the difference of lengths, times 10. Its habits surprise: a set of one sample scores 0 (log 1 = 0), a perfect
one-word caption scores 2.5 of 10 (it has no longer n-grams), and what all references share weighs nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlm.model.transcribe import commonest, one_line

MAX_N = 4
SIGMA = 6.0
SCALE = 10.0

# COCO removes these after tokenizing. Its list spells the brackets -LRB- in capitals but runs after lower-casing, so
# brackets stay as words, and so do "?!" and "!!"; numbers comparable with published ones need the same.
_REMOVED = frozenset(['"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPLIT = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
}
_SPELLING = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "--", "—": "--", "…": "...", "\ufe0f": "", "£": "#", "€": "$"}
)
_ABBREVIATIONS = "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|ave|blvd|mt|ft|co|inc|ltd|corp"
_TOKEN = re.compile(
    rf"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | </?[a-z][^\s<>]*>  # addresses, tags
    | -[lr][rsc]b-                                   # a bracket tokenized before
    | (?:[^\W\d_]\.){{2,}}(?!\w) | [^\W\d_]\.(?=\s+\w) | (?:{_ABBREVIATIONS})\.(?![.\w]) | no\.(?=\s*\d)
    | \w+?(?=n't(?!\w)) | n't(?!\w)                  # do n't
    | '(?:s|m|d|re|ve|ll)(?!\w) | (?<!\w)'\d\ds?(?!\w) | 'n'  # dog 's, '90s, rock 'n' roll
    | 't(?=(?:is|was)(?!\w)) | y'(?=all(?!\w))       # 't is, y' all
    | (?:o|d|l)'[^\W\d_]\w* | ma'am(?!\w)            # o'clock is one word
    | (?:(?<![\w)])[+-])?\.?\d+(?:[.,:/-]\d+)*(?!-?\w)  # 1,000  3.5  10:30  1/2  -5
    | c\+\+ | c\#(?!\w) | at&t(?!\w) | [#@][^\W\d]\w*
    | \w+(?:[-./‑]\w+)*                              # black-and-white, and/or
    | \.{{3,}} | -{{2,}} | [?!]+ | \S
    """,
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """Lower-cased words as Stanford's PTB tokenizer cuts English captions, without COCO's list of punctuation.

    Known differences: that tokenizer reads the next line before it decides on a single letter at the end ("letter x."),
    and drops emoji beyond the basic plane, which are kept here.
    """
    words: list[str] = []
    for token in _TOKEN.findall(text.translate(_SPELLING).lower()):
        words.extend(_SPLIT.get(token, (_BRACKETS.get(token, token),)))
    return [word for word in words if word not in _REMOVED and not word.startswith(("...", "--"))]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean CIDEr-D of the candidates, 0 to 10, each against its own references.

    ValueError: not one list of references per candidate, nothing to score, a candidate without references.
    """
    _check_pairs(candidates, references, "list of references")
    if not all(references):
        raise ValueError(f"cider_d: sample {[bool(r) for r in references].index(False)} has no reference")
    counted = [[_ngrams(text) for text in group] for group in references]
    frequency = Counter(gram for group in counted for gram in set().union(*group))
    weigh = _Weights(frequency, len(references))
    scores = []
    for candidate, group in zip(candidates, counted, strict=True):
        vector = weigh(_ngrams(candidate))
        scores.append(sum(_similarity(vector, weigh(reference)) for reference in group) / len(group))
    return SCALE * sum(scores) / len(scores)


def exact(candidates: Sequence[str], names: Sequence[str]) -> float:
    """Percent of candidates equal to their name, apart from case and white space."""
    _check_pairs(candidates, names, "name")
    hits = sum(_fold(candidate) == _fold(name) for candidate, name in zip(candidates, names, strict=True))
    return 100 * hits / len(candidates)


def identical(candidates: Sequence[str]) -> float:
    """Percent of candidates that are the most frequent caption: near 100, the model does not look at the image."""
    if not candidates:
        raise ValueError("identical: there is no caption to count")
    return 100 * commonest(candidates)


def mean_words(candidates: Sequence[str]) -> float:
    """Mean length of the candidates in words (`tokenize`)."""
    if not candidates:
        raise ValueError("mean_words: there is no caption to count")
    return sum(len(tokenize(candidate)) for candidate in candidates) / len(candidates)


Gram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """tf-idf of one text: weights by n-gram, Euclidean norm by n - 1, length in pairs of words as COCO counts it."""

    weights: dict[Gram, float]
    norms: list[float]
    length: int


class _Weights:
    """tf x (log N - log df), df of an n-gram that no reference holds taken as 1."""

    def __init__(self, frequency: Counter[Gram], samples: int) -> None:
        self.frequency, self.log_samples = frequency, math.log(samples)

    def __call__(self, grams: Counter[Gram]) -> _Vector:
        weights = {g: tf * (self.log_samples - math.log(max(1, self.frequency[g]))) for g, tf in grams.items()}
        squares = [0.0] * MAX_N
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight * weight
        length = sum(tf for gram, tf in grams.items() if len(gram) == 2)
        return _Vector(weights, [math.sqrt(square) for square in squares], length)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Mean over n of the cosine with the candidate's weights clipped to the reference's, damped by length."""
    dots = [0.0] * MAX_N
    for gram, weight in candidate.weights.items():
        other = reference.weights.get(gram, 0.0)
        dots[len(gram) - 1] += min(weight, other) * other
    norms = [a * b for a, b in zip(candidate.norms, reference.norms, strict=True)]
    cosine = sum(dot / norm for dot, norm in zip(dots, norms, strict=True) if norm) / MAX_N
    return cosine * math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))


def _ngrams(text: str) -> Counter[Gram]:
    words = tokenize(text)
    return Counter(tuple(words[at : at + n]) for n in range(1, MAX_N + 1) for at in range(len(words) - n + 1))


def _fold(text: str) -> str:
    return one_line(text.lower())


def _check_pairs(candidates: Sequence[str], others: Sequence[Iterable[str]], what: str) -> None:
    if len(candidates) != len(others) or not candidates:
        raise ValueError(
            f"{len(candidates)} captions, {len(others)} of: {what}; give one {what} per caption, at least one"
        )
