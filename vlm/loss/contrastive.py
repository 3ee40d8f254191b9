"""Image-text contrastive loss (ITC) for any number of captions per image.

Letters: B images, M texts, Q vectors per image, E embedding width.
"""

import math

from jaxtyping import Bool, Float
from torch import Tensor

CLIP_LIMIT = 100.0  # of the inverse temperature


def similarity(image: Float[Tensor, "B Q E"], text: Float[Tensor, "M E"]) -> Float[Tensor, "B M"]:
    """Dot product of the text with the image vector that answers it best (BLIP-2); plain CLIP when Q = 1."""
    batch, queries, _ = image.shape
    return (image.flatten(0, 1) @ text.T).view(batch, queries, -1).amax(1)


def contrast_logits(
    image: Float[Tensor, "B Q E"], text: Float[Tensor, "M E"], log_scale: Float[Tensor, "1"], limit: float = CLIP_LIMIT
) -> Float[Tensor, "B M"]:
    """Similarities of unit vectors divided by the temperature."""
    return similarity(image, text) * inverse_temperature(log_scale, limit)


def contrastive(
    logits: Float[Tensor, "B M"], positive: Bool[Tensor, "B M"], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Mean of the image-to-text and the text-to-image cross-entropy; all positives of a row share its target equally.

    With one positive per row this is CLIP's loss (Radford et al. 2021, arXiv 2103.00020), with label smoothing
    BLIP-2's (Li et al. 2023, arXiv 2301.12597). `logits` are similarities divided by the temperature.
    Every image and every text must have a positive.
    """
    return (one_way(logits, positive, label_smoothing) + one_way(logits.T, positive.T, label_smoothing)) / 2


def one_way(logits: Float[Tensor, "R C"], positive: Bool[Tensor, "R C"], smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Mean cross-entropy of rows that choose among columns: one direction of the loss."""
    log_probability = logits.float().log_softmax(1)
    target = positive.float() / positive.sum(1, keepdim=True)
    hit = -(target * log_probability).sum(1)
    return ((1 - smoothing) * hit - smoothing * log_probability.mean(1)).mean()


def chance(images: int, texts: int) -> float:
    """The loss of a model that ranks at random: the mean of ln M and ln B."""
    return (math.log(texts) + math.log(images)) / 2


def inverse_temperature(log_scale: Float[Tensor, "1"], limit: float = CLIP_LIMIT) -> Float[Tensor, "1"]:
    """The inverse temperature, kept at `limit` or less: 100 as CLIP does."""
    return log_scale.clamp(max=math.log(limit)).exp()
