"""CIDEr-D of captions as COCO's code computes it.

Vedantam et al. 2015 (arXiv 1411.5726), section 5 and the variant of the COCO caption server: n-grams of 1 to 4 words,
weights tf x log(N / df) with the document frequencies of the evaluated references, clipped cosine, a Gaussian of sigma
6 on the difference of lengths, times 10. Its habits surprise: a set of one image scores 0 (log 1 = 0), a perfect
one-word caption scores 2.5 of 10 (it has no longer n-grams), and what all references share weighs nothing. With fixed
document frequencies, of a larger set, a few images or one can be scored.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.eval.grams import MAX_N, Counted, Floats, Ints, Words, at_keys, count, per_text
from vlm.eval.words import tokenize_all

SIGMA = 6.0
SCALE = 10.0
ONE_IMAGE = (
    "CIDEr-D weighs words by how few of the images' references hold them, so with one image every weight is log 1 = 0 "
    "and the score 0 whatever the caption; give document frequencies of a larger set, or look at BLEU and ROUGE-L"
)


@dataclass(frozen=True)
class Frequencies:
    """In how many images' references an n-gram occurs, of a set that need not be the one that is scored."""

    counts: Counter[tuple[str, ...]]
    images: int


def frequencies(references: Sequence[Sequence[Words]]) -> Frequencies:
    """Document frequencies of a set. ValueError: no image, or one alone, whose weights would all be 0."""
    if len(references) < 2:
        raise ValueError(f"document frequencies of {len(references)} image: at least 2 are needed")
    held = (
        {tuple(words[at : at + n]) for words in group for n in range(1, MAX_N + 1) for at in range(len(words) - n + 1)}
        for group in references
    )
    return Frequencies(Counter(gram for grams in held for gram in grams), len(references))


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean CIDEr-D of captions, 0 to 10, each against its own references.

    ValueError: not one list of references per candidate, nothing to score, a candidate without references.
    """
    tokens = iter(tokenize_all([text for group in references for text in group]))
    groups = [[next(tokens) for _ in group] for group in references]
    return float(each_cider_d(count(tokenize_all(candidates), groups)).mean())


def each_cider_d(counted: Counted, fixed: Frequencies | None = None) -> Floats:
    """CIDEr-D of each image's candidate. `fixed`: document frequencies in place of the references' own."""
    candidates, references = counted.candidates, counted.references
    weight = _weights(counted, fixed)
    own, other = candidates.count * weight[candidates.gram], references.count * weight[references.gram]
    given = at_keys(counted.key(candidates), own, counted.key(references))
    dots = per_text(references.place, np.minimum(given, other) * other, len(references.length))
    own_norm = np.sqrt(per_text(candidates.place, own**2, counted.images))[counted.image]
    norms = own_norm * np.sqrt(per_text(references.place, other**2, len(references.length)))
    cosine = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).mean(1)
    # Lengths are those in pairs of words.
    apart = np.maximum(0, candidates.length - 1)[counted.image] - np.maximum(0, references.length - 1)
    similar = cosine * np.exp(-(apart**2) / (2 * SIGMA**2))
    mean: Floats = np.bincount(counted.image, similar, counted.images) / np.bincount(counted.image)
    return SCALE * mean


def _weights(counted: Counted, fixed: Frequencies | None) -> Floats:
    """log N - log df of each n-gram, a df of 0 taken as 1."""
    if fixed is None:
        kinds = len(counted.references.order)
        held: Ints = np.unique(counted.key(counted.references)) % max(1, kinds)
        found, images = np.bincount(held, minlength=kinds), counted.images
    else:
        found, images = np.array([fixed.counts[gram] for gram in counted.grams], np.int64), fixed.images
    weights: Floats = np.log(images) - np.log(np.maximum(1, found))
    return weights
