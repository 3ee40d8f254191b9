"""Questions with choices: which one a model finds likeliest as the answer. Ties count against the model.

Letters: R choices.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.data.image import BadSample
from vlm.data.talk import Talk, ask
from vlm.data.talk_batch import TalkForm
from vlm.eval.answers import Question
from vlm.model.likelihood import Likelihood, likelihood
from vlm.restore import Ready

ROUNDINGS = 8  # likelihoods that differ by no more of them are equal


def likelihoods(ready: Ready, question: Question, image: Float[Tensor, "3 H W"]) -> Likelihood:
    """Of each choice as the answer. ValueError: one that is not finite."""
    form, talks = _talks(ready, question)
    try:
        return likelihood(ready.model, form, talks, image[None], torch.zeros(len(talks), dtype=torch.long))
    except ValueError as error:
        raise ValueError(f"question {question.id}: {error}") from None


def likeliest(scores: Float[Tensor, "R"], right: int) -> int:
    """The place of the largest of finite `scores`; of those that are equal but for rounding, one that is not right."""
    others = scores.clone()
    others[right] = -torch.inf
    other = int(others.argmax())
    slack = ROUNDINGS * torch.finfo(scores.dtype).eps * scores[right].abs()
    return right if scores[right] > others[other] + slack else other


def count_alike(ready: Ready, asked: Sequence[Question]) -> int:
    """Questions with a wrong choice that is the right one in tokens. ValueError: a choice that would be cut."""
    return sum(_alike(ready, question) for question in asked if question.choices)


def _alike(ready: Ready, question: Question) -> bool:
    form, talks = _talks(ready, question)
    try:
        cut = [choice for choice, talk in zip(question.choices, talks, strict=True) if form.cuts(talk)]
    except BadSample as bad:
        raise ValueError(f"question {question.id}: {bad}") from None
    if cut:
        raise ValueError(
            f"question {question.id}: choice {cut[0]!r:.40} has no room in the {form.max_tokens} tokens that "
            f"{ready.name} reads (data.max_tokens), and its beginning alone is another answer: shorten the choice, or "
            "leave the question out"
        )
    texts = [form.prompt(talk).text for talk in talks]
    ids = [(text.reply or text).ids for text in texts]
    return ids.count(ids[question.right or 0]) > 1


def _talks(ready: Ready, question: Question) -> tuple[TalkForm, list[Talk]]:
    """The question with each choice as its answer."""
    form, words, _ = ready.form(question.text)
    return form, [ask(words, 1, choice) for choice in question.choices]
