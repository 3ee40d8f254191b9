"""Multi-scale retention as a mixer (RetNet, Sun et al. 2023, arXiv 2307.08621): trains in parallel, decodes from a sum.

Letters: B batch, S sequence, D width, H heads, K key head width, V value head width, W = V + 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.nn.attention import head_width
from vlm.nn.context import Context
from vlm.nn.layout import project
from vlm.nn.norm import RMSNorm
from vlm.nn.retain import Chunkwise, Fading, Retained, precise, recurrent
from vlm.nn.route import call
from vlm.nn.state import UNDO, LayerState
from vlm.nn.tokens import Tokens

Form = Callable[[Tensor, Tensor, Tensor, Fading, Tensor | None], Retained]
Schedule = Literal["powers", "geometric"]


def decays(heads: int, schedule: Schedule = "powers") -> Float[Tensor, "H"]:
    """Decay of each head. powers: 1 - 2^(-5-h), equation 8; geometric: between 1 - 1/32 and 1 - 1/512, section 3.1."""
    if schedule == "powers":
        return 1 - torch.exp2(-5 - torch.arange(heads, dtype=torch.float64))
    steps = torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, dtype=torch.float64)
    return 1 - steps.exp()


class Decay(nn.Module):
    """Turns places into what retention shares over its layers: rotations and how the past fades, one for all forms."""

    def __init__(self, heads: int, head_dim: int, schedule: Schedule = "powers", theta: float = 10_000.0) -> None:
        """`head_dim`: width of a query head; `theta`: slowest wavelength over the fastest (both ends included)."""
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"retention rotates pairs: the width of a key head, {head_dim}, must be even")
        self.heads, self.head_dim, self.schedule, self.theta = heads, head_dim, schedule, theta

    def forward(self, tokens: Tokens, seen: Float[Tensor, "B"] | None = None) -> Fading:
        """`seen`: valid tokens of each row before these.

        Errors: tokens that earlier ones may look at, which a decaying sum cannot give.
        """
        _refuse_bidirectional(tokens)
        device, dtype = tokens.x.device, precise(tokens.x.dtype)
        valid = (tokens.valid[:1] if tokens.full else tokens.valid).to(dtype)
        steps = torch.linspace(0, 1, self.head_dim // 2, device=device, dtype=dtype)
        angle = tokens.position[..., None].to(dtype) * self.theta**-steps
        log_decay = decays(self.heads, self.schedule).log().to(device, dtype)
        place = valid.cumsum(1)
        # Before the first valid token there is nothing to scale: as if one had been seen.
        all_seen = (place if seen is None else place + seen[:, None].to(dtype)).clamp_min(1)
        series = torch.expm1(all_seen[:, None] * log_decay[:, None]) / torch.expm1(log_decay)[:, None]
        return Fading(
            log_decay=log_decay,
            turn=torch.polar(torch.ones_like(angle), angle),
            turn_key=torch.polar((valid[..., None] * self.head_dim**-0.5).expand_as(angle), angle),
            place=place,
            fade=(valid[:, None] * log_decay[:, None]).exp(),
            scale=series.sqrt(),
        )


def _refuse_bidirectional(tokens: Tokens) -> None:
    if tokens.runs is not None:
        causal = all(run.causal for run in tokens.runs)
    else:  # compiled code cannot look; the same layout is refused when it runs uncompiled
        causal = torch.compiler.is_compiling() or bool(tokens.causal.all())
    if not causal:
        raise ValueError(
            "retention is causal: every token fades into those after it, so a bidirectional prefix cannot be had. "
            "Give the image as causal tokens (Tokens.of(..., causal=True)), or choose mixer.kind=attention"
        )


class _Recent(NamedTuple):
    """The last call's keys and values, to take some of its tokens back."""

    key: Float[Tensor, "B S H K"]
    value: Float[Tensor, "B S H V"]
    fading: Fading


@dataclass(frozen=True)
class RetentionState:
    """A layer's past as one matrix per head, whatever its length."""

    total: Float[Tensor, "B H K W"]
    recent: _Recent | None = None
    overwrite: bool = False  # the next call may write over `total`

    def disposable(self) -> "RetentionState":
        """The same, whose storage the next call may take, and all after it."""
        return replace(self, overwrite=True)

    def reorder(self, index: Int[Tensor, "R"]) -> "RetentionState":
        """Rows picked by index, with repeats; what could be taken back before cannot be after."""
        return RetentionState(self.total[index], overwrite=self.overwrite)

    def crop(self, drop: int) -> "RetentionState":
        """Without the last `drop` tokens, up to rounding. Errors: more than the last call gave, or than `UNDO`."""
        if drop == 0:
            return self
        given = 0 if self.recent is None else self.recent.key.shape[1]
        if drop > given:
            raise ValueError(
                f"retention adds its past up, so only the {given} tokens of the last short call can be taken back, "
                f"not {drop}: keep the state from before them and go on from it (states are never overwritten)"
            )
        assert self.recent is not None
        stay = given - drop
        key, value, fading = self.recent
        last = fading.part(slice(stay, given))
        added = recurrent(key[:, stay:], key[:, stay:], value[:, stay:], last).total
        back = (-last.place[:, -1:] * fading.log_decay).exp()[..., None, None]
        kept = _Recent(key[:, :stay], value[:, :stay], fading.part(slice(0, stay))) if stay else None
        return RetentionState((self.total - added) * back, kept)


class Retention(nn.Module):
    """Multi-scale retention: rotated queries and keys, a decay per head, a norm per head, a swish gate (equation 8).

    The same outputs whether a text comes at once, in chunks or token by token. Values may be wider than keys.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        value_dim: int | None = None,
        norm: Callable[[int], nn.Module] | None = None,
        form: Form | None = None,
    ) -> None:
        """`value_dim`: width of all value heads (2 dim, as published, unless given).

        `norm`: of each value head, made from its width (RMS without weights, as published, unless given).
        `form`: how several tokens are computed (`Chunkwise(64)` unless given); single ones are recurrent.
        """
        super().__init__()
        value_dim = 2 * dim if value_dim is None else value_dim
        self.heads, self.head_dim = heads, head_width(dim, heads)
        self.value_head_dim = value_dim // heads
        if value_dim % heads:
            raise ValueError(f"heads={heads} does not divide value_dim={value_dim}")
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, value_dim, bias=False)
        self.gate = nn.Linear(dim, value_dim, bias=False)
        self.out = nn.Linear(value_dim, dim, bias=False)
        self.norm = (_head_norm if norm is None else norm)(self.value_head_dim)
        self.form: Form = Chunkwise() if form is None else form

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, past: LayerState | None = None
    ) -> tuple[Float[Tensor, "B S D"], RetentionState]:
        """Output, and the memory after these tokens."""
        before = self._own(past)
        total, overwrite = (None, False) if before is None else (before.total, before.overwrite)
        assert context.fading is not None, "the stack of a retention mixer needs a Decay"
        tokens = context.tokens
        *parts, gate = project(self.readers(), x, tokens)
        query, key, value = (part.view(*x.shape[:2], self.heads, -1) for part in parts)
        if x.shape[1] == 1:
            y, after = recurrent(query, key, value, context.fading, total, overwrite)
        else:
            y, after = self.form(query, key, value, context.fading, total)
        free = not torch.is_grad_enabled()  # nothing is needed again, so results may take the place of inputs
        gate = nn.functional.silu(gate, inplace=free)
        y = self.norm(y).flatten(2).to(gate.dtype)
        y = gate.mul_(y) if free else y * gate
        recent = _Recent(key, value, context.fading) if x.shape[1] <= UNDO else None
        return call(self.out, y, tokens), RetentionState(after, recent, overwrite)

    def readers(self) -> tuple[nn.Module, ...]:
        """The layers that read the same input (`layout.Readers`)."""
        return self.query, self.key, self.value, self.gate

    def _own(self, past: LayerState | None) -> RetentionState | None:
        if past is None:
            return None
        shape = (self.heads, self.head_dim, self.value_head_dim + 1)
        if not isinstance(past, RetentionState) or past.total.shape[1:] != shape:
            found = tuple(past.total.shape[1:]) if isinstance(past, RetentionState) else type(past).__name__
            raise ValueError(f"this state is of another model: a retention layer remembers {shape}, not {found}")
        return past


def _head_norm(width: int) -> nn.Module:
    return RMSNorm(width, eps=1e-6, elementwise_affine=False)
