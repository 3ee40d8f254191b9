"""What attention remembers and looks at: everything, or a sliding window (Mistral, arXiv 2310.06825, section 2).

Letters: B batch, S new tokens, P remembered tokens, T looked at (past and new), G key/value heads, K head width.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.nn.context import Context
from vlm.nn.state import UNDO, Branched, KeyValue, LayerState
from vlm.nn.tokens import Tokens, Visibility

M = TypeVar("M", bound="KeyValue | Recent")


class Looked(NamedTuple):
    """What the queries of one call look at, and the memory after it."""

    state: LayerState
    key: Float[Tensor, "B G T K"]
    value: Float[Tensor, "B G T K"]
    visibility: Visibility
    trunk: KeyValue | None = None  # looked at before these; several rows share each of its rows


class Everything:
    """Queries look at all tokens that the mask allows."""

    def __call__(
        self, past: LayerState | None, key: Float[Tensor, "B G S K"], value: Float[Tensor, "B G S K"], context: Context
    ) -> Looked:
        """Past keys and values followed by the new ones."""
        assert context.visibility is not None, "a stack with attention works out who sees whom"
        if isinstance(past, Branched) and key.shape[2] > 1:
            past = past.whole()
        if isinstance(past, Branched):
            branches = past.extend(key, value)
            return Looked(branches, branches.key, branches.value, context.visibility, branches.trunk)
        state = KeyValue(key, value) if past is None else _own(past, KeyValue, key).extend(key, value)
        return Looked(state, state.key, state.value, context.visibility)


class Window:
    """Queries look back at the last `size` tokens at most, themselves included; padding does not count.

    Tokens after a query (a bidirectional prefix) are the mask's business alone.
    """

    def __init__(self, size: int) -> None:
        """Errors: fewer than one token."""
        if size < 1:
            raise ValueError(f"window={size}: a token sees at least itself, so 1 or more, or None for everything")
        self.size = size

    def __call__(
        self, past: LayerState | None, key: Float[Tensor, "B G S K"], value: Float[Tensor, "B G S K"], context: Context
    ) -> Looked:
        """At most `size` - 1 past keys and values, followed by the new ones."""
        tokens, given = context.tokens, context.visibility
        assert given is not None, "a stack with attention works out who sees whom"
        assert given.mask is None or given.mask.dtype == torch.bool, "relative positions know no window"
        if past is None:
            state = Recent.of(key, value, tokens, self.size - 1)
            return Looked(state, key, value, self._visibility(given, tokens, 0, None))
        ready = _own(past, Recent, key).ready()
        kept = min(len(ready), self.size - 1)
        valid = None if ready.valid is None else _last(ready.valid, kept, 1)
        state = ready.extend(key, value, tokens)
        total = kept + key.shape[2]
        key, value = _last(state.memory.key, total, 2), _last(state.memory.value, total, 2)
        return Looked(state, key, value, self._visibility(given, tokens, kept, valid))

    def _visibility(self, given: Visibility, tokens: Tokens, kept: int, valid: Tensor | None) -> Visibility:
        """Who sees whom among `kept` past tokens (`valid`: which of them) and the new ones, inside the band."""
        length = tokens.x.shape[1]
        near = kept + length <= self.size
        if given.mask is None:
            return given if near else Visibility(self._band(given.is_causal, kept, length, tokens.x.device), False)
        past = tokens.valid.new_ones(len(tokens.valid), kept) if valid is None else valid
        seen = given.mask[..., -length:]
        if kept:
            seen = torch.cat([past[:, None, None].expand(-1, -1, length, -1), seen], 3)
        if not near:
            count = torch.cat([past, tokens.valid], 1).cumsum(1)
            seen = seen & (count[:, None, None] > count[:, None, kept:, None] - self.size)
        return Visibility(seen, False)

    def _band(self, causal: bool, kept: int, length: int, device: torch.device) -> Tensor:
        """1 1 S T for tokens without padding."""
        place = torch.arange(kept + length, device=device)
        gap = place[kept:, None] - place
        seen = (gap < self.size) & (gap >= 0) if causal else gap < self.size
        return seen[None, None]


@dataclass(frozen=True)
class Recent:
    """Keys and values of the latest tokens, in constant memory: what a window can need, and room to take back."""

    memory: KeyValue
    valid: Bool[Tensor, "B P"] | None  # None: known that all are
    keep: int  # past tokens that the next call can look at
    ragged: bool  # there may be padding among the valid tokens of a row
    complete: bool  # nothing has been forgotten so far

    @staticmethod
    def of(key: Float[Tensor, "B G S K"], value: Float[Tensor, "B G S K"], tokens: Tokens, keep: int) -> "Recent":
        """Of the first tokens."""
        return Recent(KeyValue(key, value), None if tokens.full else tokens.valid, keep, not tokens.full, True)

    def __len__(self) -> int:
        """Remembered tokens P."""
        return self.memory.key.shape[2]

    def ready(self) -> "Recent":
        """Before the next call: the valid tokens of each row last, in order, and no more than can be needed."""
        needed = self.keep + UNDO
        if self.ragged and self.valid is not None:
            # False stands before True, and equals keep their order.
            order = _last(self.valid.long().argsort(dim=1, stable=True), needed, 1)
            index = order[:, None, :, None]
            key, value = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in self._both())
            complete = self.complete and len(self) <= needed
            return Recent(KeyValue(key, value), self.valid.gather(1, order), self.keep, False, complete)
        # Forgotten in large steps, so that most tokens are written into storage that is there already.
        room = 0 if torch.is_grad_enabled() else max(32, self.keep // 2)
        if len(self) <= needed + room:
            return self
        memory = KeyValue(*(_last(x, needed, 2) for x in self._both()))
        valid = None if self.valid is None else _last(self.valid, needed, 1)
        return Recent(memory, valid, self.keep, False, False)

    def extend(self, key: Float[Tensor, "B G S K"], value: Float[Tensor, "B G S K"], tokens: Tokens) -> "Recent":
        """These followed by new ones."""
        valid = self.valid
        if valid is not None or not tokens.full:
            before = tokens.valid.new_ones(len(tokens.valid), len(self)) if valid is None else valid
            valid = torch.cat([before, tokens.valid], 1)
        return replace(self, memory=self.memory.extend(key, value), valid=valid, ragged=not tokens.full)

    def reorder(self, index: Int[Tensor, "R"]) -> "Recent":
        """Rows picked by index, with repeats."""
        valid = None if self.valid is None else self.valid[index]
        return replace(self, memory=self.memory.reorder(index), valid=valid)

    def crop(self, drop: int) -> "Recent":
        """Without the last `drop` tokens. Errors: so many that forgotten ones would be in the window again."""
        most = len(self) if self.complete else len(self) - self.keep
        if not 0 <= drop <= most:
            raise ValueError(
                f"{drop} tokens cannot be taken back from a window of {self.keep + 1}, which forgets what is older: "
                f"at most {most}, or keep the state from before them and go on from it (states are never overwritten)"
            )
        valid = None if self.valid is None else self.valid[:, : len(self) - drop]
        return replace(self, memory=self.memory.crop(drop), valid=valid)

    def disposable(self) -> "Recent":
        """Itself: its storage is shared already."""
        return self

    def _both(self) -> tuple[Tensor, Tensor]:
        return self.memory.key, self.memory.value


def _last(x: Tensor, count: int, axis: int) -> Tensor:
    """The last `count` entries, or all of them."""
    count = min(count, x.shape[axis])
    return x.narrow(axis, x.shape[axis] - count, count)


def _own(past: LayerState, kind: type[M], key: Tensor) -> M:
    """The state, if it is of this kind and of heads like the new ones."""
    wanted = (key.shape[1], key.shape[3])
    if not isinstance(past, kind):
        raise ValueError(
            f"this state is of another model: attention with {_window(kind)} remembers heads of {wanted} "
            f"as {kind.__name__}, not {type(past).__name__}"
        )
    shape = past.key.shape if isinstance(past, KeyValue) else past.memory.key.shape
    if (shape[1], shape[3]) != wanted:
        found = (shape[1], shape[3])
        raise ValueError(f"this state is of another model: attention remembers heads of {wanted}, not {found}")
    return past


def _window(kind: type) -> str:
    return "a window" if kind is Recent else "no window"
