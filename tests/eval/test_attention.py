"""The weights of cross-attention are those by which the Q-Former reads the image; what is drawn follows them."""

import math

import pytest
import torch
from torch import nn

from vlm.data.image import as_pixels
from vlm.eval.attention import attention, grid, overlay
from vlm.model.qformer import QFormer
from vlm.nn.attention import CrossAttention


@pytest.fixture
def qformer() -> QFormer:
    """Three blocks, of which the first and the last look at the image; keys and queries that differ."""
    made = QFormer(12, 16, layers=3, heads=2, queries=5, hidden=32).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def test_weights_are_those_of_the_plain_formula(qformer: QFormer) -> None:
    image = torch.randn(2, 9, 12)
    given: list[tuple[CrossAttention, torch.Tensor, torch.Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, object], output: torch.Tensor) -> None:
        assert isinstance(module, CrossAttention)
        given.append((module, inputs[0], output))

    crosses = [module for module in qformer.modules() if isinstance(module, CrossAttention)]
    for cross in crosses:
        cross.register_forward_hook(keep)
    found = attention(qformer, image)
    assert len(found) == len(given) == 2
    seen = qformer.image_norm(image)
    for weights, (module, x, output) in zip(found, given, strict=True):
        assert weights.shape == (2, 2, 5, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))
        query, key, value = module.query(x), module.key(seen), module.value(seen)
        parts = []
        for head in range(2):
            here = slice(8 * head, 8 * head + 8)
            scores = torch.einsum("bqk,bnk->bqn", query[..., here], key[..., here]) / math.sqrt(8)
            plain = scores.exp() / scores.exp().sum(-1, keepdim=True)
            torch.testing.assert_close(weights[:, head], plain, atol=1e-5, rtol=1e-4)
            parts.append(plain @ value[..., here])
        torch.testing.assert_close(module.out(torch.cat(parts, -1)), output, atol=1e-4, rtol=1e-4)


def test_the_model_is_left_as_it_was(qformer: QFormer) -> None:
    attention(qformer, torch.randn(1, 9, 12))
    assert not any(module._forward_pre_hooks for module in qformer.modules())


@pytest.mark.parametrize(
    ("tokens", "size", "found"),
    [
        (4, (64, 64), (0, 2, 2)),
        (257, (224, 224), (1, 16, 16)),
        (261, (224, 224), (5, 16, 16)),
        (8, (64, 128), (0, 2, 4)),
        (33, (128, 64), (1, 8, 4)),
        (32, (64, 64), None),
        (1, (64, 64), (0, 1, 1)),
    ],
)
def test_grids(tokens: int, size: tuple[int, int], found: tuple[int, int, int] | None) -> None:
    assert grid(tokens, size) == found


def test_the_brightest_place_is_the_one_looked_at() -> None:
    grey = torch.full((3, 40, 80), 128, dtype=torch.uint8)
    weights = torch.zeros(2, 2)
    weights[1, 0] = 1.0
    image = overlay(grey, weights)
    assert image.size == (112, 56)
    light = as_pixels(image.convert("L").convert("RGB"))[0]
    corners = {(y, x): int(light[y, x]) for y in (3, 52) for x in (3, 108)}
    assert max(corners, key=lambda at: corners[at]) == (52, 3)
    assert corners[52, 3] > 1.5 * corners[3, 108]
