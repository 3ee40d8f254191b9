"""Validation: the mean losses over a data set, and whether the text is written from the picture at all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from vlm.data.batch import Batch
from vlm.nn.backend import autocast, fast_float32
from vlm.train.alike import Sayings, Speech
from vlm.train.parallel import Passes
from vlm.train.task import Lm, Task
from vlm.world import World

Once = Callable[[int, int], Iterator[Batch]]  # the validation data: the batches of one of so many processes
GAP = "val/vision_gap"
GAP_BATCHES = 16  # enough to tell a gap from none


def validate(passes: Passes, once: Once, speech: Speech | None = None) -> dict[str, float]:
    """Mean losses over a data set, each sample once; for texts written to pictures, the vision gap too.

    The vision gap is the LM loss with the pictures of a batch exchanged, minus that with the true ones: nats that a
    token costs more when the picture is wrong. Zero: the model writes without looking. With `speech` a few pictures are
    captioned too: see `Sayings`.
    """
    task, world = passes.task, passes.world
    writer = next((o for o in task.objectives if isinstance(o, Lm)), None)
    names = [f"val/loss_{o.name}" for o in task.objectives] + ([] if writer is None else [GAP])
    sums, shares = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    sayings = Sayings(passes, speech)
    task.eval()
    with torch.no_grad(), fast_float32():
        for number, batch, counts in _together(once, world):
            batch = batch.to(world.device)
            torch.manual_seed(number)  # hard negatives
            with autocast(world.device, passes.precision):
                losses = task(batch).each
                # Over sharded weights all processes make the same passes, also one whose result does not count.
                early = number - world.rank < GAP_BATCHES
                wrong = _exchanged_loss(task, writer, batch, number) if early and writer is not None else None
            found = {f"val/loss_{o.name}": (losses[o.name], o.share(batch)) for o in task.objectives}
            if wrong is not None and writer is not None and number < GAP_BATCHES and batch.size > 1:
                found[GAP] = (wrong - losses[writer.name], writer.share(batch))
            for name, (value, share) in found.items():
                sums[name] += counts * share * float(value)
                shares[name] += counts * share
            sayings.hear(batch if counts else None)
    passes.forget()
    totals, weights = world.sum(list(sums.values())), world.sum(list(shares.values()))
    means = {n: total / max(1.0, w) for n, total, w in zip(names, totals, weights, strict=True) if w or n != GAP}
    return means | sayings.shares()


def _together(once: Once, world: World) -> Iterator[tuple[int, Batch, bool]]:
    """Number, batch, and whether it counts.

    All processes make equally many passes: one that has no batch left repeats one, which does not count.
    """
    own = once(world.rank, world.size)
    spare: Batch | None = None
    for number in count(world.rank, world.size):
        batch = next(own, None)
        if not world.most(int(batch is not None)):
            return
        spare = batch or spare or next(once(0, 1))
        yield number, spare, batch is not None


def _exchanged_loss(task: Task, writer: Lm, batch: Batch, seed: int) -> Tensor | None:
    """None for text alone, where there is nothing to exchange."""
    if batch.images is None:
        return None
    index = derangement(batch.size, seed)
    loss: Tensor = task.alone(writer, replace(batch, images=batch.images[index]))
    return loss


def derangement(count: int, seed: int) -> Sequence[int]:
    """A random order in which nothing keeps its place: one cycle through all."""
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    places = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [places[i] for i in range(count)]


def blind(gap: float, loss: float) -> bool:
    """Whether a vision gap is as good as none, beside the loss that it is a difference of."""
    return gap < 0.01 * max(1.0, loss)
