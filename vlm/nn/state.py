"""What a stack remembers of the tokens it has seen: the protocol that decoding relies on, and the key/value cache."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class LayerState(Protocol):
    """Memory of one mixer; every operation returns a new value and leaves the old one usable."""

    def reorder(self, index: Int[Tensor, "R"]) -> "LayerState":
        """Rows picked by index, with repeats: beams, or several texts per image."""
        ...


@dataclass(frozen=True)
class State:
    """Memory of a whole stack after P tokens."""

    layers: tuple[LayerState, ...]
    valid: Bool[Tensor, "B P"]
    position: Int[Tensor, "B"]  # of the next token of each row

    def reorder(self, index: Int[Tensor, "R"]) -> "State":
        """Rows picked by index, with repeats."""
        layers = tuple(layer.reorder(index) for layer in self.layers)
        return State(layers, self.valid[index], self.position[index])


class _Buffer:
    """Storage with room to grow; `filled` columns have an owner already."""

    def __init__(self, key: Tensor, value: Tensor, filled: int) -> None:
        self.key, self.value, self.filled = key, value, filled


class KeyValue:
    """Keys and values of past tokens, B G P K each (G key/value heads)."""

    def __init__(self, key: Float[Tensor, "B G P K"], value: Float[Tensor, "B G P K"]) -> None:
        """Takes the tensors as they are, without a copy."""
        self._buffer = _Buffer(key, value, key.shape[2])
        self._length = key.shape[2]

    @property
    def key(self) -> Float[Tensor, "B G P K"]:
        """All keys so far."""
        return self._buffer.key[:, :, : self._length]

    @property
    def value(self) -> Float[Tensor, "B G P K"]:
        """All values so far."""
        return self._buffer.value[:, :, : self._length]

    def extend(self, key: Float[Tensor, "B G S K"], value: Float[Tensor, "B G S K"]) -> "KeyValue":
        """These followed by new ones. Without gradients the storage is shared and grows by half when it is full."""
        if torch.is_grad_enabled():
            return KeyValue(torch.cat([self.key, key], 2), torch.cat([self.value, value], 2))
        end = self._length + key.shape[2]
        buffer = self._buffer
        # Another continuation of the same past may own the next columns: then copy instead of writing over it.
        if buffer.filled != self._length or buffer.key.shape[2] < end:
            buffer = _Buffer(_grown(self.key, end), _grown(self.value, end), self._length)
        buffer.key[:, :, self._length : end] = key
        buffer.value[:, :, self._length : end] = value
        buffer.filled = end
        longer = KeyValue.__new__(KeyValue)
        longer._buffer, longer._length = buffer, end
        return longer

    def reorder(self, index: Int[Tensor, "R"]) -> "KeyValue":
        """Rows picked by index, with repeats."""
        return KeyValue(self.key[index], self.value[index])


def _grown(past: Tensor, least: int) -> Tensor:
    room = past.new_empty(*past.shape[:2], least + max(32, least // 2), past.shape[3])
    room[:, :, : past.shape[2]] = past
    return room
