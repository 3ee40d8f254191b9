"""The mixture of experts against a loop over tokens and their choices, with every gradient."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.model.test_placement import on_fake_cuda
from vlm.nn import experts
from vlm.nn.experts import Plan, blocked, grouped, mix
from vlm.nn.ffn import GatedMlp
from vlm.nn.moe import (
    Balance,
    GatedShared,
    MixtureOfExperts,
    Router,
    sigmoid_router,
    softmax_router,
    update_bias,
)

D, H = 5, 3


def mixture(router: Router, dim: int = D, hidden: int = H, **rest: object) -> MixtureOfExperts:
    """Weights large enough that nothing vanishes."""
    moe = MixtureOfExperts(dim, hidden, router, **rest)  # type: ignore[arg-type]
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    return moe


def naive(moe: MixtureOfExperts, x: Tensor, valid: Tensor) -> Tensor:
    """Token by token and choice by choice."""
    choice = moe.router(x.flatten(0, 1))
    rows = []
    for n, token in enumerate(x.flatten(0, 1)):
        row = torch.zeros_like(token)
        for k, e in enumerate(choice.expert[n].tolist()):
            gate, up = (moe.gate_up[e] @ token).chunk(2)
            if valid.flatten()[n]:
                row = row + choice.weight[n, k] * (moe.down[e] @ (gate / (1 + (-gate).exp()) * up))
        rows.append(row)
    out = torch.stack(rows).view_as(x) if rows else torch.zeros_like(x)
    return out if moe.shared is None else out + moe.shared(x)


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weight).sum(), of, materialize_grads=True, allow_unused=True)


ROUTERS: dict[str, Callable[[int, int], Router]] = {
    "softmax": lambda experts, top_k: softmax_router(D, experts, top_k),
    "raw": lambda experts, top_k: softmax_router(D, experts, top_k, renormalize=False, scale=1.7),
    "sigmoid": lambda experts, top_k: sigmoid_router(D, experts, top_k, scale=2.5),
}


@given(
    kind=st.sampled_from(sorted(ROUTERS)),
    rows=st.sampled_from([0, 1, 2, 3]),
    tokens=st.sampled_from([0, 1, 2, 7]),
    sizes=st.integers(1, 6).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    padded=st.booleans(),
    block=st.sampled_from([1, 3, 8, 1024]),
    seed=st.integers(0, 99),
)
def test_equals_a_loop_over_tokens_with_gradients(
    kind: str, rows: int, tokens: int, sizes: tuple[int, int], dtype: torch.dtype, padded: bool, block: int, seed: int
) -> None:
    torch.manual_seed(seed)
    moe = mixture(ROUTERS[kind](*sizes), shared=GatedMlp(D, 2 * H)).to(dtype)
    x = torch.randn(rows, tokens, D, dtype=dtype, requires_grad=True)
    valid = torch.rand(rows, tokens) < 0.6 if padded else torch.ones(rows, tokens, dtype=torch.bool)
    with patch.object(experts, "ROWS", block):
        found, routing = moe(x, valid if padded else None)
        mine = gradients(found, x, *moe.parameters())
    expected = naive(moe, x, valid)
    tolerance = {"atol": 1e-10, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(found, expected, **tolerance)
    for ours, theirs in zip(mine, gradients(expected, x, *moe.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(moe(x, valid if padded else None)[0], expected, **tolerance)
    assert routing.load.sum() == valid.sum() * sizes[1]


def test_a_wrong_expert_would_be_noticed() -> None:
    moe = mixture(softmax_router(D, 4, 2))
    x = torch.randn(2, 7, D)
    expected = naive(moe, x, torch.ones(2, 7, dtype=torch.bool))
    moe.down.data = moe.down.data.roll(1, 0)
    assert float((moe(x)[0] - expected).detach().abs().max()) > 0.1


def test_one_expert_may_get_everything() -> None:
    moe = mixture(softmax_router(D, 4, 1)).double()
    x = torch.rand(1, 50, D, dtype=torch.float64) + 0.1
    moe.router.weight.data.zero_()
    moe.router.weight.data[2] = 9.0
    with patch.object(experts, "ROWS", 16):
        found, routing = moe(x)
        mine = gradients(found, *moe.parameters())
    assert routing.load.tolist() == [0, 0, 50, 0]
    expected = naive(moe, x, torch.ones(1, 50, dtype=torch.bool))
    for ours, theirs in zip(mine, gradients(expected, *moe.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert float(mine[1][2].abs().min()) > 0 and float(mine[1][[0, 1, 3]].abs().max()) == 0


@given(ends=st.lists(st.integers(0, 90), min_size=1, max_size=9), rows=st.integers(1, 30))
def test_blocks_cover_every_pair_once(ends: list[int], rows: int) -> None:
    total = [sum(ends[: i + 1]) for i in range(len(ends))]
    with patch.object(experts, "ROWS", rows):
        blocks = list(experts._blocks(total))
    pairs = [e for _, pieces in blocks for e, count in pieces for _ in range(count)]
    assert pairs == [e for e, count in enumerate(ends) for _ in range(count)]
    sizes = [sum(count for _, count in pieces) for _, pieces in blocks]
    assert max(sizes, default=0) <= rows
    # The backward pass may then overwrite an expert's gradient at its first piece and add at the later ones.
    assert all(len({e for e, _ in pieces}) == len(pieces) for _, pieces in blocks)
    assert [first for first, _ in blocks] == [sum(sizes[:i]) for i in range(len(sizes))]


class Unwritten(torch.autograd.Function):
    """Rows after the last group hold NaN, as fresh memory of a GPU may, in both directions."""

    @staticmethod
    def forward(ctx: object, rows: Tensor, used: Tensor) -> Tensor:
        ctx.used = used  # type: ignore[attr-defined]
        return rows.masked_fill(~used, torch.nan)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.masked_fill(~ctx.used, torch.nan), None  # type: ignore[attr-defined]


def poisoned(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    used = (torch.arange(len(rows)) < ends[-1])[:, None]
    done = torch.nn.functional.grouped_mm(Unwritten.apply(rows, used).nan_to_num(), matrices, offs=ends)
    return Unwritten.apply(done, used)


@pytest.mark.parametrize("padded", [False, True])
def test_the_grouped_way_equals_the_blocked_one(padded: bool) -> None:
    valid = torch.rand(40) < 0.6
    leaves = [torch.randn(*size) for size in ((40, 8), (5, 32, 8), (5, 8, 16), (40, 2))]
    x, gate_up, down, weight = (leaf.requires_grad_() for leaf in leaves)
    plan = Plan.of(torch.rand(40, 5).topk(2).indices, 5, valid if padded else None)
    found = mix(x, gate_up, down, weight, plan, padded)
    with patch.object(experts, "_grouped_mm", poisoned):
        expected = grouped(x, gate_up, down, weight, plan, padded)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients(found, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_order_of_tokens_does_not_matter() -> None:
    moe, x = mixture(sigmoid_router(D, 6, 2)), torch.randn(1, 30, D)
    turn = torch.randperm(30)
    torch.testing.assert_close(moe(x[:, turn])[0], moe(x)[0][:, turn], atol=1e-5, rtol=1e-5)
    assert torch.equal(moe(x[:, turn])[1].load, moe(x)[1].load)


LOSSES = (Balance(0.3), Balance(0.2, groups=3), Balance(0.1, per_row=True))


def test_padding_has_no_influence() -> None:
    moe, x = mixture(softmax_router(D, 6, 2), balance=LOSSES), torch.randn(2, 6, D)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    noisy = torch.where(valid[..., None], x, 100.0)
    out, routing = moe(x, valid)
    again, same = moe(noisy, valid)
    assert torch.equal(out, again) and all(torch.equal(a, b) for a, b in zip(routing, same, strict=True))
    assert not out[1, 4:].any()
    alone = [moe(row[None])[1] for row in (x[0], x[1, :4])]
    assert torch.equal(routing.load, alone[0].load + alone[1].load)
    means = (6 * alone[0].entropy + 4 * alone[1].entropy) / 10
    torch.testing.assert_close(routing.entropy, means)


def spelled_out(loss: Balance, expert: Tensor, share: Tensor, valid: Tensor) -> float:
    """DeepSeekMoE's equations 12 to 17, counted by hand for each row, or for all rows as one."""
    rows = range(len(valid)) if loss.per_row else [slice(None)]
    losses = []
    for row in rows:
        tokens = valid[row].nonzero(as_tuple=True)
        chosen, likely = expert[row][tokens].tolist(), share[row][tokens]
        if not chosen:
            continue
        count = share.shape[-1]
        f = [count / len(chosen[0]) / len(chosen) * sum(c.count(e) for c in chosen) for e in range(count)]
        p = likely.mean(0).tolist()
        size = 1 if loss.groups is None else count // loss.groups
        starts = range(0, count, size)
        losses.append(sum(sum(f[s : s + size]) / size * sum(p[s : s + size]) for s in starts))
    return loss.alpha * sum(losses) / len(losses)


@pytest.mark.parametrize("loss", LOSSES)
def test_balance_losses_follow_the_equations(loss: Balance) -> None:
    share, expert = torch.rand(3, 7, 6).softmax(-1), torch.rand(3, 7, 6).topk(2).indices
    valid = torch.rand(3, 7) < 0.5
    valid[1] = False
    assert loss(expert, share, valid).item() == pytest.approx(spelled_out(loss, expert, share, valid), rel=1e-5)


@pytest.mark.parametrize("router", [softmax_router(D, 6, 2, renormalize=False), sigmoid_router(D, 6, 2)])
def test_a_uniform_router_costs_exactly_alpha(router: Router) -> None:
    moe = mixture(router, balance=LOSSES)
    router.weight.data.zero_()
    _, routing = moe(torch.randn(2, 8, D))
    # Any choice gives alpha when all probabilities are equal, device groups as well.
    assert routing.balance.item() == pytest.approx(0.6, rel=1e-6)
    assert float(routing.entropy) == pytest.approx(math.log(6), rel=1e-6)


def test_balance_has_a_gradient_and_the_rest_has_none() -> None:
    moe = mixture(softmax_router(D, 6, 2), balance=[Balance(1.0)])
    _, routing = moe(torch.randn(2, 8, D))
    (slope,) = torch.autograd.grad(routing.balance, moe.router.weight)
    assert float(slope.abs().max()) > 0
    assert not routing.load.requires_grad and not routing.entropy.requires_grad
    assert mixture(softmax_router(D, 6, 2))(torch.randn(1, 3, D))[1].balance.item() == 0


@pytest.mark.parametrize("make", [softmax_router, sigmoid_router])
def test_bias_balances_the_load_and_not_the_weights(make: Callable[..., Router]) -> None:
    router = make(D, 6, 2, renormalize=False, bias=True)
    nn.init.normal_(router.weight, std=0.3)
    moe, x = MixtureOfExperts(D, H, router).requires_grad_(False), torch.randn(1, 600, D) + 0.5
    before = moe(x)[1].load
    for _ in range(300):
        update_bias(router, moe(x)[1].load, 0.002)
    after = moe(x)[1].load
    assert float(after.max() - after.min()) < 0.2 * float(before.max() - before.min())
    choice = router(x[0])
    score = router.score(nn.functional.linear(x[0], router.weight))
    torch.testing.assert_close(choice.weight, score.gather(1, choice.expert))
    assert "bias" in router.state_dict()


def test_bias_moves_by_the_rate_only() -> None:
    router = softmax_router(D, 3, 1, bias=True)
    update_bias(router, torch.tensor([9.0, 0.0, 3.0]), 0.5)
    assert router.bias is not None and router.bias.tolist() == [-0.5, 0.5, 0.5]
    update_bias(router, torch.tensor([2.0, 2.0, 2.0]), 0.5)
    assert router.bias.tolist() == [-0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="bias=True"):
        update_bias(softmax_router(D, 3, 1), torch.ones(3), 0.5)


def test_groups_limit_the_choice() -> None:
    router = sigmoid_router(D, 12, 4, groups=4, top_groups=2)
    nn.init.normal_(router.weight)
    x = torch.randn(50, D)
    expert = router(x).expert
    assert all(len(set(row)) <= 2 for row in (expert // 3).tolist())
    pairs = router.score(x @ router.weight.T).unflatten(1, (4, 3)).topk(2).values.sum(2)
    best = pairs.topk(2).indices.sort(1).values.tolist()
    assert [sorted(set(row)) for row in (expert // 3).tolist()] == best


def test_bf16_computes_and_routes_in_fp32() -> None:
    moe, x = mixture(sigmoid_router(8, 4, 2), dim=8, hidden=8), torch.randn(2, 5, 8)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = moe(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = moe(x)
        assert moe.router(x[0]).weight.dtype == torch.float32
    moe.bfloat16()
    x = x.bfloat16().requires_grad_()
    found, routing = moe(x)
    assert moe.router.bias is not None and moe.router.bias.dtype == torch.float32
    assert found.dtype == cast.dtype == torch.bfloat16 and routing.load.dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(cast.float(), expected, atol=0.05, rtol=0.05)
    assert all(bool(part.isfinite().all()) for part in gradients(found, x, *moe.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_forward_stays_on_the_device(dtype: torch.dtype, padded: bool) -> None:
    moe = mixture(sigmoid_router(16, 8, 2, groups=4, top_groups=2), 16, 8, shared=GatedMlp(16, 8), balance=LOSSES[::2])
    moe.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_fake_cuda(moe, mode)
        x = mode.from_tensor(torch.randn(2, 5, 16, dtype=dtype)).to("cuda")
        valid = mode.from_tensor(torch.ones(2, 5, dtype=torch.bool)).to("cuda") if padded else None
        out, routing = moe(x, valid)
        update_bias(moe.router, routing.load, 0.1)
        assert {part.device.type for part in (out, *routing, moe.router.bias)} == {"cuda"}
        assert out.dtype == dtype and out.shape == x.shape


def test_the_operators_keep_torchs_rules() -> None:
    leaves = [torch.randn(*size, requires_grad=True) for size in ((6, 4), (3, 6, 4), (3, 4, 3), (6, 2))]
    plan = Plan.of(torch.rand(6, 3).topk(2).indices, 3, None)
    # Its own check of gradients compares with eager autograd of the same operator, compiled with moving shapes.
    torch.library.opcheck(blocked, (*leaves, plan.order, plan.ends, True))


COMPILED = """
import torch
from vlm.nn.ffn import GatedMlp
from vlm.nn.moe import Balance, MixtureOfExperts, sigmoid_router
torch.manual_seed(0)
moe = MixtureOfExperts(8, 8, sigmoid_router(8, 4, 2), shared=GatedMlp(8, 8), balance=[Balance(0.1)])
x, valid = torch.randn(2, 6, 8, requires_grad=True), torch.rand(2, 6) < 0.7
compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
results = []
for run in (compiled, moe):
    out, routing = run(x, valid)
    loss = out.square().sum() * 1e4 + routing.balance
    results.append([out, *routing, *torch.autograd.grad(loss, [x, *moe.parameters()])])
torch.testing.assert_close(*results)
with torch.no_grad():
    torch.testing.assert_close(compiled(x)[0], moe(x)[0])
print("equal")
"""


@pytest.mark.slow
def test_compiles_as_one_graph_in_both_directions() -> None:
    # A process of its own: the checks of shapes that the tests switch on cannot be compiled.
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout == "equal\n", done.stderr[-2000:]


def test_a_gated_shared_network() -> None:
    shared, x = GatedShared(D, nn.Identity()), torch.randn(2, 3, D)
    torch.testing.assert_close(shared(x), torch.sigmoid(x @ shared.gate.weight[0])[..., None] * x)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"top_k": 5}, "top_k=5 exceeds experts=4"),
        ({"top_k": 0}, "top_k=0"),
        ({"dim": 0}, "dim=0"),
        ({"groups": 3}, "groups=3 does not divide experts=4"),
        ({"groups": 2, "top_groups": 3}, "top_groups=3 exceeds groups=2"),
        ({"groups": 4, "top_groups": 1}, "top_k=2 exceeds the 1 experts of 1 groups"),
    ],
)
def test_routers_refuse_in_words(numbers: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        softmax_router(**{"dim": D, "experts": 4, "top_k": 2, **numbers})  # type: ignore[arg-type]


def test_mixtures_refuse_in_words() -> None:
    with pytest.raises(ValueError, match="hidden=0"):
        MixtureOfExperts(D, 0, softmax_router(D, 4, 2))
    with pytest.raises(ValueError, match=f"width {D}, but dim=7"):
        MixtureOfExperts(7, H, softmax_router(D, 4, 2))
    with pytest.raises(ValueError, match="groups=3 of a balance loss"):
        MixtureOfExperts(D, H, softmax_router(D, 4, 2), balance=[Balance(0.1, groups=3)])
