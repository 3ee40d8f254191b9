"""Modules without memory: on torch's meta device, minus what would import torch's compiler there, for seconds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Hollow(TorchFunctionMode):
    """Draws no first weights, and joins tensors of the meta device by their shapes alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__ or func is Tensor.normal_:
            return args[0] if args else given["tensor"]
        if func in (torch.cat, torch.stack) and all(tensor.is_meta for tensor in args[0]):
            return _joined(args[0], *args[1:], new=func is torch.stack, **given)
        return func(*args, **given)


@contextmanager
def hollow() -> Iterator[None]:
    """Modules that are built inside have shapes and types, but no memory and no first weights."""
    with torch.device("meta"), Hollow():
        yield


def _joined(tensors: Sequence[Tensor], dim: int = 0, *, new: bool) -> Tensor:
    """RuntimeError or IndexError, as from torch: shapes that cannot be joined."""
    shapes = [list(tensor.shape) for tensor in tensors]
    axes = len(shapes[0]) + new
    if not -axes <= dim < axes:
        raise IndexError(f"shapes that cannot be joined along axis {dim}: {shapes}")
    at = dim % axes
    rest = [shape if new else shape[:at] + shape[at + 1 :] for shape in shapes]
    if any(other != rest[0] for other in rest):
        raise RuntimeError(f"shapes that cannot be joined: {shapes}")
    length = len(shapes) if new else sum(shape[at] for shape in shapes)
    return tensors[0].new_empty([*rest[0][:at], length, *rest[0][at:]])
