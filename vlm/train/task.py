"""Task: a model and its objectives in one forward pass, with everything they share computed once.

Letters: B images, M texts, P pairs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.data.batch import Batch, Text
from vlm.loss import contrastive, language, matching
from vlm.model.vlm import Seen, VisionLanguageModel, need
from vlm.nn.moe import Routing
from vlm.nn.tokens import IGNORE

BALANCE = "balance"  # the losses that keep experts equally used


class Pull(NamedTuple):
    """Slopes of a loss over more than one batch, for the vectors of this one and the temperature (`vlm.train.pool`)."""

    image: Float[Tensor, "B Q E"]
    text: Float[Tensor, "M E"]
    log_scale: Float[Tensor, "1"]


class Vectors(NamedTuple):
    """What a contrastive loss is made of, without gradients."""

    image: Float[Tensor, "B Q E"]
    text: Float[Tensor, "M E"]
    log_scale: Float[Tensor, "1"]


Pulling = Pull | Callable[[Vectors], Pull]  # known slopes, or how they follow from the vectors


class Views:
    """What a batch looks like to the model; each view is computed when first asked for, and once."""

    def __init__(self, model: VisionLanguageModel, batch: Batch) -> None:
        """`batch` is on the model's device."""
        self.model, self.batch = model, batch
        self.pull: Pull | None = None  # where the contrastive loss is made over more than this batch
        self.routings: list[Routing] = []  # of the mixtures of experts that were passed

    @cached_property
    def encoded(self) -> Float[Tensor, "B N C"]:
        """Image tokens of the encoder."""
        return self.model.encode(self.batch.pixels)

    @cached_property
    def seen(self) -> Seen:
        """The images, looked at once."""
        return self.model.connect(self.encoded)

    @property
    def shown(self) -> Seen:
        """The images that the rows of the prompts show, in order; looked at as their instructions ask, if any do."""
        batch = self.batch
        if batch.instructions is not None:
            index = batch.owner if batch.shown is None else batch.shown
            if not len(index):  # a blank picture that no text shows: see `collate_talks`
                return self.model.connect(self.encoded, batch.instructions).select(index)
            return self.model.connect(self.encoded[index], batch.instructions)
        seen = replace(self.seen, memory=None)
        if batch.shown is not None:
            return seen.select(batch.shown)
        # Mostly each text belongs to the image of its own row.
        return seen if len(batch.owner) == batch.size else seen.select(batch.owner)

    @cached_property
    def logits(self) -> Float[Tensor, "B M"]:
        """Contrastive logits of all images and texts of the batch."""
        out: Tensor = need(self.model.contrast, "contrastive head")(self.image, self.text)
        return out

    @cached_property
    def image(self) -> Float[Tensor, "B Q E"]:
        """Unit vectors of the images."""
        return self.model.embed_image(self.seen)

    @cached_property
    def text(self) -> Float[Tensor, "M E"]:
        """Unit vectors of the texts."""
        return self.model.embed_text(self.batch.captions)

    def vectors(self) -> Vectors:
        """For a contrastive loss over several batches."""
        scale = need(self.model.contrast, "contrastive head").log_scale
        return Vectors(self.image.detach(), self.text.detach(), scale.detach())


@runtime_checkable
class Objective(Protocol):
    """One loss over the views of a batch."""

    name: str
    weight: float

    def share(self, batch: Batch) -> int:
        """How much a micro-batch counts among those of one step."""
        ...

    def chance(self, images: int, texts: int) -> float:
        """The loss of a model that knows nothing, for batches of so many images and texts."""
        ...

    def __call__(self, views: Views) -> Tensor:
        """The mean loss of the batch."""
        ...


class Itc:
    """Image-text contrastive loss."""

    name = "itc"

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0, passes: int = 1) -> None:
        """`label_smoothing`: 0.1 in BLIP-2. `passes`: over so many passes of a step together (`vlm.train.pool`)."""
        self.weight, self.label_smoothing, self.passes = weight, label_smoothing, passes

    @property
    def pooled(self) -> bool:
        """Is it made over several passes?"""
        return self.passes > 1

    def share(self, batch: Batch) -> int:
        """By texts."""
        return len(batch.owner)

    def chance(self, images: int, texts: int) -> float:
        """ln B, if there is one text per image."""
        return contrastive.chance(self.passes * images, self.passes * texts)

    def __call__(self, views: Views) -> Float[Tensor, ""]:
        """Mean of both directions; where slopes are given, what has them as its gradient."""
        if (pull := views.pull) is not None:
            scale = need(views.model.contrast, "contrastive head").log_scale
            parts = (views.image * pull.image).sum(), (views.text * pull.text).sum(), (scale * pull.log_scale).sum()
            return torch.stack(parts).sum()
        return self.loss(views.logits, views.batch.positive)

    def loss(self, logits: Float[Tensor, "B M"], positive: Bool[Tensor, "B M"]) -> Float[Tensor, ""]:
        """Of given logits."""
        return contrastive.contrastive(logits, positive, self.label_smoothing)


class Itm:
    """Image-text matching loss on pairs that the contrastive logits find hard."""

    name = "itm"

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        """`label_smoothing` keeps the head from being surer than a small data set warrants; BLIP-2 has none."""
        self.weight, self.label_smoothing = weight, label_smoothing

    def share(self, batch: Batch) -> int:
        """By texts."""
        return len(batch.owner)

    def chance(self, images: int, texts: int) -> float:
        """Entropy of one positive among two negatives."""
        return matching.chance(self.label_smoothing)

    def __call__(self, views: Views) -> Float[Tensor, ""]:
        """Cross-entropy over 3 M pairs."""
        batch = views.batch
        pairs = matching.hard_pairs(views.logits, batch.positive, batch.owner)
        seen = replace(views.seen, state=None).select(pairs.image)
        logits = views.model.match_logits(seen, batch.captions.select(pairs.text))
        return matching.matching(logits, pairs.match, self.label_smoothing)


class Lm:
    """Language modelling of the captions after their images."""

    name = "lm"

    def __init__(self, vocabulary: int, dec: int, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        """`dec`: the token that starts a text written by the Q-Former itself ([DEC] in BLIP-2)."""
        self.vocabulary, self.dec = vocabulary, dec
        self.weight, self.label_smoothing = weight, label_smoothing

    def share(self, batch: Batch) -> int:
        """By supervised tokens, so that accumulating changes nothing."""
        return int(torch.count_nonzero(self._text(batch).written.labels[:, 1:] != IGNORE))

    def chance(self, images: int, texts: int) -> float:
        """ln V."""
        return math.log(self.vocabulary)

    def __call__(self, views: Views) -> Float[Tensor, ""]:
        """Mean per supervised token."""
        batch = views.batch
        text = self._text(batch)
        written = views.model.write(None if batch.images is None else views.shown, text)
        views.routings += written.routings
        hidden, target = language.supervised(written.hidden, text.written.labels)
        return language.language(views.model.logits(hidden), target, self.label_smoothing)

    def _text(self, batch: Batch) -> Text:
        return batch.prompts if batch.prompts is not None else written_by_qformer(batch.captions, self.dec)


def written_by_qformer(captions: Text, dec: int) -> Text:
    """Captions with the start token that tells the Q-Former to write rather than to read."""
    ids = captions.ids.clone()
    ids[:, 0] = dec
    return replace(captions, ids=ids)


class Losses(NamedTuple):
    """The weighted sum, and each loss by itself (detached)."""

    total: Float[Tensor, ""]
    each: dict[str, Tensor]
    routings: tuple[Routing, ...] = ()  # what each mixture of experts did


class Task(nn.Module):
    """One forward pass from batch to loss: the thing to wrap in DDP, FSDP2 or compile."""

    def __init__(self, model: VisionLanguageModel, objectives: Sequence[Objective]) -> None:
        """`objectives` have different names."""
        super().__init__()
        self.model, self.objectives = model, list(objectives)

    def train(self, mode: bool = True) -> "Task":
        """Parts in which nothing learns stay in evaluation mode: no dropout, and no batch statistics that drift."""
        super().train(mode)
        for part in self.model.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def forward(self, batch: Batch, shares: dict[str, float] | None = None, pull: Pulling | None = None) -> Losses:
        """`shares`: of each objective, what part of the step this micro-batch is (1 unless given).

        `pull`: slopes of a contrastive loss over the whole step, which then stands in the total without its weight.
        """
        views = Views(self.model, batch)
        if pull is not None:  # the vectors first, as when the slopes were found, so that dropout draws the same numbers
            vectors = views.vectors()
            views.pull = pull(vectors) if callable(pull) else pull
        each = {objective.name: objective(views) for objective in self.objectives}
        weights = {o.name: o.weight * (1.0 if shares is None else shares[o.name]) for o in self.objectives}
        if pull is not None:
            weights[Itc.name] = 1.0
        if views.routings:  # only the language model has experts, so they count as its texts do
            each[BALANCE] = torch.stack([routing.balance for routing in views.routings]).sum()
            weights[BALANCE] = 1.0 if shares is None else shares[Lm.name]
        total = torch.stack([weights[name] * loss for name, loss in each.items()]).sum()
        return Losses(total, {name: loss.detach() for name, loss in each.items()}, tuple(views.routings))

    @torch.no_grad()
    def vectors(self, batch: Batch) -> Vectors:
        """Of a batch, by the draws that `forward` makes with a `pull`."""
        return Views(self.model, batch).vectors()

    def alone(self, objective: Objective, batch: Batch) -> Tensor:
        """One objective's loss."""
        return objective(Views(self.model, batch))
