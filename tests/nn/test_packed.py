"""Packed layers give what plain ones give, are used only where they are faster, and replace the plain ones."""

import pytest
import torch
from torch import nn

from vlm.nn import packed
from vlm.nn.attention import Attention
from vlm.nn.ffn import GatedMlp
from vlm.nn.packed import PackedLinear, pack_for_decoding


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_the_product_is_that_of_the_plain_layer(rows: int, bias: bool, dtype: torch.dtype, error: float) -> None:
    layer = nn.Linear(48, 80, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(2, rows, 48).to(dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    for weight in (layer.weight, layer.weight.T.contiguous().T):  # as layout stores tall ones
        found = PackedLinear(weight, layer.bias)(x)
        assert found.dtype == dtype and found.shape == exact.shape
        assert float((found.double() - exact).norm() / exact.norm()) < error
    without = PackedLinear(layer.weight)(x)
    assert bias is not torch.equal(without, found)


def stack() -> nn.Module:
    return nn.ModuleList([Attention(48, 4, 2, bias=True), GatedMlp(48, 80)])


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(part) is kind for part in module.modules())


@pytest.mark.parametrize(
    ("dtype", "rows", "exact", "fast", "packs"),
    [
        (torch.float32, 2, True, True, False),
        (torch.float32, 3, True, True, True),
        (torch.float32, 3, False, True, False),
        (torch.bfloat16, 1, True, True, True),
        (torch.bfloat16, 40, True, False, False),
        (torch.float64, 40, True, True, False),
    ],
)
def test_packed_only_where_it_pays(
    dtype: torch.dtype, rows: int, exact: bool, fast: bool, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "onednn_is_exact", lambda: exact)
    monkeypatch.setattr(packed, "bfloat16_is_fast", lambda device: fast)
    module = stack().to(dtype)
    assert pack_for_decoding(module, rows) is packs
    assert (count(module, PackedLinear), count(module, nn.Linear)) == ((7, 0) if packs else (0, 7))
    assert not packs or not list(module.parameters())


def test_a_module_without_linear_layers_stays() -> None:
    assert not pack_for_decoding(nn.LayerNorm(4), 40)
