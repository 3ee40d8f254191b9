"""BLEU-1 to BLEU-4 of captions as COCO's code computes them.

Papineni et al. 2002: n-grams clipped by the most that one reference has, the geometric mean of the precisions, a
penalty for captions shorter than the closest reference (the shorter of two that are as close).
"""

from dataclasses import dataclass

import numpy as np

from vlm.eval.grams import MAX_N, Counted, Floats, Ints, at_keys, per_text

_SMALL, _TINY = 1e-9, 1e-15  # COCO's, so that an order without n-grams scores 0


@dataclass(frozen=True)
class Bleu:
    """Four scores, 0 to 1: of all captions together, which is what is published, and of each one alone."""

    together: Floats  # 4
    each: Floats  # images 4


def bleu(counted: Counted) -> Bleu:
    """BLEU of each order up to 4."""
    candidates, images = counted.candidates, counted.images
    correct = per_text(candidates.place, np.minimum(candidates.count, _most(counted)), images)
    guessed = np.maximum(0, candidates.length[:, None] - np.arange(MAX_N))
    lengths = np.stack([candidates.length, _closest(counted)], 1)
    (together,) = _score(correct.sum(0)[None], guessed.sum(0)[None], lengths.sum(0)[None])
    return Bleu(together, _score(correct, guessed, lengths))


def _most(counted: Counted) -> Floats:
    """How often the reference that has it most often has each n-gram of the candidates."""
    key = counted.key(counted.references)
    order = np.argsort(key, kind="stable")
    held, start = np.unique(key[order], return_index=True)
    most = np.maximum.reduceat(counted.references.count[order], start) if len(held) else held
    return at_keys(held, most, counted.key(counted.candidates))


def _closest(counted: Counted) -> Ints:
    """Words of each image's reference that is closest in length, the shorter of two that are as close."""
    length, images = counted.references.length, counted.image
    order = np.lexsort((length, abs(length - counted.candidates.length[images]), images))
    _, first = np.unique(images[order], return_index=True)
    closest: Ints = length[order][first]
    return closest


def _score(correct: Floats, guessed: Ints, lengths: Ints) -> Floats:
    """Of rows: clipped matches R 4, n-grams R 4, words of captions and of the closest references R 2."""
    mean = np.cumprod((correct + _TINY) / (guessed + _SMALL), 1) ** (1 / np.arange(1, MAX_N + 1))
    ratio = (lengths[:, 0] + _TINY) / (lengths[:, 1] + _SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    score: Floats = mean * brevity[:, None]
    return score
