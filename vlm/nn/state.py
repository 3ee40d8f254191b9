"""What a stack remembers of the tokens it has seen: the protocol that decoding relies on, and the key/value cache."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

UNDO = 16  # so many of the last tokens can be taken back where not all are kept


@runtime_checkable
class LayerState(Protocol):
    """Memory of one mixer; every operation returns a new value and, unless it is disposable, leaves this one usable."""

    def reorder(self, index: Int[Tensor, "R"]) -> "LayerState":
        """Rows picked by index, with repeats: beams, or several texts per image."""
        ...

    def crop(self, drop: int) -> "LayerState":
        """Without the last `drop` tokens."""
        ...

    def disposable(self) -> "LayerState":
        """The same, but what comes after it may be written into its storage."""
        ...


@runtime_checkable
class Movable(LayerState, Protocol):
    """A memory whose rows can be exchanged in place."""

    def move(self, index: Int[Tensor, "R"], fresh: int) -> "Movable":
        """As `State.move`."""
        ...


@runtime_checkable
class Beside(Protocol):
    """What tokens look at besides each other: finished before them, and the same for all continuations of a row."""

    def select(self, index: Int[Tensor, "R"]) -> "Beside":
        """Rows picked by index, with repeats."""
        ...


@dataclass(frozen=True)
class State:
    """Memory of a whole stack after P tokens."""

    layers: tuple[LayerState, ...]
    valid: Bool[Tensor, "B P"] | None  # None: no layer looks at single past tokens (retention)
    position: Int[Tensor, "B"]  # of the next token of each row
    full: bool = False  # known beforehand that no past token is padding: a hint that spares the mask
    seen: Float[Tensor, "B"] | None = None  # valid tokens of each row so far, where a layer scales by them (retention)
    beside: Beside | None = None  # what an encoder-decoder has read

    def reorder(self, index: Int[Tensor, "R"]) -> "State":
        """Rows picked by index, with repeats."""
        layers = tuple(layer.reorder(index) for layer in self.layers)
        valid = None if self.valid is None else self.valid[index]
        seen = None if self.seen is None else self.seen[index]
        beside = None if self.beside is None else self.beside.select(index)
        return State(layers, valid, self.position[index], self.full, seen, beside)

    def branch(self, width: int) -> "State":
        """Each row `width` times, one after the other, as `reorder` would; keys and values are held once.

        Only rows of one origin may then be exchanged, by `move` (beams of one prompt).
        """
        index = torch.arange(len(self.position), device=self.position.device).repeat_interleave(width)
        layers = tuple(
            layer.branch(width) if isinstance(layer, KeyValue) else layer.reorder(index) for layer in self.layers
        )
        return replace(replace(self, layers=()).reorder(index), layers=layers)

    def move(self, index: Int[Tensor, "R"], fresh: int) -> "State":
        """As `reorder`, in place where it can be; row r and row index[r] differ in their last `fresh` tokens only.

        Beams of one prompt are such rows. This state must not be used afterwards.
        """
        moved = (
            layer.move(index, fresh) if isinstance(layer, Movable) else layer.reorder(index) for layer in self.layers
        )
        rest = replace(self, layers=(), beside=None).reorder(index)
        return replace(rest, layers=tuple(moved), beside=self.beside)

    def crop(self, drop: int) -> "State":
        """Without the last `drop` tokens, which must be valid in every row: to take back what was only tried.

        Errors: retention that cannot (see there).
        """
        layers = tuple(layer.crop(drop) for layer in self.layers)
        valid = None if self.valid is None else self.valid[:, : self.valid.shape[1] - drop]
        seen = None if self.seen is None else self.seen - drop
        return replace(self, layers=layers, valid=valid, position=self.position - drop, seen=seen)

    def disposable(self) -> "State":
        """The same for a loop that goes on from the newest state alone: without gradients the next call, and all after
        it, may write over it. A memory of constant size is then never allocated anew.
        """
        return replace(self, layers=tuple(layer.disposable() for layer in self.layers))


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
        return self._view(buffer, end)

    def reorder(self, index: Int[Tensor, "R"]) -> "KeyValue":
        """Rows picked by index, with repeats."""
        return KeyValue(self.key[index], self.value[index])

    def move(self, index: Int[Tensor, "R"], fresh: int) -> "KeyValue":
        """As `State.move`: only the last `fresh` columns change their owner."""
        if self._buffer.filled != self._length:  # another continuation of the same past stands behind
            return self.reorder(index)
        for part in (self.key, self.value):
            tail = part[:, :, self._length - fresh :]
            tail.copy_(tail.index_select(0, index))
        return self

    def branch(self, width: int) -> "Branched":
        """As `State.branch`."""
        nothing = self.key.new_empty(len(self.key) * width, self.key.shape[1], 0, self.key.shape[3])
        # A CPU attends in fp32 whatever the type (`attend`): cast once here, not at every token.
        trunk = [x.float() if x.device.type == "cpu" else x for x in (self.key, self.value)]
        return Branched(KeyValue(*(x.contiguous() for x in trunk)), KeyValue(nothing, nothing))

    def crop(self, drop: int) -> "KeyValue":
        """Without the last `drop` tokens; shares the storage."""
        if not 0 <= drop <= self._length:
            raise ValueError(f"{drop} tokens cannot be taken back from {self._length}")
        return self._view(self._buffer, self._length - drop)

    def disposable(self) -> "KeyValue":
        """Itself: its storage is shared already."""
        return self

    @staticmethod
    def _view(buffer: _Buffer, length: int) -> "KeyValue":
        seen = KeyValue.__new__(KeyValue)
        seen._buffer, seen._length = buffer, length
        return seen


class Branched:
    """Continuations of B pasts, W of each side by side, such as beams: what they share is held and read once."""

    def __init__(self, trunk: KeyValue, own: KeyValue) -> None:
        """`trunk`: B rows; `own`: B W rows, what each has added since; row r continues r // W."""
        self.trunk, self.own = trunk, own

    @property
    def key(self) -> Float[Tensor, "R G P K"]:
        """Keys that each row has for itself."""
        return self.own.key

    @property
    def value(self) -> Float[Tensor, "R G P K"]:
        """Values that each row has for itself."""
        return self.own.value

    def extend(self, key: Float[Tensor, "R G S K"], value: Float[Tensor, "R G S K"]) -> "Branched":
        """These followed by new ones."""
        return Branched(self.trunk, self.own.extend(key, value))

    def whole(self) -> KeyValue:
        """The same with the shared past written out for each row."""
        width = len(self.key) // len(self.trunk.key)
        pairs = (self.trunk.key, self.key), (self.trunk.value, self.value)
        return KeyValue(*(torch.cat([a.repeat_interleave(width, 0).to(b.dtype), b], 2) for a, b in pairs))

    def reorder(self, index: Int[Tensor, "N"]) -> KeyValue:
        """Rows picked by index, with repeats, whatever they come from."""
        return self.whole().reorder(index)

    def move(self, index: Int[Tensor, "R"], fresh: int) -> "Branched":
        """As `State.move`; `fresh` columns are all that rows have for themselves, or the last of these."""
        return Branched(self.trunk, self.own.move(index, fresh))

    def crop(self, drop: int) -> "Branched | KeyValue":
        """Without the last `drop` tokens."""
        if drop > self.key.shape[2]:
            return self.whole().crop(drop)
        return Branched(self.trunk, self.own.crop(drop))

    def disposable(self) -> "Branched":
        """Itself: its storage is shared already."""
        return self


def _grown(past: Tensor, least: int) -> Tensor:
    room = past.new_empty(*past.shape[:2], least + max(32, least // 2), past.shape[3])
    room[:, :, : past.shape[2]] = past
    return room
