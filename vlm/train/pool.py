"""A contrastive loss over all forward passes of a step, with the gradient of the whole and the memory of one pass.

Gradient caching (Gao et al. 2021, arXiv 2101.06983): the vectors of every pass are made without gradients, the loss of
all of them together gives each vector its slope, and a second pass pulls its own vectors along that slope.

Letters: B images, Q vectors per image, M texts, E embedding width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.data.batch import Batch, positives
from vlm.model.vlm import need
from vlm.nn.backend import autocast, fast_float32
from vlm.train.task import Itc, Pull, Task, Views


class Pooled(NamedTuple):
    """What the first passes found."""

    loss: float
    pulls: list[Pull]  # for each pass
    seeds: list[int]  # of each pass, so that the second one draws the same dropout


def pooled(task: Task, group: Sequence[Batch], precision: torch.dtype) -> Pooled | None:
    """First passes over a step's micro-batches, and the gradient of what the contrastive head learns by itself.

    None where no contrastive loss asks for it, or one pass is the whole step.
    """
    itc = next((o for o in task.objectives if isinstance(o, Itc) and o.pooled), None)
    if itc is None or len(group) == 1:
        return None
    seeds: list[int] = torch.randint(2**62, (len(group),)).tolist()
    pairs = [_vectors(task, batch, seed, precision) for batch, seed in zip(group, seeds, strict=True)]
    image, text = (torch.cat(part).requires_grad_() for part in zip(*pairs, strict=True))
    logits = need(task.model.contrast, "contrastive head")(image, text)
    loss = itc.loss(logits, positives(group).to(logits.device))
    (itc.weight * loss).backward()
    assert image.grad is not None and text.grad is not None
    sizes = [[len(part) for part in pair] for pair in zip(*pairs, strict=True)]
    pulls = [Pull(*slopes) for slopes in zip(image.grad.split(sizes[0]), text.grad.split(sizes[1]), strict=True)]
    return Pooled(float(loss.detach()), pulls, seeds)


@torch.no_grad()
def _vectors(
    task: Task, batch: Batch, seed: int, precision: torch.dtype
) -> tuple[Float[Tensor, "B Q E"], Float[Tensor, "M E"]]:
    torch.manual_seed(seed)
    with fast_float32(), autocast(batch.owner.device, precision):
        views = Views(task.model, batch)
        return views.image, views.text
