"""The processes of a run: those that torchrun started, or this one alone, for which every exchange is the identity."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed
from torch.nn.functional import pad

from vlm.nn.backend import best_device


class Lost(OSError):
    """Another process of the run ended or stopped answering, so this one cannot go on."""


@dataclass(frozen=True)
class World:
    """This process among those of a run. All of them must make the same exchanges in the same order."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The numbers below `count` that are this process's own."""
        return range(self.rank, count, self.size)

    def sum(self, numbers: Sequence[float | int]) -> list[float]:
        """Sums over all processes, in fp64; whole numbers stay exact up to 2**53."""
        if self.size == 1:
            return [float(number) for number in numbers]
        found: list[float] = self.add(self._numbers(numbers)).tolist()
        return found

    def _numbers(self, numbers: Sequence[float | int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self.device)

    def most(self, number: int) -> int:
        """The largest of all processes'."""
        return number if self.size == 1 else max(int(n) for part in self.gather(self._numbers([number])) for n in part)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            with exchanging():
                distributed.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Shaped[Tensor, "L *S"]) -> list[Tensor]:
        """The tensors of all processes, which may differ in length; none has a gradient."""
        if self.size == 1:
            return [tensor.detach()]
        lengths = [int(length) for length in self.sum([len(tensor) * (i == self.rank) for i in range(self.size)])]
        room = [0, 0] * (tensor.ndim - 1) + [0, max(lengths) - len(tensor)]
        padded = pad(tensor.detach(), room).contiguous()
        parts = [torch.empty_like(padded) for _ in lengths]
        with exchanging():
            distributed.all_gather(parts, padded)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def texts(self, own: str) -> list[str]:
        """The texts of all processes."""
        letters = torch.frombuffer(bytearray(own.encode() + b"\n"), dtype=torch.uint8).to(self.device)
        return [bytes(part.tolist()).decode()[:-1] for part in self.gather(letters)]

    def meet(self) -> None:
        """Returns once all processes are here."""
        self.sum([0.0])

    def first_does(self, action: Callable[[], None]) -> None:
        """The first process does it while the others wait. Where it fails with OSError, all fail alike."""
        reason = ""
        if self.first:
            try:
                action()
            except OSError as error:
                if self.size == 1:
                    raise
                reason = str(error)
        if reason := self.texts(reason)[0]:
            raise OSError(reason)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """What is inside is done by the first process, then by the others: they find what it left."""
        if not self.first:
            self.meet()
        yield
        if self.first:
            self.meet()


def started() -> int:
    """How many processes torchrun has started for this run; 1 without torchrun. ValueError for half an environment."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing:
        raise ValueError(f"WORLD_SIZE={size}, but no {', '.join(missing)}: start the processes with torchrun")
    return size


@contextmanager
def joined(timeout: int) -> Iterator[World]:
    """This process in its world; `timeout`: seconds after which one that does not answer is given up.

    Errors: `Lost`; fewer GPUs than processes on this machine.
    """
    device = best_device()
    if started() == 1:
        yield World(device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"{local + 1} processes or more for {torch.cuda.device_count()} GPUs: lower --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    limit = timedelta(seconds=timeout)
    with exchanging():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
    yield World(device, rank, distributed.get_world_size())
    distributed.destroy_process_group()  # not after an error: it would wait for processes that are gone


@contextmanager
def exchanging() -> Iterator[None]:
    """What fails inside because of another process is raised as `Lost`; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip()
        if not isinstance(error, distributed.DistError) and "gloo" not in text:
            raise
        reason = next(iter(text.splitlines()), type(error).__name__)
        raise Lost(
            f"another process of this run has ended or does not answer; its own message says why ({reason})"
        ) from None
