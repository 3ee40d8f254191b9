"""Questions about pictures put to a model: VQA accuracy of what it writes, likelihoods of given choices."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vlm.data.image import BadSample, decode
from vlm.data.pictures import Folder
from vlm.data.talk import ask
from vlm.eval.answers import Question, most_frequent, read_questions, score_answers
from vlm.eval.gallery import small
from vlm.eval.outcome import Outcome
from vlm.eval.report import Card, Gallery, Score, Section, Table
from vlm.model.describe import answer
from vlm.model.generate import Decoding
from vlm.model.likelihood import Likelihood, likelihood
from vlm.model.vlm import need
from vlm.nn.backend import fast_float32
from vlm.restore import Ready, usual_decoding

SHOWN = 24  # pictures on the page
TITLES = {
    "vqa": "VQA accuracy",
    "exact": "Exact match",
    "anls": "ANLS",
    "choice_sum": "Choice, likelihood",
    "choice_mean": "Choice, likelihood per token",
}


@dataclass(frozen=True)
class _Said:
    """What came of a question: the answer, and of choices which is likeliest by sum and by mean."""

    question: Question
    text: str
    by_sum: int = 0
    by_mean: int = 0


def answers(
    ready: Ready,
    questions: Path,
    images: Path,
    annotations: Path | None = None,
    decoding: Decoding | None = None,
    seed: int = 0,
) -> Outcome:
    """Asks a model that was trained on conversations; open questions are answered, choices ranked by likelihood.

    `questions`, `annotations`: as of `read_questions`; `images`: the folder of the pictures, which VQA's files name by
    number. ValueError: a model trained on captions, a picture that is not there, what `read_questions` refuses.
    """
    ready.form("")  # a model that was trained on captions says so
    asked = read_questions(questions, annotations)
    folder = _Pictures(images)
    for question in asked:
        folder.name(question)
    decoding = usual_decoding(ready, question=True) if decoding is None else decoding
    said, bad = _ask(ready, asked, folder, decoding, seed)
    open_ones, chosen = [one for one in said if not one.question.choices], [one for one in said if one.question.choices]
    metrics, chance, values, groups = (
        dict[str, float](),
        dict[str, float](),
        dict[str, Tensor](),
        dict[str, list[str]](),
    )
    by_kind = {}
    if open_ones:
        scores = score_answers([one.text for one in open_ones], [one.question for one in open_ones])
        always = most_frequent([one.question for one in open_ones])
        metrics |= scores.metrics
        chance |= score_answers([always] * len(open_ones), [one.question for one in open_ones]).metrics
        by_kind = scores.by_kind
        for name, each in scores.each.items():
            values[f"answers/{name}"] = torch.tensor(each, dtype=torch.float64)
            groups[f"answers/{name}"] = [one.question.image for one in open_ones]
    if chosen:
        for name, own in (("choice_sum", _right(chosen, "by_sum")), ("choice_mean", _right(chosen, "by_mean"))):
            values[f"answers/{name}"], groups[f"answers/{name}"] = own, [one.question.image for one in chosen]
            metrics[name] = 100 * float(own.mean())
            chance[name] = 100 * sum(1 / len(one.question.choices) for one in chosen) / len(chosen)
    return Outcome(
        metrics=metrics | ({"by_kind": by_kind} if by_kind else {}),
        chance=chance,
        counts={"open": len(open_ones), "choices": len(chosen), "unusable": dict(bad)},
        protocol={
            "decoding": repr(decoding),
            "seed": seed,
            "normalisation": "of VQA's evaluation code",
            "chance": "always the most frequent answer; of choices any",
        },
        values=values,
        groups=groups,
        sections=_sections(folder, said, metrics, chance),
    )


class _Pictures:
    """Pictures of a folder by path, or by the number at the end of their names (COCO_val2014_000000000042.jpg)."""

    def __init__(self, images: Path) -> None:
        self._folder = Folder(images)
        self._numbers: dict[str, str] = {}
        for file in sorted(images.iterdir()):
            if found := re.search(r"(\d+)$", file.stem):
                self._numbers.setdefault(found[1].lstrip("0"), file.name)

    def name(self, question: Question) -> str:
        """ValueError: there is none."""
        number, path = question.image.lstrip("0"), self._folder.path / question.image
        if question.image and path.is_file():
            return question.image
        if question.image.isdigit() and number in self._numbers:
            return self._numbers[number]
        raise ValueError(f"question {question.id}: no picture {question.image!r} in {self._folder.path} (--images)")

    def read(self, question: Question) -> bytes:
        """As it is stored. BadSample."""
        return self._folder.read(self.name(question))


def _ask(
    ready: Ready, asked: Sequence[Question], folder: _Pictures, decoding: Decoding, seed: int
) -> tuple[list[_Said], Counter[str]]:
    """Answers in the order of the questions; those about pictures that cannot be read are left out and counted."""
    generator = torch.Generator(next(ready.model.parameters()).device).manual_seed(seed)
    said, bad = list[_Said](), Counter[str]()
    for start in _progress(range(0, len(asked), ready.batch_size)):
        found: list[tuple[Question, Tensor]] = []
        for question in asked[start : start + ready.batch_size]:
            try:
                image = decode(folder.read(question))
            except BadSample as reason:
                bad[reason.reason] += 1
                continue
            found.append((question, need(ready.model.vision, "image encoder").transform(image)))
        with fast_float32():
            said += _batch(ready, found, decoding, generator)
    if not said:
        raise ValueError(f"no question can be asked: {dict(bad)}")
    return said, bad


def _batch(
    ready: Ready, found: Sequence[tuple[Question, Tensor]], decoding: Decoding, generator: torch.Generator
) -> list[_Said]:
    done: dict[int, _Said] = {}
    open_ones = [number for number, (question, _) in enumerate(found) if not question.choices]
    if open_ones:
        forms = [ready.form(found[number][0].text) for number in open_ones]
        form, _, stop = forms[0]
        talks = [ask(words, 1) for _, words, _ in forms]
        images = torch.stack([found[number][1] for number in open_ones]).to(generator.device)
        texts = answer(ready.model, form, talks, images, decoding, generator, stop)
        done |= {number: _Said(found[number][0], text) for number, text in zip(open_ones, texts, strict=True)}
    for number, (question, image) in enumerate(found):
        if question.choices:
            likely = _choices(ready, question, image)
            by_sum, by_mean = int(likely.total.argmax()), int(likely.mean.argmax())
            done[number] = _Said(question, question.choices[by_mean], by_sum, by_mean)
    return [done[number] for number in range(len(found))]


def _choices(ready: Ready, question: Question, image: Tensor) -> Likelihood:
    """Of each choice as the answer."""
    form, words, _ = ready.form(question.text)
    talks = [ask(words, 1, choice) for choice in question.choices]
    try:
        return likelihood(ready.model, form, talks, image[None], torch.zeros(len(talks), dtype=torch.long))
    except BadSample as bad:
        raise ValueError(f"question {question.id}: {bad}") from None


def _progress(steps: Sequence[int]) -> Iterator[int]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(steps, description="questions")


def _right(chosen: Sequence[_Said], which: str) -> Tensor:
    return torch.tensor([float(getattr(one, which) == one.question.right) for one in chosen], dtype=torch.float64)


def _sections(
    folder: _Pictures, said: Sequence[_Said], metrics: dict[str, float], chance: dict[str, float]
) -> list[Section]:
    rows: list[list[str | Score]] = [
        [TITLES[name], f"{chance[name]:.1f} %", Score(value, chance[name])] for name, value in metrics.items()
    ]
    every = max(1, len(said) // SHOWN)
    cards = []
    for one in said[::every][:SHOWN]:
        right = one.question.answers or [one.question.choices[one.question.right or 0]]
        correct = score_answers([one.text], [one.question]).metrics["exact"] == 100
        wanted = " | ".join(dict.fromkeys(right))
        cards.append(Card(small(folder.read(one.question)), f"{one.question.text} {one.text}", wanted, correct))
    note = "Chance: always the most frequent answer; of choices any of them."
    return [Table("Answers", ["", "Chance", "Answers"], rows, note), Gallery("Questions and answers", cards)]
