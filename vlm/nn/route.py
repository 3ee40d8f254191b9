"""Own weights per kind of token: what VLMo, BEiT-3, CogVLM and the Q-Former need."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.nn.tokens import Route, Tokens


class PerRoute(nn.Module):
    """One module per route; every token goes through its own route's module.

    With a static layout the sequence is sliced; otherwise every module sees every token and the right result is
    selected, which wastes work but has no data-dependent shape. Both give the same output.
    """

    def __init__(self, modules: Mapping[Route, nn.Module]) -> None:
        """`modules`: one per route that can occur; all map B S D to B S D'."""
        super().__init__()
        self.routes = nn.ModuleDict({route.name.lower(): module for route, module in modules.items()})

    def forward(self, x: Float[Tensor, "B S D"], tokens: Tokens) -> Float[Tensor, "B S E"]:
        """`tokens` gives the route of each position of `x`."""
        pieces = tokens.pieces()
        if pieces is not None:
            parts = x.split([length for _, length in pieces], 1)
            done = [self._of(route)(part) for (route, _), part in zip(pieces, parts, strict=True)]
            return done[0] if len(done) == 1 else torch.cat(done, 1)
        return self.each(x, tokens, lambda module, all_tokens, own: module(all_tokens))

    def each(
        self, x: Float[Tensor, "B S D"], tokens: Tokens, apply: Callable[[nn.Module, Tensor, Tensor], Tensor]
    ) -> Float[Tensor, "B S E"]:
        """`apply(module, x, own)` for every module, once; `own` (B S) marks the tokens whose result is taken."""
        out: Tensor | None = None
        for name, module in self.routes.items():
            own = tokens.route == int(Route[name.upper()])
            y = apply(module, x, own)
            out = torch.where(own[..., None], y, torch.zeros_like(y) if out is None else out)
        assert out is not None
        return out

    def _of(self, route: int) -> nn.Module:
        return self.routes[Route(route).name.lower()]


def call(module: nn.Module, x: Float[Tensor, "B S D"], tokens: Tokens) -> Float[Tensor, "B S E"]:
    """Applies a module to tokens, telling it the routes if it is one that asks for them."""
    out: Tensor = module(x, tokens) if isinstance(module, PerRoute) else module(x)
    return out


def only(route: Route, f: Callable[[Tensor], Tensor], x: Float[Tensor, "B S D"], tokens: Tokens) -> Tensor:
    """Applies `f` (B S' D to B S' D) to the tokens of one route and leaves the others as they are."""
    pieces = tokens.pieces()
    if pieces is None:
        return torch.where((tokens.route == int(route))[..., None], f(x), x)
    parts = x.split([length for _, length in pieces], 1)
    done = [f(part) if kind == int(route) else part for (kind, _), part in zip(pieces, parts, strict=True)]
    return done[0] if len(done) == 1 else torch.cat(done, 1)
