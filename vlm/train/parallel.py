"""Forward and backward passes of a step in one process, in replicas (DDP) or over sharded weights (FSDP2).

Gradients are summed over the processes, not averaged: losses come weighted by their share of the whole step.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from vlm.data.batch import Batch
from vlm.model.vision import ImageEncoder
from vlm.nn.backend import autocast, fast_float32
from vlm.nn.block import Block, Stack
from vlm.train.aside import aside
from vlm.train.task import Losses, Pulling, Task
from vlm.world import World

Kind = Literal["ddp", "fsdp", "hsdp"]


class Passes:
    """One process: a forward and a backward pass, and nothing to exchange."""

    sharded = False

    def __init__(self, task: Task, precision: torch.dtype, world: World | None = None) -> None:
        """`precision`: of products."""
        self.task, self.precision = task, precision
        self.world = World(next(task.parameters()).device) if world is None else world

    def __call__(self, batch: Batch, shares: dict[str, float], pull: Pulling | None, last: bool) -> Losses:
        """Adds to the gradients; after the `last` pass of a step they are those of all processes."""
        with fast_float32():
            with autocast(batch.owner.device, self.precision):
                losses = self._forward(batch, shares, pull)
            losses.total.backward()
        return losses

    def forget(self) -> None:
        """After passes without a backward pass: what was put together of the weights is let go, for they may change."""

    def _forward(self, batch: Batch, shares: dict[str, float], pull: Pulling | None) -> Losses:
        found: Losses = self.task(batch, shares, pull)
        return found


class Replicas(Passes):
    """The whole model in every process, gradients exchanged while the last backward pass runs (DDP)."""

    def __init__(self, task: Task, precision: torch.dtype, world: World, first: Batch) -> None:
        """All processes have equal weights already. `first`: a batch to see by whether a pass uses all parameters."""
        super().__init__(task, precision, world)
        some = bool(world.most(int(_some_idle(task, first.to(world.device), precision))))
        self._ddp = DistributedDataParallel(task, find_unused_parameters=some, gradient_as_bucket_view=True, **_BUFFERS)
        self._ddp.register_comm_hook(None, _sum)

    def __call__(self, batch: Batch, shares: dict[str, float], pull: Pulling | None, last: bool) -> Losses:
        """As of `Passes`."""
        with nullcontext() if last else self._ddp.no_sync():
            return super().__call__(batch, shares, pull, last)

    def _forward(self, batch: Batch, shares: dict[str, float], pull: Pulling | None) -> Losses:
        found: Losses = self._ddp(batch, shares, pull)
        return found


# No exchange of buffers in every pass: those that change, such as the experts' biases, change alike everywhere.
_NEW = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW else "broadcast_buffers": False}


def _some_idle(task: Task, batch: Batch, precision: torch.dtype) -> bool:
    """Whether a pass leaves parameters out that learn. Kinds of tokens that a batch lacks do not: see `PerRoute`."""
    with aside(task), autocast(batch.owner.device, precision):
        task(batch).total.backward()
    idle = any(parameter.grad is None for parameter in task.parameters() if parameter.requires_grad)
    task.zero_grad(set_to_none=True)
    return idle


def _sum(state: None, bucket: GradBucket) -> Future[Tensor]:
    work = distributed.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    total: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return total


class Shards(Passes):
    """Every process keeps a part of all weights, gradients and optimizer memory (FSDP2); made before the optimizer.

    "fsdp": one part for each process. "hsdp": parts within a machine, the same again on every other machine.
    """

    sharded = True

    def __init__(self, task: Task, precision: torch.dtype, world: World, kind: Kind) -> None:
        """Replaces the parameters of `task`. All processes have equal weights already. Errors: uneven machines."""
        super().__init__(task, precision, world)
        for parameter in task.parameters():  # FSDP takes no other layout, such as that of convolutions on CPUs
            parameter.data = parameter.data.contiguous()
        sizes = _mesh(world, kind)
        mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=("replicas", "shards")[-len(sizes) :])
        for layer in layers(task.model):
            fully_shard(layer, mesh=mesh)
        self._root: FSDPModule = fully_shard(task, mesh=mesh)
        for method in ("vectors", "alone"):
            register_fsdp_forward_method(task, method)
        for module in task.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it adds up

    def __call__(self, batch: Batch, shares: dict[str, float], pull: Pulling | None, last: bool) -> Losses:
        """As of `Passes`."""
        # Parts of gradients are summed up in every pass, for whole ones would take the room that the parts save;
        # between machines (hsdp) once a step is enough.
        self._root.set_requires_all_reduce(last)
        return super().__call__(batch, shares, pull, last)

    def forget(self) -> None:
        """As of `Passes`: else the average's weights, used for validation, would be those of the next step."""
        self._root.reshard()


def _mesh(world: World, kind: Kind) -> tuple[int, ...]:
    if kind == "fsdp":
        return (world.size,)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    if world.size % local:
        raise ValueError(f"train.parallel=hsdp: {world.size} processes are no multiple of this machine's {local}")
    return (world.size // local, local)


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model, such as a Transformer's blocks, outermost first.

    Blocks with cross-attention are left out: their keys and values of the image are made before they run.
    """
    for child in model.children():
        alike = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        if len(alike) > 1 and len({type(part) for part in alike}) == 1 and any(True for _ in child.parameters()):
            yield from (part for part in alike if not (isinstance(part, Block) and part.cross is not None))
        else:
            yield from layers(child)


def recompute(model: nn.Module) -> None:
    """Activation checkpointing: blocks that learn keep only their input, and run again in the backward pass."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = True
        elif isinstance(module, ImageEncoder) and any(p.requires_grad for p in module.parameters()):
            module.recompute()


def compile_layers(model: nn.Module) -> None:
    """torch.compile for each repeated part by itself: compiled once for all of them, and no name changes."""
    for layer in layers(model):
        layer.compile()
