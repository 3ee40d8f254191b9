"""How many scores of a tile reach their bars: counted in fp32, or screened in bf16 with only the close ones in fp32.

Letters: n images and m texts of a tile, Q vectors per image, E their width, P pairs.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Counts = tuple[Float[Tensor, "m"], Float[Tensor, "n"]]
MOST = 0.02  # share of pairs that may reach their bars, up to which a screened tile is the cheaper one
SPARE = 2  # tiles that may turn out to have more, beside every eighth


@dataclass(frozen=True)
class Tile:
    """Images by texts, and what a score needs to count, for each text and for each image."""

    image: Float[Tensor, "n Q E"]
    text: Float[Tensor, "m E"]
    text_bar: Float[Tensor, "m"]
    image_bar: Float[Tensor, "n"]
    own: tuple[slice, Bool[Tensor, "k m"]] | None = None  # rows in which there are pairs that never count, and which

    def without_own(self, scores: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Changes them in place."""
        if self.own is not None:
            scores[self.own[0]].masked_fill_(self.own[1], -torch.inf)
        return scores

    def is_own(self, i: Int[Tensor, "P"], j: Int[Tensor, "P"]) -> Bool[Tensor, "P"]:
        """Of single pairs."""
        if self.own is None:
            return torch.zeros_like(i, dtype=torch.bool)
        rows, mask = self.own
        is_own: Tensor = (i >= rows.start) & (i < rows.stop) & mask[(i - rows.start).clamp(0, len(mask) - 1), j]
        return is_own


def best_of(flat: Float[Tensor, "nQ m"], queries: int) -> Float[Tensor, "n m"]:
    """Max over Q, images as rows: the reduction then runs along contiguous memory."""
    return flat if queries == 1 else flat.view(-1, queries, flat.shape[1]).amax(1)


def reached(tile: Tile) -> Counts:
    """For each text how many images reach its bar, for each image how many texts reach its own."""
    scores = tile.without_own(best_of(tile.image.flatten(0, 1) @ tile.text.T, tile.image.shape[1]))
    # Comparing into floats and adding them takes a quarter of the time that booleans take.
    texts = torch.ge(scores, tile.text_bar, out=torch.empty_like(scores)).sum(0)
    return texts, scores.ge_(tile.image_bar[:, None]).sum(1)


@dataclass(frozen=True)
class Extent:
    """The largest norm of some vectors, and of what rounding them to bf16 takes away."""

    norm: float
    lost: float

    @classmethod
    def of(cls, vectors: Float[Tensor, "*n E"]) -> "Extent":
        """NaN or infinite if a vector is."""
        lost = vectors - vectors.bfloat16().to(vectors.dtype)
        return cls(*(float(torch.linalg.vector_norm(each, dim=-1).max()) for each in (vectors, lost)))


class Screen:
    """What `reached` counts, with a product in bf16: only scores that may reach a bar are computed in fp32.

    A bf16 score is off by at most |a - a'| |b| + |a'| |b - b'| (Cauchy-Schwarz; a', b': rounded) and what adding in
    fp32 loses. Rounding the sum to bf16 keeps the order, so bars that are lowered by that much are rounded alike.
    """

    def __init__(self, image: Extent, text: Extent, width: int) -> None:
        """`width`: E, numbers that a score adds up."""
        adding = 2 * (width + 16) * torch.finfo(torch.float32).eps
        norms = (image.norm + image.lost) * (text.norm + text.lost)
        self.off = image.lost * text.norm + (image.norm + image.lost) * text.lost + adding * norms
        self._memory: dict[str, Tensor] = {}
        self._tried = self._missed = 0

    def __call__(self, tile: Tile) -> Counts | None:
        """None: too many may reach their bars, here or in tiles before."""
        if self._missed > SPARE + self._tried // 8:
            return None
        self._tried += 1
        i, j = self._candidates(self._rough(tile), tile)
        if len(i) > MOST * len(tile.image) * len(tile.text):
            self._missed += 1
            return None
        exact = scores_of(tile.image, tile.text, i, j).masked_fill_(tile.is_own(i, j), -torch.inf)
        texts = torch.zeros_like(tile.text_bar).index_add_(0, j, (exact >= tile.text_bar[j]).float())
        images = torch.zeros_like(tile.image_bar).index_add_(0, i, (exact >= tile.image_bar[i]).float())
        return texts, images

    def _rough(self, tile: Tile) -> Float[Tensor, "n m"]:
        image = self._room("image", tile.image.flatten(0, 1).shape).copy_(tile.image.flatten(0, 1))
        text = self._room("text", tile.text.shape).copy_(tile.text)
        flat = torch.mm(image, text.T, out=self._room("scores", (len(image), len(text))))
        return best_of(flat, tile.image.shape[1])

    def _candidates(self, rough: Float[Tensor, "n m"], tile: Tile) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
        """Rows, ascending, and columns. As integers positive bf16 numbers keep their order; NumPy compares these."""
        text_low, image_low = (_as_integers(bar - self.off) for bar in (tile.text_bar, tile.image_bar[:, None]))
        low = np.minimum(text_low, image_low, out=_integers(self._room("low", rough.shape)))
        found = np.flatnonzero(np.greater_equal(_integers(rough), low))
        i, j = np.divmod(found, len(tile.text))
        return torch.from_numpy(i), torch.from_numpy(j)

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory that is used again: taking fresh pages for a tile costs as much as comparing it."""
        size = math.prod(shape)
        if (kept := self._memory.get(name)) is None or len(kept) < size:
            kept = self._memory[name] = torch.empty(size, dtype=torch.bfloat16)
        return kept[:size].view(shape)


def _integers(numbers: Tensor) -> np.ndarray:
    return numbers.view(torch.int16).numpy()


def _as_integers(bar: Tensor) -> np.ndarray:
    """What is no positive number becomes the least: all scores reach it, then."""
    return _integers(bar.bfloat16().masked_fill(bar <= 0, -0.0))


def scores_of(
    image: Float[Tensor, "n Q E"], text: Float[Tensor, "m E"], i: Int[Tensor, "P"], j: Int[Tensor, "P"]
) -> Float[Tensor, "P"]:
    """Max over Q of image[i] . text[j]; `i` ascends. Nothing is copied for a pair, so it takes a tenth of the time."""
    rows = torch.zeros(len(image) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(i, minlength=len(image)), 0, out=rows[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        size = len(image), len(text)
        wanted = torch.sparse_csr_tensor(rows, j, torch.zeros(len(j)), size, check_invariants=False)
    best = torch.full((len(i),), -torch.inf)
    for one in image.unbind(1):
        torch.maximum(best, torch.sparse.sampled_addmm(wanted, one, text.T, beta=0).values(), out=best)
    return best
