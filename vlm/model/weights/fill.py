"""Published weights into a module, a few tensors at a time, so that little more than the model is ever in memory."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from vlm.model.weights.conversion import Stacked
from vlm.model.weights.files import differences, refuse, shape
from vlm.model.weights.hollow import Hollow
from vlm.model.weights.rows import Unit
from vlm.model.weights.source import Weights
from vlm.model.weights.table import Table

MAKER = "init_non_persistent_buffers"  # timm's modules compute by it the buffers that no file holds


@dataclass(frozen=True)
class Target:
    """Type and device of our tensors; `keep`: patterns of whole names whose type stays as published."""

    dtype: torch.dtype | None
    device: torch.device
    keep: Sequence[str]

    def type_of(self, name: str, like: Tensor) -> torch.dtype:
        """Of our tensor of that name."""
        kept = self.dtype is None or any(re.fullmatch(pattern, name) for pattern in self.keep)
        return like.dtype if self.dtype is None or kept or not like.is_floating_point() else self.dtype

    def empty(self, name: str, like: Tensor) -> Tensor:
        """Memory for our tensor of that name, dense."""
        return torch.empty(like.shape, dtype=self.type_of(name, like), device=self.device)

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as ours: itself where it is already, alone and dense in its memory."""
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        if alone and tensor.device == self.device and tensor.dtype == self.type_of(name, tensor):
            return tensor
        return self.empty(name, tensor).copy_(tensor)


class Slots:
    """Where a module holds its tensors; those with several names are one."""

    def __init__(self, module: nn.Module) -> None:
        """Of the state_dict."""
        self.module = module
        self.tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
        self._names = dict[int, list[str]]()
        for name, tensor in self.tensors.items():
            self._names.setdefault(id(tensor), []).append(name)
        self._filled = dict[int, Tensor]()

    def tied(self, name: str) -> list[str]:
        """All names of a tensor."""
        return self._names[id(self.tensors[name])]

    def put(self, name: str, tensor: Tensor) -> None:
        """Under all its names. ValueError: it was put there already, with other numbers."""
        old = self.tensors[name]
        before = self._filled.setdefault(id(old), tensor)
        if before is not tensor and not torch.equal(before, tensor):
            raise ValueError(f"{' and '.join(self.tied(name))} are one tensor here, but two different ones in the file")
        new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        for alias in self.tied(name) if before is tensor else ():
            assign(self.module, alias, new)


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter or buffer."""
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, tensor)


class Source(NamedTuple):
    """Published weights, and the table that makes some or all of our tensors of them."""

    table: Table
    weights: Weights


def fill(
    module: nn.Module,
    table: Table,
    weights: Weights,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep: Sequence[str] = (),
) -> None:
    """As `fill_from`, from one source."""
    fill_from(module, [Source(table, weights)], dtype, device, keep)


def fill_from(
    module: nn.Module,
    sources: Sequence[Source],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep: Sequence[str] = (),
) -> None:
    """Gives a module that was built on the meta device (`hollow`) its published weights, which are all it takes up.

    `dtype`: of floating tensors (None: as published), except of ours whose name a pattern in `keep` matches whole.
    Buffers that are in no file go to the device, or are made there by their module (`init_non_persistent_buffers`).

    ValueError, before any weights are read: all names, shapes, types that differ; a pattern in `keep` that matches
    nothing; a buffer on the meta device that nothing makes. While they are read: a file that ends early, tied tensors
    that differ; the module then holds some of its weights and is of no use.
    """
    slots = Slots(module)
    units = plan(slots, sources)
    if idle := [pattern for pattern in keep if not any(re.fullmatch(pattern, name) for name in slots.tensors)]:
        raise ValueError(f"keep: patterns that match no tensor of {sources[0].table.family}: {', '.join(idle)}")
    target = Target(dtype, torch.device(device), keep)
    _make_buffers(slots, target.device)
    sizes = [sum(weights[name].nbytes for name in unit.theirs) for unit, weights in units]
    with _progress(f"load {sources[0].weights.source.name}", sum(sizes)) as advance:
        for (unit, weights), size in zip(units, sizes, strict=True):
            for name, tensor in _ours(unit, weights, target).items():
                slots.put(name, tensor)
            advance(size)


def plan(slots: Slots, sources: Sequence[Source]) -> list[tuple[Unit, Weights]]:
    """The units that fill the slots, in the order of the files; only shapes are looked at.

    ValueError: names or shapes that differ, whole numbers in place of others (quantised weights), all listed.
    """
    problems, units = list[str](), list[tuple[Unit, Weights]]()
    made, odd = dict[str, Tensor](), set[str]()
    for table, weights in sources:
        found, missing, unknown = table.sort(weights)
        problems += [f"missing beside others: {name}" for name in missing]
        problems += [f"not in the model: {name} {shape(weights[name])}" for name in unknown]
        whole = [unit for unit in found if all(name in weights for name in unit.theirs)]
        for unit in whole:
            try:
                with Hollow():
                    made |= unit.to_ours(weights)
            except (RuntimeError, ValueError, IndexError):  # from a conversion, of shapes that it cannot join or cut
                shapes = ", ".join(f"{name} {shape(weights[name])}" for name in unit.theirs)
                problems.append(f"other shape: {shapes} cannot become {', '.join(unit.ours)}")
                odd |= set(unit.ours)
        whole.sort(key=lambda unit: min(weights.place(name) for name in unit.theirs))
        units += [(unit, weights) for unit in whole]
    given = odd | made.keys()
    own = slots.tensors.items()
    wanted = {name: tensor for name, tensor in own if name in made or not given.intersection(slots.tied(name))}
    problems += [
        f"other type: {name} is {str(made[name].dtype).removeprefix('torch.')}, which is not how the model computes"
        for name, tensor in own
        if name in made and made[name].is_floating_point() != tensor.is_floating_point()
    ]
    refuse(problems + differences(wanted, made), " and ".join(str(source.weights.source) for source in sources))
    return units


def _ours(unit: Unit, weights: Weights, target: Target) -> dict[str, Tensor]:
    if isinstance(unit.via, Stacked) and len(unit.theirs) == len(unit.ours) == 1:  # the largest need no second copy
        name = unit.ours[0]
        out = target.empty(name, weights[unit.theirs[0]])
        weights.read_into(unit.theirs[0], out)
        return {name: out}
    made = unit.to_ours({name: weights.read(name) for name in unit.theirs})
    return {name: target.take(name, tensor) for name, tensor in made.items()}


def _make_buffers(slots: Slots, device: torch.device) -> None:
    """Those that the state_dict leaves out. ValueError, before any is made: nothing makes one on the meta device."""
    rest = {name: buffer for name, buffer in slots.module.named_buffers() if name not in slots.tensors}
    owners = {name: slots.module.get_submodule(name.rpartition(".")[0]) for name in rest}
    empty = [name for name, buffer in rest.items() if buffer.is_meta]
    if lost := [name for name in empty if not hasattr(owners[name], MAKER)]:
        raise ValueError(f"no file holds {', '.join(lost)}, and no {MAKER}() makes them: build them on the CPU")
    for name, buffer in rest.items():
        moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        assign(slots.module, name, moved)
    for owner in {id(owners[name]): owners[name] for name in empty}.values():
        getattr(owner, MAKER)()


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
