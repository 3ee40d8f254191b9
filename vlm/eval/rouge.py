"""ROUGE-L of captions as COCO's code computes it: Lin 2004, the longest common subsequence of words, beta 1.2.

Precision and recall are each the best over the references, so they may come from different ones.
"""

from collections.abc import Sequence

from vlm.eval.grams import Words

BETA = 1.2


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """0 to 1, against at least one reference. As in COCO's code a text without words has one, the empty one."""
    words = candidate or [""]
    others = [reference or [""] for reference in references]
    places = _places(words)
    common = [common_words(places, len(words), other) for other in others]
    precision = max(common) / len(words)
    recall = max(length / len(other) for length, other in zip(common, others, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_words(places: dict[str, int], length: int, other: Words) -> int:
    """Length of the longest common subsequence of a text (its words' places as bits) and another one.

    Hyyrö 2004: a row of the table of lengths is one integer, in which a cleared bit is where the length grows.
    """
    full = (1 << length) - 1
    row = full
    for word in other:
        hit = row & places.get(word, 0)
        row = (row + hit) | (row - hit)
    return length - (row & full).bit_count()


def _places(words: Words) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    return places
