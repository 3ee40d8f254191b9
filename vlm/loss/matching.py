"""Image-text matching (ITM): does this text belong to this image? Negatives are the ones ITC finds hard.

Letters: B images, M texts, P pairs.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy


class Pairs(NamedTuple):
    """Pairs to judge: image index, text index, and whether they belong together."""

    image: Int[Tensor, "P"]
    text: Int[Tensor, "P"]
    match: Int[Tensor, "P"]


def hard_pairs(
    logits: Float[Tensor, "B M"],
    positive: Bool[Tensor, "B M"],
    owner: Int[Tensor, "M"],
    generator: torch.Generator | None = None,
) -> Pairs:
    """Each text with its image, with a wrong image, and its image with a wrong text (3 M pairs, as in BLIP-2).

    Wrong ones are drawn from the softmax of the ITC logits without the positives; a row in which everything is
    positive gives no negative.
    """
    batch, texts = logits.shape
    every = torch.arange(texts, device=logits.device)
    wrong_image, image_exists = _draw(logits.T, positive.T, generator)
    wrong_text, text_exists = _draw(logits[owner], positive[owner], generator)
    image = torch.cat([owner, wrong_image[image_exists], owner[text_exists]])
    text = torch.cat([every, every[image_exists], wrong_text[text_exists]])
    match = torch.zeros_like(image)
    match[:texts] = 1
    return Pairs(image, text, match)


def _draw(logits: Tensor, positive: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    exists = ~positive.all(1)
    weight = logits.detach().float().masked_fill(positive, -torch.inf).softmax(1)
    # A row without negatives is all NaN here; it is drawn from anyhow and dropped by `exists`.
    weight = torch.where(exists[:, None], weight, torch.ones_like(weight))
    # Sharp logits round far negatives to 0; a floor far below any drawn one keeps positives out and rows drawable.
    weight = weight.clamp_min(1e-30).masked_fill(positive & exists[:, None], 0)
    return torch.multinomial(weight, 1, generator=generator)[:, 0], exists


def matching(logits: Float[Tensor, "P 2"], match: Int[Tensor, "P"], label_smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Cross-entropy of the two-way matching head."""
    return cross_entropy(logits.float(), match, label_smoothing=label_smoothing)


def chance(label_smoothing: float = 0.0) -> float:
    """The loss of a model that only knows that one pair in three matches: 0.637 without smoothing."""
    share = (1 - label_smoothing) / 3 + label_smoothing / 2
    return -share * math.log(share) - (1 - share) * math.log(1 - share)
