"""Where the norms stand, and a stack's memory: cut anywhere, padded on any side, it computes the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlm.nn.attention import Attention, CrossAttention
from vlm.nn.block import Block, BranchNorm, Cross, PostNorm, PreNorm, Stack
from vlm.nn.context import Context
from vlm.nn.ffn import GatedMlp, Mlp, QuickGELU
from vlm.nn.rotary import Rotary
from vlm.nn.route import PerRoute
from vlm.nn.state import KeyValue, LayerState
from vlm.nn.tokens import Route, Tokens

D, H, S = 12, 3, 6


class Double(nn.Module):
    """Stands for a norm in hand-worked cases."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Square(nn.Module):
    """Stands for a branch in hand-worked cases."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


class SquareMixer(nn.Module):
    """A mixer that remembers nothing of use."""

    def forward(self, x: Tensor, context: Context, past: LayerState | None) -> tuple[Tensor, KeyValue]:
        return x * x, KeyValue(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (PreNorm, 3 + 6 * 6),
        (PostNorm, 2 * (3 + 3 * 3)),
        (BranchNorm, 3 + 2 * (3 * 3)),
    ],
)
def test_norm_placements_by_hand(kind: type[PreNorm], expected: float) -> None:
    residual, x = kind(Double()), torch.full((1, 1, 1), 3.0)
    tokens = Tokens.of(x)
    assert float(residual.leave(x, Square()(residual.enter(x, tokens)), tokens)) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (PreNorm, 5 + 10 * 10),
        (PostNorm, 2 * (4 + 4 * 4)),
        (BranchNorm, 3 + 2 * (3 * 3)),
    ],  # from 5, 4, 3 after the mixer
)
def test_a_block_is_mixer_then_ffn(kind: type[PreNorm], expected: float) -> None:
    x = torch.full((1, 1, 1), 1.0)
    tokens = Tokens.of(x)
    block = Block(SquareMixer(), Square(), kind(Double()), kind(Double()))
    found, _, _ = block(x, Context(tokens, tokens.visibility(), None), None, None)
    assert float(found) == expected


def stack_of(kind: type[PreNorm] = PreNorm, rotary: bool = True, ffn: Callable[[], nn.Module] | None = None) -> Stack:
    def block() -> Block:
        body = GatedMlp(D, 16) if ffn is None else ffn()
        return Block(Attention(D, H, 1), body, kind(nn.RMSNorm(D)), kind(nn.RMSNorm(D)))

    return Stack([block() for _ in range(3)], nn.RMSNorm(D), Rotary(D // H, 50.0) if rotary else None).eval()


@pytest.mark.parametrize("kind", [PreNorm, PostNorm, BranchNorm])
@pytest.mark.parametrize("cut", range(1, S))
@pytest.mark.parametrize("grad", [True, False])
def test_cached_equals_uncached_cut_anywhere(kind: type[PreNorm], cut: int, grad: bool) -> None:
    stack, x = stack_of(kind), torch.randn(2, S, D)
    with torch.set_grad_enabled(grad):
        whole = stack(Tokens.of(x))
        first = stack(Tokens.of(x[:, :cut]))
        position = first.state.position[:, None] + torch.arange(S - cut)
        rest = stack(Tokens.of(x[:, cut:], position=position), None, first.state)
    torch.testing.assert_close(torch.cat([first.hidden, rest.hidden], 1), whole.hidden)
    assert torch.equal(rest.state.position, whole.state.position)
    assert torch.equal(rest.state.valid, whole.state.valid)
    if grad:
        expected = torch.autograd.grad(whole.hidden.square().sum(), list(stack.parameters()))
        total = first.hidden.square().sum() + rest.hidden.square().sum()
        torch.testing.assert_close(torch.autograd.grad(total, list(stack.parameters())), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_wrong_positions_would_be_noticed() -> None:
    stack, x = stack_of(), torch.randn(2, S, D)
    first = stack(Tokens.of(x[:, :3]))
    rest = stack(Tokens.of(x[:, 3:]), None, first.state)
    assert float((rest.hidden - stack(Tokens.of(x)).hidden[:, 3:]).abs().max()) > 1e-3


@torch.no_grad()
def test_one_token_at_a_time() -> None:
    stack, x = stack_of(), torch.randn(2, S, D)
    out = stack(Tokens.of(x[:, :1]))
    rows = [out.hidden]
    for i in range(1, S):
        out = stack(Tokens.of(x[:, i : i + 1], position=out.state.position[:, None]), None, out.state)
        rows.append(out.hidden)
    torch.testing.assert_close(torch.cat(rows, 1), stack(Tokens.of(x)).hidden)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_padding_changes_nothing(side: str, causal: bool) -> None:
    stack, x = stack_of(), torch.randn(1, 4, D)
    plain = stack(Tokens.of(x, causal=causal))
    rubbish, flags = torch.full((1, 3, D), 9.0), torch.zeros(1, 3, dtype=torch.bool)
    parts = [(rubbish, flags), (x, torch.ones(1, 4, dtype=torch.bool))]
    parts = parts if side == "left" else parts[::-1]
    valid = torch.cat([flag for _, flag in parts], 1)
    padded = stack(Tokens.of(torch.cat([part for part, _ in parts], 1), causal=causal, valid=valid))
    torch.testing.assert_close(padded.hidden[valid], plain.hidden[0])
    assert padded.state.position.tolist() == plain.state.position.tolist() == [4]
    following = torch.randn(1, 1, D)
    longer = [
        stack(Tokens.of(following, position=out.state.position[:, None]), None, out.state) for out in (plain, padded)
    ]
    torch.testing.assert_close(longer[1].hidden, longer[0].hidden)
    assert longer[1].state.position.tolist() == [5]


@torch.no_grad()
def test_rows_of_different_length_go_on_from_their_own_position() -> None:
    stack, x = stack_of(), torch.randn(2, 4, D)
    valid = torch.tensor([[True, True, False, False], [True, True, True, True]])
    out = stack(Tokens.of(x, valid=valid))
    assert out.state.position.tolist() == [2, 4]
    following = torch.randn(2, 1, D)
    both = stack(Tokens.of(following, position=out.state.position[:, None]), None, out.state).hidden
    short = stack(Tokens.of(x[:1, :2]))
    alone = stack(Tokens.of(following[:1], position=short.state.position[:, None]), None, short.state).hidden
    torch.testing.assert_close(both[:1], alone)


@torch.no_grad()
def test_padding_moves_no_row_on() -> None:
    stack, x = stack_of(), torch.randn(2, 4, D)
    out = stack(Tokens.of(x[:, :3]))
    valid = torch.tensor([[True], [False]])
    longer = stack(Tokens.of(x[:, 3:], valid=valid, position=out.state.position[:, None]), None, out.state)
    assert longer.state.position.tolist() == [4, 3]
    assert longer.state.valid.tolist() == [[True] * 4, [True] * 3 + [False]]


def looking_stack() -> Stack:
    routes = (Route.QUERY, Route.TEXT)

    def block(i: int) -> Block:
        cross = Cross(CrossAttention(D, 5, H), PostNorm(nn.LayerNorm(D)), Route.QUERY)
        ffn = PerRoute({route: Mlp(D, 16) for route in routes})
        norm = PerRoute({route: nn.LayerNorm(D) for route in routes})
        return Block(
            Attention(D, H, bias=True), ffn, PostNorm(nn.LayerNorm(D)), PostNorm(norm), cross if i % 2 == 0 else None
        )

    return Stack([block(i) for i in range(3)]).eval()


def test_cross_attention_is_for_one_route_and_only_where_it_is() -> None:
    stack, image = looking_stack(), torch.randn(2, 4, 5)
    tokens = Tokens.of(torch.randn(2, 2, D), Route.QUERY, False).concat(Tokens.of(torch.randn(2, 3, D), Route.TEXT))
    memory = stack.look(image)
    assert [block is None for block in memory.blocks] == [False, True, False]
    found = stack(tokens, memory).hidden
    torch.testing.assert_close(stack(tokens.dynamic(), memory).hidden, found)
    first = stack.blocks[0]
    assert isinstance(first, Block) and first.cross is not None and memory.blocks[0] is not None
    after = first.cross(tokens.x, tokens, memory.blocks[0])
    assert torch.equal(after[:, 2:], tokens.x[:, 2:])
    norm = first.cross.residual.norm
    torch.testing.assert_close(
        after[:, :2], norm(tokens.x[:, :2] + first.cross.attention(tokens.x[:, :2], memory.blocks[0]))
    )


def test_memory_of_an_image_is_selected_by_row() -> None:
    stack, image, index = looking_stack(), torch.randn(2, 4, 5), torch.tensor([1, 0, 1])
    tokens = Tokens.of(torch.randn(3, 2, D), Route.QUERY, causal=False)
    torch.testing.assert_close(
        stack(tokens, stack.look(image).select(index)).hidden, stack(tokens, stack.look(image[index])).hidden
    )


def test_without_an_image_the_cross_attentions_are_passed_over() -> None:
    stack = looking_stack()
    tokens = Tokens.of(torch.randn(2, 3, D), Route.TEXT, causal=False)
    assert stack(tokens).hidden.shape == (2, 3, D)


def test_permuting_the_batch_permutes_the_output() -> None:
    stack, x, order = stack_of(), torch.randn(4, S, D), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(stack(Tokens.of(x[order])).hidden, stack(Tokens.of(x)).hidden[order])


def test_networks_by_hand() -> None:
    x = torch.randn(2, 3, D)
    gated, plain = GatedMlp(D, 16), Mlp(D, 16, QuickGELU())
    gate = x @ gated.gate.weight.T
    torch.testing.assert_close(gated(x), (gate * gate.sigmoid() * (x @ gated.up.weight.T)) @ gated.down.weight.T)
    up = x @ plain.up.weight.T + plain.up.bias
    torch.testing.assert_close(plain(x), (up * (1.702 * up).sigmoid()) @ plain.down.weight.T + plain.down.bias)


def test_dropout_acts_on_the_branch_alone() -> None:
    residual, x = PreNorm(nn.Identity(), 1.0), torch.ones(1, 2, 3)
    tokens = Tokens.of(x)
    assert torch.equal(residual.train().leave(x, x, tokens), x)
    assert torch.equal(residual.eval().leave(x, x, tokens), 2 * x)
