"""The objective that teaches a connector a language model's words before the language model itself is run.

A step costs the connector alone, hundreds of times less than one through a frozen language model, which then starts
from soft tokens that are close to words it can read.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.data.batch import Batch
from vlm.loss import words
from vlm.model.vlm import need
from vlm.train.task import Views


class Words:
    """Each soft token is to say the token of the caption at its place; captions are as long as the connector's tokens.

    Whatever the batch, the choice is among all of `vocabulary`, so that it counts as a classification.
    """

    name = "words"

    def __init__(self, vocabulary: Sequence[int], weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        """`vocabulary`: ids of all tokens that captions are made of."""
        self.vocabulary = torch.tensor(sorted(set(vocabulary)))
        self.weight, self.label_smoothing = weight, label_smoothing

    def share(self, batch: Batch) -> int:
        """By texts."""
        return len(batch.owner)

    def chance(self, images: int, texts: int) -> float:
        """Of soft tokens that say nothing."""
        return words.chance(len(self.vocabulary))

    def __call__(self, views: Views) -> Float[Tensor, ""]:
        """Mean over soft tokens; row i of the captions belongs to image i."""
        language = need(views.model.language, "language model")
        ids = self.vocabulary.to(views.batch.owner.device)
        target = torch.searchsorted(ids, views.batch.captions.ids)
        said = language.embed(ids[None])[0].detach().float()
        return words.word_loss(views.seen.soft.float(), said, target, self.label_smoothing)
