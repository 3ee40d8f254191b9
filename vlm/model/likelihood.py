"""How likely a model finds given answers to a question about a picture.

Letters: B pictures, R answers to all of them, T text tokens, K supervised tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm.data.batch import pad
from vlm.data.talk import Talk
from vlm.data.talk_batch import TalkForm
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.tokens import IGNORE


class Likelihood(NamedTuple):
    """Of each answer: log probability, and the tokens that it is the sum over, its end among them."""

    total: Float[Tensor, "R"]
    tokens: Int[Tensor, "R"]

    @property
    def mean(self) -> Float[Tensor, "R"]:
        """Per token: what long answers do not lose by."""
        return self.total / self.tokens


@torch.no_grad()
def likelihood(
    model: VisionLanguageModel,
    form: TalkForm,
    talks: Sequence[Talk],
    images: Float[Tensor, "B 3 H W"],
    owner: Int[Tensor, "R"],
) -> Likelihood:
    """Log likelihood of the answers in `talks`, each about picture `owner`, one picture and one answer a talk.

    BadSample: a question that leaves no room for an answer. ValueError: a likelihood that is not finite.
    """
    prompts = [form.prompt(talk) for talk in talks]
    device = next(model.parameters()).device
    images, owner = images.to(device), owner.to(device)
    text = pad([prompt.text for prompt in prompts], form.tokenizer.pad).to(device)
    if form.reader is None:
        seen = model.see(images).select(owner)
    else:
        beside = pad([one for prompt in prompts for one in prompt.instructions], form.reader.tokenizer.pad).to(device)
        seen = model.connect(model.encode(images)[owner], beside)
    hidden, labels = model.write(seen, text).hidden[:, :-1], text.written.labels[:, 1:]
    chosen = labels != IGNORE
    losses = cross_entropy(model.logits(hidden[chosen]).float(), labels[chosen], reduction="none")
    rows = chosen.nonzero()[:, 0]
    total = torch.zeros(len(talks), device=device).index_add(0, rows, -losses)
    if bad := (~total.isfinite()).nonzero().flatten().tolist():
        raise ValueError(
            f"the model gives a likelihood that is not finite (NaN or infinite), of {talks[bad[0]].answers[-1]!r:.80} "
            "first: no answer can be chosen by it"
        )
    return Likelihood(total, chosen.sum(1))
