"""Words in soft tokens: what a connector gives a language model, compared with the words that the model reads.

Letters: B images, Q soft tokens, D width of the language model, W words to choose from.
"""

import math

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.07


def word_logits(
    soft: Float[Tensor, "B Q D"], words: Float[Tensor, "W D"], temperature: float = TEMPERATURE
) -> Float[Tensor, "B Q W"]:
    """Cosine of each soft token and each word's embedding, both seen from the middle of all words."""
    middle = words.mean(0)
    ours, theirs = functional.normalize(soft - middle, dim=-1), functional.normalize(words - middle, dim=-1)
    return ours @ theirs.T / temperature


def word_loss(
    soft: Float[Tensor, "B Q D"],
    words: Float[Tensor, "W D"],
    target: Int[Tensor, "B Q"],
    label_smoothing: float = 0.0,
    pull: float = 0.3,
) -> Float[Tensor, ""]:
    """Cross-entropy of the word at each soft token, and `pull` times its squared distance from that word.

    The direction tells words apart; the distance keeps soft tokens as long as embeddings are, which the language model
    was trained on. The distance is measured in the variance of the words.
    """
    choice = functional.cross_entropy(
        word_logits(soft, words).flatten(0, 1), target.flatten(), label_smoothing=label_smoothing
    )
    apart = functional.mse_loss(soft, words[target]) / words.var()
    return choice + pull * apart


def chance(words: int, pull: float = 0.3) -> float:
    """The loss of soft tokens in the middle of all words: none is likelier, the distance is the variance."""
    return math.log(words) + pull
