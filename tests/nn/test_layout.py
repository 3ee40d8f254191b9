"""Weights side by side for decoding: values, names and results stay, and what no longer stands there is noticed."""

import pytest
import torch
from torch import Tensor, nn

from vlm.nn.attention import Attention
from vlm.nn.context import Context
from vlm.nn.ffn import GatedMlp
from vlm.nn.layout import Readers, joined, lay_out_for_decoding
from vlm.nn.retention import Decay, Retention
from vlm.nn.tokens import Tokens

DIM = 16


def apply(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, GatedMlp):
        return module(x)
    tokens = Tokens.of(x)
    fading = Decay(2, DIM // 2)(tokens) if isinstance(module, Retention) else None
    out: Tensor = module(x, Context(tokens, tokens.visibility(), fading=fading))[0]
    return out


def noised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


MODULES = {
    "retention": lambda: Retention(DIM, 2, 24),
    "attention": lambda: Attention(DIM, 4),
    "grouped attention": lambda: Attention(DIM, 4, 2),
    "attention with biases": lambda: noised(Attention(DIM, 4, 2, bias=True)),
    "gated": lambda: GatedMlp(DIM, 40),
}


def weights(module: nn.Module) -> list[Tensor]:
    assert isinstance(module, Readers)
    return [layer.weight for layer in module.readers()]  # type: ignore[misc]


@pytest.mark.parametrize("name", MODULES)
def test_the_same_values_and_results_from_one_product(name: str) -> None:
    module = MODULES[name]()
    x = torch.randn(2, 5, DIM)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    expected = apply(module, x)
    assert joined(weights(module)) is None
    lay_out_for_decoding(module)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    whole = joined(weights(module))
    assert whole is not None and torch.equal(whole, torch.cat(weights(module)))
    assert whole.data_ptr() == weights(module)[0].data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(apply(module, x), expected)
    torch.testing.assert_close(apply(module, x), expected)


def test_a_weight_that_was_replaced_is_used() -> None:
    module = GatedMlp(DIM, 40)
    lay_out_for_decoding(module)
    module.up = nn.Linear(DIM, 40, bias=False)
    assert joined(weights(module)) is None
    x = torch.randn(3, DIM)
    with torch.no_grad():
        expected = module.down(module.activation(module.gate(x)) * module.up(x))
        torch.testing.assert_close(module(x), expected)


def test_a_bias_that_was_replaced_is_used() -> None:
    module = noised(Attention(DIM, 4, bias=True))
    lay_out_for_decoding(module)
    x = torch.randn(2, 5, DIM)
    with torch.no_grad():
        before = apply(module, x)
        module.value.bias = nn.Parameter(module.value.bias + 1)
        torch.testing.assert_close(apply(module, x), before + module.out.weight.sum(1))


def test_layers_of_another_kind_are_applied_one_by_one() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = GatedMlp(DIM, 40)
    module.up = Doubled(DIM, 40, bias=False)
    x = torch.randn(3, DIM)
    expected = module(x)
    lay_out_for_decoding(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


def test_biases_of_some_layers_are_not_forgotten() -> None:
    module = noised(Attention(DIM, 4, bias=True, key_bias=False))
    x = torch.randn(2, 5, DIM)
    expected = apply(module, x)
    lay_out_for_decoding(module)
    assert joined(weights(module)) is None
    with torch.no_grad():
        torch.testing.assert_close(apply(module, x), expected)


def test_every_weight_still_gets_its_gradient() -> None:
    module = Retention(DIM, 2, 24)
    x = torch.randn(2, 5, DIM)
    lay_out_for_decoding(module)
    apply(module, x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in module.parameters())


def test_wide_matrices_are_stored_by_columns() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 12), nn.Linear(12, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[3, 8, 0]])
    expected = model(ids)
    lay_out_for_decoding(model)
    assert [part.weight.is_contiguous() for part in model] == [False, False, True]  # type: ignore[union-attr, operator]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(model(ids), expected)
