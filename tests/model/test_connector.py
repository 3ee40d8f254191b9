"""Connectors: depth, widths and token counts, by hand."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from vlm.model.connector import AttentionPool, FirstToken, MeanPool, MlpConnector
from vlm.model.vlm import Connector


@pytest.mark.parametrize(("depth", "hidden", "widths"), [(1, None, []), (2, None, [7]), (3, 9, [9, 9])])
def test_mlp_has_linear_layers_with_gelu_between(depth: int, hidden: int | None, widths: list[int]) -> None:
    connector = MlpConnector(5, 7, tokens=4, depth=depth, hidden=hidden)
    layers = [module for module in connector.layers if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in layers] == [*widths, 7]
    image = torch.randn(2, 4, 5)
    expected = image
    for i, layer in enumerate(layers):
        expected = (gelu(expected) if i else expected) @ layer.weight.T + layer.bias
    torch.testing.assert_close(connector(image), expected)
    assert (connector.tokens, connector.dim) == (4, 7)


def test_every_token_passes_by_itself() -> None:
    connector, image = MlpConnector(5, 7, tokens=4), torch.randn(2, 4, 5)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(connector(image[:, order]), connector(image)[:, order])


def test_pools_by_hand() -> None:
    image = torch.tensor([[[1.0, 10.0], [3.0, 30.0]]])
    assert MeanPool(2)(image).tolist() == [[[2.0, 20.0]]]
    assert FirstToken(2)(image).tolist() == [[[1.0, 10.0]]]
    assert (MeanPool(2).tokens, FirstToken(2).dim) == (1, 2)


@pytest.mark.parametrize("connector", [MlpConnector(5, 7, 4), MeanPool(5), FirstToken(5)])
def test_all_are_connectors(connector: nn.Module) -> None:
    assert isinstance(connector, Connector)


@pytest.mark.parametrize("queries", [1, 5])
@torch.no_grad()
def test_attention_pool_is_torchs_attention_from_queries_to_image(queries: int) -> None:
    ffn, out_norm = nn.Linear(8, 8), nn.LayerNorm(8)
    pool = AttentionPool(6, 8, queries, 2, ffn, norms=nn.LayerNorm, ffn_norm=nn.LayerNorm(8), out_norm=out_norm)
    for parameter in pool.parameters():
        parameter.normal_()
    image = torch.randn(3, 7, 6)
    theirs = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    parts = (pool.attention.query, pool.attention.key, pool.attention.value)
    for name, part in zip("qkv", parts, strict=True):
        getattr(theirs, f"{name}_proj_weight").copy_(part.weight)
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(pool.attention.out.state_dict())
    seen = pool.image_norm(image)
    x = theirs(pool.query_norm(pool.queries).expand(3, -1, -1), seen, seen)[0]
    torch.testing.assert_close(pool(image), out_norm(x + ffn(pool.ffn_norm(x))), atol=1e-5, rtol=1e-5)
    assert (pool.tokens, pool.dim) == (queries, 8)
