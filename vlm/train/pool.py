"""A contrastive loss over all forward passes of a step, in all processes, with the gradient of the whole.

Gradient caching (Gao et al. 2021, arXiv 2101.06983): the vectors of every pass are made without gradients, the loss of
all of them together gives each vector its slope, and a second pass pulls its own vectors along that slope. A process
with one pass needs no second one. Each process works out the rows of its own images and the columns of its own texts.

Letters: B images, Q vectors per image, M texts, E embedding width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.data.batch import Batch
from vlm.data.marks import Marks, join, marks, unpack
from vlm.loss.contrastive import contrast_logits, one_way
from vlm.nn.backend import autocast, fast_float32
from vlm.train.parallel import Passes
from vlm.train.task import Itc, Pull, Pulling, Vectors
from vlm.world import World


class Pooled(NamedTuple):
    """What the first passes found, and each pass's way to the gradient."""

    loss: Callable[[], float]  # this process's part of it, once the slopes are known
    pulls: Sequence[Pulling]


def pooled(passes: Passes, group: Sequence[Batch], seeds: Sequence[int]) -> Pooled | None:
    """The contrastive loss over a step of which `group` is this process's part; `seeds` of each of its passes.

    None where no contrastive loss asks for it, or one pass is the whole step.
    """
    itc = next((o for o in passes.task.objectives if isinstance(o, Itc) and o.pooled), None)
    if itc is None or len(group) * passes.world.size == 1:
        return None
    found = _Slopes(itc, marks(group), passes.world)
    if len(group) == 1:
        return Pooled(lambda: found.loss, [lambda vectors: found([vectors])[0]])
    pulls = found([_vectors(passes, batch, seed) for batch, seed in zip(group, seeds, strict=True)])
    return Pooled(lambda: found.loss, pulls)


def _vectors(passes: Passes, batch: Batch, seed: int) -> Vectors:
    torch.manual_seed(seed)
    with fast_float32(), autocast(batch.owner.device, passes.precision):
        return passes.task.vectors(batch)


class _Slopes:
    """From the vectors of a process's passes to the slope of each; every process gives its own."""

    def __init__(self, itc: Itc, own: Marks, world: World) -> None:
        self.itc, self.own, self.world = itc, own, world
        self.loss = 0.0

    def __call__(self, passes: Sequence[Vectors]) -> list[Pull]:
        world, scale = self.world, passes[0].log_scale
        images, texts = (world.gather(torch.cat(parts)) for parts in zip(*(v[:2] for v in passes), strict=True))
        every = join(unpack(row) for row in world.gather(self.own.pack().to(scale.device)))
        leaves = [part.detach().requires_grad_() for part in (torch.cat(images), torch.cat(texts), scale)]
        here = [_place(parts, world.rank) for parts in (images, texts)]
        with torch.enable_grad(), torch.autocast(scale.device.type, enabled=False):
            loss = self._loss(leaves, here, every)
            slopes = torch.autograd.grad(self.itc.weight * loss, leaves)
        self.loss = float(loss.detach())
        image, text = (world.add(slope)[place] for slope, place in zip(slopes, here, strict=False))
        sizes = [[len(part) for part in parts] for parts in zip(*(v[:2] for v in passes), strict=True)]
        scales = [slopes[2], *[torch.zeros_like(scale)] * (len(passes) - 1)]  # what the temperature learns counts once
        return [Pull(*parts) for parts in zip(image.split(sizes[0]), text.split(sizes[1]), scales, strict=True)]

    def _loss(self, leaves: Sequence[Tensor], here: Sequence[slice], every: Marks) -> Float[Tensor, ""]:
        """This process's part: its images among all texts, and its texts among all images."""
        image, text, scale = leaves
        rows = contrast_logits(image[here[0]], text, scale)
        columns = (rows if self.world.size == 1 else contrast_logits(image, text[here[1]], scale)).T
        smoothing = self.itc.label_smoothing
        by_image = one_way(rows, self.own.fit(every).to(rows.device), smoothing) * (len(rows) / len(image))
        by_text = one_way(columns, every.fit(self.own).T.to(rows.device), smoothing) * (len(columns) / len(text))
        return (by_image + by_text) / 2


def _place(parts: Sequence[Tensor], rank: int) -> slice:
    start = sum(len(part) for part in parts[:rank])
    return slice(start, start + len(parts[rank]))
