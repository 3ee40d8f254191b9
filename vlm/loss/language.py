"""Language-modelling loss.

Letters: B rows, T text tokens, K supervised tokens, D width, V vocabulary.
"""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm.nn.tokens import IGNORE


def supervised(
    hidden: Float[Tensor, "B T D"], labels: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "K D"], Int[Tensor, "K"]]:
    """Hidden states that predict a supervised token, and those tokens: position t predicts the label of t + 1.

    Picking them before the vocabulary projection saves its cost on prompts and padding.
    """
    following = labels[:, 1:]
    chosen = following != IGNORE
    return hidden[:, :-1][chosen], following[chosen]


def language(logits: Float[Tensor, "K V"], target: Int[Tensor, "K"], label_smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Mean cross-entropy per supervised token; a batch without one is an error, not a zero."""
    if target.numel() == 0:
        raise ValueError("this batch has no supervised token: every caption is empty or was cut away by max_tokens")
    return cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
