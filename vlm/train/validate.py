"""Validation: the mean losses over a data set, and whether the text is written from the picture at all."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.nn.backend import autocast, fast_float32
from vlm.train.task import Lm, Task, Views

Once = Callable[[], Iterator[Batch]]  # the validation data, from its beginning
GAP = "val/vision_gap"
GAP_BATCHES = 16  # enough to tell a gap from none


def validate(task: Task, once: Once, precision: torch.dtype) -> dict[str, float]:
    """Mean losses over a data set, each sample once; for texts written to pictures, the vision gap too.

    The vision gap is the LM loss with the pictures of a batch exchanged, minus that with the true ones: nats that a
    token costs more when the picture is wrong. Zero: the model writes without looking.
    """
    device = next(task.parameters()).device
    sums: dict[str, float] = defaultdict(float)
    shares: dict[str, float] = defaultdict(float)
    writer = next((o for o in task.objectives if isinstance(o, Lm)), None)
    task.eval()
    torch.manual_seed(0)
    with torch.no_grad(), fast_float32():
        for i, batch in enumerate(once()):
            batch = batch.to(device)
            with autocast(device, precision):
                losses = task(batch).each
                wrong = _exchanged_loss(task, writer, batch, i) if writer is not None and i < GAP_BATCHES else None
            found = {f"val/loss_{o.name}": (losses[o.name], o.share(batch)) for o in task.objectives}
            if wrong is not None and writer is not None:
                found[GAP] = (wrong - losses[writer.name], writer.share(batch))
            for name, (value, share) in found.items():
                sums[name] += share * float(value)
                shares[name] += share
    return {name: total / max(1.0, shares[name]) for name, total in sums.items()}


def _exchanged_loss(task: Task, writer: Lm, batch: Batch, seed: int) -> Tensor | None:
    """None where no picture can be exchanged: text alone, or a batch of one."""
    if batch.images is None or batch.size < 2:
        return None
    index = derangement(batch.size, seed)
    loss: Tensor = writer(Views(task.model, replace(batch, images=batch.images[index])))
    return loss


def derangement(count: int, seed: int) -> Sequence[int]:
    """A random order in which nothing keeps its place: one cycle through all."""
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    places = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [places[i] for i in range(count)]


def blind(gap: float, loss: float) -> bool:
    """Whether a vision gap is as good as none, beside the loss that it is a difference of."""
    return gap < 0.01 * max(1.0, loss)
