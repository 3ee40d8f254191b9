"""The contrastive head with a bias of its logits: SigLIP's form."""

import math

import pytest
import torch
from torch import nn

from vlm.model.heads import ContrastiveHead


def unit(*rows: list[float]) -> torch.Tensor:
    return nn.functional.normalize(torch.tensor(rows), dim=-1)


@torch.no_grad()
def test_bias_and_probability_by_hand() -> None:
    head = ContrastiveHead(2, 2, 2, temperature=1 / 112, image=nn.Identity(), logit_bias=-16.0)
    image, text = unit([1.0, 0.0]), unit([1.0, 0.0], [0.0, 1.0])
    assert head(image[:, None], text).tolist() == [[pytest.approx(112 - 16, abs=1e-4), -16]]  # beyond CLIP's 100
    assert head.probability(image[:, None], text)[0, 1] == pytest.approx(1 / (1 + math.exp(16)))
    assert torch.equal(head.embed_image(image[:, None]), image[:, None])


@torch.no_grad()
def test_without_a_bias_the_temperature_is_bound_and_there_is_no_probability() -> None:
    head = ContrastiveHead(2, 2, 2, temperature=1 / 112)
    image = unit([1.0, 0.0])
    assert float(head(image[:, None], image)) == pytest.approx(100)
    assert "logit_bias" not in head.state_dict()
    with pytest.raises(ValueError, match="ranks pairs and knows no probability of one: it has no logit bias"):
        head.probability(image[:, None], image)
