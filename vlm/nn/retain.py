"""Retention in its three forms (Sun et al. 2023, arXiv 2307.08621, sections 2.1-2.2): one definition, equal outputs.

    o_n = sum_m R_nm v_m / max(|sum_m R_nm|, 1),   R_nm = d_nm (q_n turn_n) . (k_m turn_m) / sqrt(K),
    d_nm = decay^(n - m) / sqrt(sum_i decay^(n - i))   for m <= n, counting valid tokens only

The paper's score normalisations are factors of a row: n's own decay sum, and the row sum, which every form gets exactly
from a column of ones appended to the values. So the forms agree whatever eps the norm after them has. As in the
authors' code, no gradient flows through the row sum.

Letters: B batch, S sequence, H heads, K key width, V value width, W = V + 1, N chunks, C chunk length, P padded (N C).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

SPAN = 1024  # tokens computed at once on CPUs, where what lies between the steps then stays in the cache


@dataclass(frozen=True)
class Fading:
    """What one call knows of its tokens' places; all layers share it. In fp32 (fp64 for fp64 inputs)."""

    log_decay: Float[Tensor, "H"]
    turn: Complex[Tensor, "B S L"]  # rotation of each of a query's K / 2 pairs (2 i, 2 i + 1)
    turn_key: Complex[Tensor, "B S L"]  # the same / sqrt(K); 0 on padding, which adds nothing to the memory
    place: Float[Tensor, "#B S"]  # valid tokens of this call up to and with each: padding lets nothing fade
    fade: Float[Tensor, "#B H S"]  # what each token leaves of the memory before it
    scale: Float[Tensor, "#B H S"]  # sqrt(sum_i decay^(n - i)) over all tokens, those of earlier calls too
    folds: dict[int, "Fold"] = field(default_factory=dict)  # for each chunk length, made by the first layer

    def part(self, columns: slice) -> "Fading":
        """For some of the tokens only."""
        before = self.place[:, columns.start - 1, None] if columns.start else 0
        return Fading(
            self.log_decay,
            self.turn[:, columns],
            self.turn_key[:, columns],
            self.place[:, columns] - before,
            self.fade[..., columns],
            self.scale[..., columns],
        )


class Retained(NamedTuple):
    """Outputs before the norm, and the memory after the last token: sum_m decay^(n - m) k_m (v_m, 1)."""

    out: Float[Tensor, "B S H V"]
    total: Float[Tensor, "B H K W"]


def empty(query: Float[Tensor, "B S H K"], value: Float[Tensor, "B S H V"]) -> Float[Tensor, "B H K W"]:
    """The memory before the first token."""
    rows, _, heads, width = query.shape
    return query.new_zeros(rows, heads, width, value.shape[-1] + 1, dtype=precise(query.dtype))


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of decays, rotations and memories beside inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotated(
    x: Float[Tensor, "B S H K"], turn: Complex[Tensor, "B S L"], out: Float[Tensor, "B S H K"] | None = None
) -> Float[Tensor, "B S H K"]:
    """Turns neighbouring pairs, in the dtype of the turn's parts; into `out` where it is given."""
    pairs = x.to(precise(x.dtype)).reshape(*x.shape[:-1], -1, 2)
    if not torch.compiler.is_compiling():  # one pass over memory; compilers fuse the real form instead
        into = None if out is None else torch.view_as_complex(out.unflatten(-1, (-1, 2)))
        turned = torch.mul(torch.view_as_complex(pairs), turn.unsqueeze(2), out=into)
        return torch.view_as_real(turned).flatten(-2) if out is None else out
    cos, sin = turn.real[:, :, None], turn.imag[:, :, None]
    first, second = pairs.unbind(-1)
    real = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return real if out is None else out.copy_(real)


def parallel(
    query: Float[Tensor, "B S H K"],
    key: Float[Tensor, "B S H K"],
    value: Float[Tensor, "B S H V"],
    fading: Fading,
    past: Float[Tensor, "B H K W"] | None = None,
) -> Retained:
    """All pairs at once, S x S per head: the definition, to compare the others with (equation 5)."""
    past = empty(query, value) if past is None else past
    q, k, v = (x.transpose(1, 2) for x in prepared(query, key, value, fading))
    gap = fading.place[:, :, None] - fading.place[:, None, :]
    order = torch.ones(gap.shape[1:], dtype=torch.bool, device=gap.device).tril()
    log_decay = fading.log_decay[:, None]
    decay = torch.where(order, (gap[:, None] * log_decay[..., None]).exp(), 0.0)
    since = (fading.place[:, None] * log_decay).exp()[..., None]
    full = ((q @ k.mT) * decay) @ v + since * (q @ past)
    last = fading.place[:, -1:]
    remains = ((last - fading.place)[:, None] * log_decay).exp()[..., None]
    total = (last * fading.log_decay).exp()[..., None, None] * past + (k * remains).mT @ v
    return Retained(divided(full, fading.scale).transpose(1, 2).to(query.dtype), total)


def recurrent(
    query: Float[Tensor, "B S H K"],
    key: Float[Tensor, "B S H K"],
    value: Float[Tensor, "B S H V"],
    fading: Fading,
    past: Float[Tensor, "B H K W"] | None = None,
    overwrite: bool = False,
) -> Retained:
    """Token after token at constant cost and memory (equation 6): decoding. `overwrite`: the result may take past's."""
    total = empty(query, value) if past is None else past
    overwrite = (overwrite or past is None) and not torch.is_grad_enabled()
    q, k, v = prepared(query, key, value, fading)
    length, heads, width = q.shape[1:]
    k, v, fade = k[..., None], v[..., None, :], fading.fade[..., None, None]
    rows = []
    for q_n, k_n, v_n, fade_n in zip(q.unbind(1), k.unbind(1), v.unbind(1), fade.unbind(2), strict=True):
        total = (total.mul_(fade_n) if overwrite else total * fade_n).addcmul_(k_n, v_n)
        overwrite = not torch.is_grad_enabled()
        rows.append(torch.bmm(q_n.reshape(-1, 1, width), total.flatten(0, 1)))
    full = (rows[0] if length == 1 else torch.cat(rows, 1)).view(-1, heads, length, v.shape[-1])
    return Retained(divided(full, fading.scale).transpose(1, 2).to(query.dtype), total)


def prepared(query: Tensor, key: Tensor, value: Tensor, fading: Fading) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated and scaled keys (0 on padding), values with the column of ones."""
    k = rotated(key, fading.turn_key)
    v = value.to(k.dtype)
    return rotated(query, fading.turn), k, torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)


def divided(full: Tensor, scale: Tensor) -> Tensor:
    """Sums over values to outputs: over max(|row sum|, scale), through which no gradient flows."""
    return full[..., :-1] / torch.maximum(full[..., -1].detach().abs(), scale)[..., None]


class Chunkwise:
    """Chunks in parallel, memory from chunk to chunk (equation 7): linear in S, for training and for prompts.

    The decay is folded into queries and keys, counted from the middle of a chunk, so that a chunk's scores are one
    product and a triangle. Products run in the dtype of the inputs; decays, rotations and the memory in fp32.
    """

    def __init__(self, length: int = 64) -> None:
        """`length` of a chunk: a matter of speed alone. At most 512, or the folded decays could leave bf16's range."""
        if not 1 <= length <= 512:
            raise ValueError(f"chunk={length}: from 1 to 512 tokens")
        self.length = length

    def __call__(
        self,
        query: Float[Tensor, "B S H K"],
        key: Float[Tensor, "B S H K"],
        value: Float[Tensor, "B S H V"],
        fading: Fading,
        past: Float[Tensor, "B H K W"] | None = None,
    ) -> Retained:
        """As the others, with its own backward pass, which recomputes the scores."""
        past = empty(query, value) if past is None else past
        # Chunks of equal length, as few as before: padding the last one would be work for nothing.
        size = -(-query.shape[1] // -(-query.shape[1] // self.length))
        with torch.autocast(query.device.type, enabled=False):
            fold = fading.folds.get(size)
            if fold is None:
                fold = fading.folds[size] = Fold.of(fading, size)
            total, outs = past * fold.middle, []
            chunks = self._span(query, size)
            tokens, padded = chunks * size, (part.split(chunks * size, 2) for part in (fold.query, fold.key))
            columns = (x.split(tokens, 1) for x in (query, key, value, fading.turn, fading.turn_key))
            rest = (*padded, fold.keep.split(chunks, 2), fading.scale.split(tokens, 2))
            for q, k, v, turn, turn_key, *folds in zip(*columns, *rest, strict=True):
                out, total = _Chunks.apply(q, k, v, total, turn, turn_key, *folds)
                outs.append(out)
            return Retained(outs[0] if len(outs) == 1 else torch.cat(outs, 1), total / fold.middle)

    @staticmethod
    def _span(query: Tensor, size: int) -> int:
        """How many chunks to compute at once: all, but on CPUs those of `SPAN` tokens."""
        if query.device.type != "cpu" or torch.compiler.is_compiling():
            return query.shape[1]
        return max(1, SPAN // (len(query) * size))


class Fold(NamedTuple):
    """Decays relative to the middle of each chunk."""

    query: Float[Tensor, "#B H P"]
    key: Float[Tensor, "#B H P"]
    keep: Float[Tensor, "#B H N"]  # what a whole chunk leaves of the memory before it
    middle: Float[Tensor, "H 1 1"]  # what half a chunk leaves: memories inside `_Chunks` are smaller by it

    @staticmethod
    def of(fading: Fading, length: int) -> "Fold":
        """For chunks of `length`; beyond the last token nothing fades."""
        extra = -fading.place.shape[1] % length
        place = torch.cat([fading.place, fading.place[:, -1:].expand(-1, extra)], 1).unflatten(1, (-1, length))
        ends = place[..., -1]
        starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
        within = (place - starts[..., None]).flatten(1)[:, None] - length / 2
        log_decay = fading.log_decay[:, None]
        return Fold(
            (within * log_decay).exp(),
            (-within * log_decay).exp(),
            ((ends - starts)[:, None] * log_decay).exp(),
            (fading.log_decay * (length / 2)).exp()[:, None, None],
        )


class _Chunks(torch.autograd.Function):
    """Inside: rows are (B H N), each a chunk; memories are scaled by decay^(C / 2)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        memory: Tensor,
        turn: Tensor,
        turn_key: Tensor,
        fold_q: Tensor,
        fold_k: Tensor,
        keep: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Normalised outputs B S H V and the scaled memory after the last chunk."""
        batch, length, heads, _ = query.shape
        chunks = keep.shape[2]
        size = fold_q.shape[2] // chunks
        q = _folded(query, turn, fold_q).view(batch * heads * chunks, size, -1)
        k = _folded(key, turn_key, fold_k).view(batch * heads * chunks, size, -1)
        v = _with_ones(value, fold_q.shape[2]).view(batch * heads * chunks, size, -1)
        made = torch.bmm(k.mT, v).unflatten(0, (batch, heads, chunks))
        before, last = _scan(made, keep, memory)
        before = before.to(q.dtype).flatten(0, 2)
        full = torch.bmm(torch.bmm(q, k.mT).tril_(), v).baddbmm_(q, before)
        full = full.view(batch, heads, -1, full.shape[-1])[:, :, :length]
        scale = torch.maximum(full[..., -1:].abs().to(scale.dtype), scale[..., None])
        out = value.new_empty(value.shape)
        out.transpose(1, 2).copy_(full[..., :-1]).div_(scale)
        ctx.save_for_backward(q, k, v, before, scale, turn, turn_key, fold_q, fold_k, keep)
        return out, last

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys, values and the memory before."""
        q, k, v, before, scale, turn, turn_key, fold_q, fold_k, keep = ctx.saved_tensors
        batch, heads, length, _ = scale.shape
        chunks = keep.shape[2]
        v, before = v[..., :-1], before[..., :-1]
        g = grad.new_empty(batch, heads, fold_q.shape[2], grad.shape[-1])
        g[:, :, :length].copy_(grad.transpose(1, 2)).div_(scale)
        g[:, :, length:] = 0
        g = g.view(*q.shape[:2], -1)
        seen = torch.bmm(q.mT, g).unflatten(0, (batch, heads, chunks))
        scored = torch.bmm(q, k.mT).tril_()
        scored_grad = torch.bmm(g, v.mT).tril_()
        # The same scan from the other end: what later chunks ask of the memory that this one leaves.
        after, first = _scan_back(seen, keep, grad_last[..., :-1])
        after = after.to(q.dtype).flatten(0, 2)
        grad_q = torch.bmm(scored_grad, k).baddbmm_(g, before.mT)
        grad_k = torch.bmm(scored_grad.mT, q).baddbmm_(v, after.mT)
        grad_v = torch.bmm(scored.mT, g).baddbmm_(k, after)
        shape = (batch, heads, chunks * g.shape[1], -1)
        return (
            _unfolded(grad_q.view(shape), turn.conj(), fold_q, length),
            _unfolded(grad_k.view(shape), turn_key.conj(), fold_k, length),
            grad_v.view(shape)[:, :, :length].transpose(1, 2),
            pad(first, (0, 1)),
            *[None] * 6,
        )


def _folded(x: Tensor, turn: Tensor, fold: Tensor) -> Tensor:
    """B S H K to B H P K: rotated and faded, 0 beyond the last token."""
    batch, given, heads, width = x.shape
    out = x.new_empty(batch, heads, fold.shape[2], width, dtype=precise(x.dtype))
    rotated(x, turn, out[:, :, :given].transpose(1, 2))
    out[:, :, given:] = 0
    return out.mul_(fold[..., None]).to(x.dtype)


def _unfolded(grad: Tensor, back: Tensor, fold: Tensor, length: int) -> Tensor:
    """The gradient of `_folded`: B H P K to B S H K."""
    batch, heads, _, width = grad.shape
    faded = (grad.to(precise(grad.dtype)) * fold[..., None])[:, :, :length].transpose(1, 2)
    return rotated(faded, back, torch.empty_like(faded, memory_format=torch.contiguous_format)).to(grad.dtype)


def _with_ones(value: Tensor, length: int) -> Tensor:
    """B S H V to B H P W: the last column sums the scores, which the row's scale needs."""
    batch, given, heads, width = value.shape
    out = value.new_empty(batch, heads, length, width + 1)
    out[:, :, :given, :-1] = value.transpose(1, 2)
    out[..., -1] = 1
    out[:, :, given:] = 0
    return out


def _scan(made: Tensor, keep: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Memories before each chunk, B H N K W, and after the last: next = keep * (memory + made)."""
    before = []
    for n in range(made.shape[2]):
        before.append(memory)
        memory = keep[:, :, n, None, None] * (memory + made[:, :, n])
    return torch.stack(before, 2), memory


def _scan_back(seen: Tensor, keep: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what each chunk leaves, and of the memory before the first."""
    after = []
    for seen_n, keep_n in zip(reversed(seen.unbind(2)), reversed(keep[..., None, None].unbind(2)), strict=True):
        grad = keep_n * grad
        after.append(grad)
        grad = grad + seen_n
    return torch.stack(after[::-1], 2), grad
