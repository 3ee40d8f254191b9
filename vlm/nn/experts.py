"""SwiGLU networks of many experts, each token computed by those chosen for it; none is dropped and none computed twice.

The (token, choice) pairs are sorted by expert once. On a GPU in bf16 each layer is one grouped product whose group ends
stay on the device. Elsewhere blocks of pairs small enough for the cache go through all steps, which touches no large
buffer but the one that the backward pass needs; it is an operator of its own, so that torch.compile sees one node.

Letters: N tokens, D width, H width inside an expert, G both its gate and up rows (2 H), E experts, K choices of a
token, P = N * K pairs.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import silu

ROWS = 1024  # pairs of a block: enough for a matrix product at full speed, few enough for the cache
FEW = 5  # rows up to which MKL multiplies matrix by rows, not rows by matrix, up to 1.5 times faster
Piece = tuple[int, int]  # an expert and how many pairs of it
Block = tuple[int, list[Piece]]  # where its first pair stands in the sorted order, and its pieces


class Plan(NamedTuple):
    """Pairs sorted by expert; those of padding stand after the last expert's."""

    order: Int[Tensor, "P"]
    ends: Int[Tensor, "E"]

    @staticmethod
    def of(index: Int[Tensor, "N K"], experts: int, valid: Bool[Tensor, "N"] | None) -> "Plan":
        """`index`: the experts of each token; tokens that are not `valid` get none."""
        chosen = index if valid is None else torch.where(valid[:, None], index, experts)
        expert, order = torch.sort(chosen.reshape(-1), stable=True)
        every = torch.arange(experts, device=index.device)
        return Plan(order, torch.searchsorted(expert, every, right=True))

    def load(self) -> Float[Tensor, "E"]:
        """How many pairs each expert computes."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).float()


def mix(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E G D"],
    down: Float[Tensor, "E D H"],
    weight: Float[Tensor, "N K"],
    plan: Plan,
    padded: bool,
) -> Float[Tensor, "N D"]:
    """Each token's chosen experts, weighted and summed: sum_k weight_k down_k(silu(gate_k x) * up_k x).

    `gate_up` holds an expert's gate rows above its up rows. `padded`: the plan leaves tokens out; their result is zero.
    The weight is applied before `down`, where it is exact too and needs no memory of the experts' results.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    if kind == "cuda" and dtype == torch.bfloat16 and not any(size % 8 for size in down.shape[1:]):
        return grouped(x, gate_up, down, weight, plan, padded)
    keep = torch.is_grad_enabled() and any(part.requires_grad for part in (x, gate_up, down, weight))
    out: Tensor = blocked(x, gate_up, down, weight, plan.order, plan.ends, keep)[0]
    return out


def grouped(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E G D"],
    down: Float[Tensor, "E D H"],
    weight: Float[Tensor, "N K"],
    plan: Plan,
    padded: bool,
) -> Float[Tensor, "N D"]:
    """`mix` by grouped products; no shape depends on the data. Widths must be multiples of 16 bytes."""
    count = weight.numel()
    inside = (torch.arange(count, device=x.device) < plan.ends[-1])[:, None]
    ends = plan.ends.int()

    def clean(rows: Tensor) -> Tensor:
        # A grouped product leaves rows after the last group unwritten, in its backward pass as well.
        return torch.where(inside, rows, 0) if padded else rows

    rows = clean(x.index_select(0, plan.order // weight.shape[1]))
    gate, up = clean(_grouped_mm(rows, gate_up.transpose(1, 2), ends)).chunk(2, -1)
    share = weight.reshape(-1).index_select(0, plan.order)[:, None]
    inner = clean((silu(gate) * up * share).to(x.dtype))
    done = clean(_grouped_mm(inner, down.transpose(1, 2), ends))
    back = torch.empty_like(plan.order).scatter_(0, plan.order, torch.arange(count, device=x.device))
    total: Tensor = done.index_select(0, back).unflatten(0, weight.shape).sum(1, dtype=weight.dtype)
    return total.to(x.dtype)


def _grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    # The public name came with torch 2.10.
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    out: Tensor = product(rows, matrices, offs=ends)
    return out


def _blocks(ends: list[int]) -> Iterator[Block]:
    """Pairs in order, cut into blocks of at most ROWS; an expert with more is cut evenly."""
    first = last = start = 0
    pieces: list[Piece] = []
    for expert, end in enumerate(ends):
        parts = -(-(end - start) // ROWS)
        for part in range(parts):
            rows = (end - start) * (part + 1) // parts - (end - start) * part // parts
            if last - first + rows > ROWS:
                yield first, pieces
                first, pieces = last, []
            pieces.append((expert, rows))
            last += rows
        start = end
    if pieces:
        yield first, pieces


class _Work:
    """One block's view of the sorted pairs."""

    def __init__(self, block: Block, token: Tensor, share: Tensor) -> None:
        first, pieces = block
        self.experts, self.sizes = [expert for expert, _ in pieces], [rows for _, rows in pieces]
        self.rows = sum(self.sizes)
        self.span = slice(first, first + self.rows)
        self.token, self.share = token[self.span], share[self.span]

    def multiply(self, rows: Tensor, matrices: Tensor, out: Tensor) -> None:
        """`rows` of each piece times its expert's matrix."""
        for expert, left, into in zip(self.experts, rows.split(self.sizes), out.split(self.sizes), strict=True):
            if 1 < len(left) <= FEW:
                into.copy_(torch.mm(matrices[expert].t(), left.t()).t())
            else:
                torch.mm(left, matrices[expert], out=into)

    def accumulate(self, left: Tensor, right: Tensor, out: Tensor, begun: set[int]) -> None:
        """Adds `left`.T `right` of each piece to its expert's gradient; the first piece overwrites what is there."""
        for expert, rows, columns in zip(self.experts, left.split(self.sizes), right.split(self.sizes), strict=True):
            slope = out[expert]
            torch.addmm(slope, rows.t(), columns, beta=int(expert in begun), out=slope)


def _works(weight: Tensor, order: Tensor, ends: Tensor) -> list[_Work]:
    token = order // weight.shape[1]
    share = weight.reshape(-1).index_select(0, order)[:, None]
    return [_Work(block, token, share) for block in _blocks(ends.tolist())]


@torch.library.custom_op("vlm::experts", mutates_args=())
def blocked(
    x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, order: Tensor, ends: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """`mix` block by block; with `keep` also what the gates and ups gave (P 2*H), which backward needs."""
    works, width = _works(weight, order, ends), down.shape[2]
    most = max((work.rows for work in works), default=0)
    into, out_of = gate_up.transpose(1, 2), down.transpose(1, 2)
    rows = x.new_empty(most, x.shape[1])
    inner = x.new_empty(most, width) if keep else rows.new_empty(0)
    kept = x.new_empty(len(order) if keep else most, 2 * width)
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for work in works:
        part, both = rows[: work.rows], kept[work.span] if keep else kept[: work.rows]
        torch.index_select(x, 0, work.token, out=part)
        work.multiply(part, into, both)
        gate, up = both.split(width, 1)
        a = inner[: work.rows] if keep else gate
        torch.ops.aten.silu.out(gate, out=a).mul_(up).mul_(work.share)
        work.multiply(a, out_of, part)
        total.index_add_(0, work.token, part.to(total.dtype))
    return total.to(x.dtype), kept if keep else kept.new_empty(0)


@blocked.register_fake
def _(
    x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, order: Tensor, ends: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(order.shape[0], gate_up.shape[1]) if keep else x.new_empty(0)


@torch.library.custom_op("vlm::experts_backward", mutates_args=())
def blocked_backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, order: Tensor, ends: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and weight; the activations are computed again, only products are kept."""
    works, width = _works(weight, order, ends), down.shape[2]
    most = max((work.rows for work in works), default=0)
    rows, d_both = x.new_empty(most, x.shape[1]), x.new_empty(most, 2 * width)
    d_inner, scratch = x.new_empty(most, width), x.new_empty(most, width)
    dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
    d_share = weight.new_zeros(len(order))
    begun: set[int] = set()
    for work in works:
        part, dh, da, t = (buffer[: work.rows] for buffer in (rows, d_both, d_inner, scratch))
        (gate, up), (a, s) = kept[work.span].split(width, 1), dh.split(width, 1)
        torch.index_select(grad, 0, work.token, out=part)
        work.multiply(part, down, da)
        torch.ops.aten.silu.out(gate, out=s)
        torch.mul(s, up, out=a)
        d_share[work.span] = torch.mul(a, da, out=t).sum(1, dtype=weight.dtype)
        work.accumulate(part, a.mul_(work.share), d_down, begun)
        s.mul_(da.mul_(work.share))  # From here on a and s turn into the gradients of gate and up.
        torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=a)
        torch.index_select(x, 0, work.token, out=part)
        work.accumulate(dh, part, d_gate_up, begun)
        begun.update(work.experts)
        work.multiply(dh, gate_up, part)
        dx.index_add_(0, work.token, part.to(dx.dtype))
    for expert in set(range(len(gate_up))) - begun:
        d_gate_up[expert].zero_()
        d_down[expert].zero_()
    d_weight = torch.empty_like(d_share).scatter_(0, order, d_share).view_as(weight)
    return dx.to(x.dtype), d_gate_up, d_down, d_weight


@blocked_backward.register_fake
def _(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, order: Tensor, ends: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate_up), torch.empty_like(down), torch.empty_like(weight)


def _remember(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.set_materialize_grads(False)  # what is kept has no gradient: a large zero for it would be made


def _differentiate(ctx: FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, gate_up, down, weight, order, ends, kept = ctx.saved_tensors  # type: ignore[attr-defined]
    return *blocked_backward(grad.contiguous(), x, gate_up, down, weight, order, ends, kept), None, None, None


blocked.register_autograd(_differentiate, setup_context=_remember)
