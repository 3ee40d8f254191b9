"""Own weights per route: slicing a static layout equals selecting in a dynamic one, gradients included."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vlm.nn.route import PerRoute, call, only
from vlm.nn.tokens import Route, Tokens

ROUTES = (Route.TEXT, Route.IMAGE, Route.QUERY)
runs = st.lists(st.tuples(st.sampled_from(ROUTES), st.integers(1, 3)), min_size=1, max_size=5)


def layout(parts: list[tuple[Route, int]]) -> Tokens:
    made = [Tokens.of(torch.randn(2, length, 4), route) for route, length in parts]
    whole = made[0]
    for part in made[1:]:
        whole = whole.concat(part)
    return whole


def routed() -> PerRoute:
    torch.manual_seed(0)
    return PerRoute({route: nn.Linear(4, 3) for route in ROUTES})


def gradients(y: Tensor, *of: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    return list(torch.autograd.grad((y * weight).sum(), of, materialize_grads=True))


@given(runs)
def test_static_equals_dynamic_with_gradients(parts: list[tuple[Route, int]]) -> None:
    module, tokens = routed(), layout(parts)
    x = tokens.x.requires_grad_()
    static, dynamic = module(x, tokens), module(x, tokens.dynamic())
    torch.testing.assert_close(static, dynamic)
    leaves = (x, *module.parameters())
    torch.testing.assert_close(gradients(static, *leaves), gradients(dynamic, *leaves))


@given(runs)
def test_each_token_goes_through_its_own_module(parts: list[tuple[Route, int]]) -> None:
    module, tokens = routed(), layout(parts)
    found = module(tokens.x, tokens)
    for column, route in enumerate(tokens.route[0].tolist()):
        own = module.routes[Route(route).name.lower()]
        torch.testing.assert_close(found[:, column], own(tokens.x[:, column]))


@given(runs)
def test_only_changes_one_route(parts: list[tuple[Route, int]]) -> None:
    tokens = layout(parts)
    x = tokens.x.requires_grad_()

    def double(part: Tensor) -> Tensor:
        return part * 2

    static, dynamic = only(Route.QUERY, double, x, tokens), only(Route.QUERY, double, x, tokens.dynamic())
    factor = torch.where(tokens.route == Route.QUERY, 2.0, 1.0)[..., None]
    torch.testing.assert_close(static, x * factor)
    torch.testing.assert_close(dynamic, x * factor)
    torch.testing.assert_close(gradients(static, x), gradients(dynamic, x))


def test_neighbouring_runs_of_one_route_are_one_piece() -> None:
    parts = [(Route.TEXT, 1), (Route.TEXT, 2), (Route.IMAGE, 2), (Route.TEXT, 1)]
    assert layout(parts).pieces() == [(Route.TEXT, 3), (Route.IMAGE, 2), (Route.TEXT, 1)]
    assert layout(parts).dynamic().pieces() is None
    empty = Tokens.of(torch.zeros(2, 0, 4), Route.QUERY)
    assert empty.concat(layout([(Route.TEXT, 2)])).pieces() == [(Route.TEXT, 2)]


def test_a_merged_piece_calls_its_module_once() -> None:
    calls: list[int] = []

    def record(part: Tensor) -> Tensor:
        calls.append(part.shape[1])
        return part

    tokens = layout([(Route.TEXT, 1), (Route.TEXT, 2), (Route.IMAGE, 2)])
    only(Route.TEXT, record, tokens.x, tokens)
    assert calls == [3]


def test_rows_that_differ_are_routed_token_by_token() -> None:
    module, tokens = routed(), layout([(Route.TEXT, 2)]).dynamic()
    tokens.route[0, 1] = Route.IMAGE
    found = module(tokens.x, tokens)
    torch.testing.assert_close(found[0, 1], module.routes["image"](tokens.x[0, 1]))
    torch.testing.assert_close(found[1, 1], module.routes["text"](tokens.x[1, 1]))


def test_call_tells_the_routes_only_to_those_who_ask() -> None:
    tokens = layout([(Route.TEXT, 2), (Route.IMAGE, 1)])
    plain, module = nn.Linear(4, 3), routed()
    torch.testing.assert_close(call(plain, tokens.x, tokens), plain(tokens.x))
    torch.testing.assert_close(call(module, tokens.x, tokens), module(tokens.x, tokens))
