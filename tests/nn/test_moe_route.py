"""Experts for one kind of token among networks for others: each sees its own tokens, and its load is counted once."""

import pytest
import torch
from torch import Tensor, nn

from vlm.nn.attention import Attention
from vlm.nn.block import Block, PreNorm, Stack
from vlm.nn.ffn import GatedMlp
from vlm.nn.moe import MixtureOfExperts, feed, softmax_router
from vlm.nn.route import PerRoute
from vlm.nn.tokens import Route, Tokens

D = 8


def experts(shared: nn.Module | None = None) -> MixtureOfExperts:
    moe = MixtureOfExperts(D, 6, softmax_router(D, 4, 2), shared)
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    return moe


def routed() -> PerRoute:
    torch.manual_seed(0)
    return PerRoute({Route.IMAGE: experts(), Route.TEXT: experts(GatedMlp(D, 4)), Route.QUERY: GatedMlp(D, 4)})


def layout(valid: Tensor | None = None) -> Tokens:
    """Two images around a text and queries, so that a route stands in two places."""
    parts = [(Route.IMAGE, 3), (Route.TEXT, 4), (Route.QUERY, 2), (Route.IMAGE, 2)]
    made = [Tokens.of(torch.randn(2, n, D), route, valid=valid if route == Route.TEXT else None) for route, n in parts]
    whole = made[0]
    for part in made[1:]:
        whole = whole.concat(part)
    return whole


@pytest.mark.parametrize("padded", [False, True])
def test_each_token_meets_its_own_network(padded: bool) -> None:
    ffn = routed()
    valid = torch.tensor([[True, True, False, False], [True, True, True, True]]) if padded else None
    tokens = layout(valid)
    found, routings = feed(ffn, tokens.x, tokens)
    for column, route in enumerate(tokens.route[0].tolist()):
        module, rows = ffn.routes[Route(route).name.lower()], tokens.valid[:, column]
        one = tokens.x[rows, column : column + 1]
        expected = module(one)[0] if isinstance(module, MixtureOfExperts) else module(one)
        torch.testing.assert_close(found[rows, column : column + 1], expected)
    counts = [int((tokens.valid & (tokens.route == int(route))).sum()) for route in (Route.IMAGE, Route.TEXT)]
    assert [int(routing.load.sum()) for routing in routings] == [2 * count for count in counts]


def test_static_and_dynamic_layouts_agree_with_gradients() -> None:
    ffn, tokens = routed(), layout()
    results = []
    for given in (tokens, tokens.dynamic()):
        y, routings = feed(ffn, tokens.x, given)
        results.append([y, *(r.load for r in routings), *torch.autograd.grad(y.sin().sum(), list(ffn.parameters()))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_stack_tells_what_each_mixture_did() -> None:
    blocks = [
        Block(Attention(D, 2), ffn, PreNorm(nn.LayerNorm(D)), PreNorm(nn.LayerNorm(D)))
        for ffn in (experts(), GatedMlp(D, 4), routed(), PerRoute({route: GatedMlp(D, 4) for route in Route}))
    ]
    tokens = layout()
    out = Stack(blocks)(tokens)
    total = 2 * tokens.x.shape[0] * tokens.x.shape[1]
    assert [int(routing.load.sum()) for routing in out.routings] == [total, 2 * 2 * 5, 2 * 2 * 4]
