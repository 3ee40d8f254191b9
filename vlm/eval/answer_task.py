"""Questions about pictures put to a model: VQA accuracy of what it writes, likelihoods of given choices."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vlm.captions import usual_decoding
from vlm.data.image import BadSample, decode
from vlm.data.pictures import PICTURES, Folder
from vlm.data.shards import MIN_SEEN
from vlm.data.talk import ask
from vlm.eval.answers import TITLES, Question, most_frequent, read_questions, score_answers
from vlm.eval.choices import count_alike, likeliest, likelihoods
from vlm.eval.gallery import small
from vlm.eval.outcome import Outcome
from vlm.eval.report import Card, Gallery, Score, Section, Table
from vlm.model.describe import answer
from vlm.model.generate import Decoding
from vlm.model.vlm import need
from vlm.nn.backend import fast_float32
from vlm.restore import Ready

SHOWN = 24  # pictures on the page
CHOICES = {"choice_sum": "Choice, likelihood", "choice_mean": "Choice, likelihood per token"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Said:
    """What came of a question: the answer, and of choices which is `likeliest` by sum and by mean."""

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
    number. ValueError: a model trained on captions, a picture that is not there, choices that the model cannot read
    whole, likelihoods that are not finite, more unusable questions than the model's data may have unusable samples,
    what `read_questions` refuses.
    """
    ready.form("")  # a model that was trained on captions says so
    asked = read_questions(questions, annotations)
    folder = _Pictures(images)
    for question in asked:
        folder.name(question)
    if alike := count_alike(ready, asked):
        log.warning("%d questions have a wrong choice of the same tokens as the right one: they count as wrong", alike)
    decoding = usual_decoding(ready, question=True) if decoding is None else decoding
    said, bad = _ask(ready, asked, folder, decoding, seed, str(questions))
    found = _Figures({}, {}, {}, {}, {}, [])
    if written := [one for one in said if not one.question.choices]:
        found.add_written(written)
    if chosen := [one for one in said if one.question.choices]:
        found.add_chosen(chosen)
    return Outcome(
        metrics={**found.metrics, **({"by_kind": found.by_kind} if found.by_kind else {})},
        chance=found.chance,
        counts={"questions": len(asked), "open": len(written), "choices": len(chosen), "unusable": dict(bad)},
        protocol={
            "decoding": repr(decoding),
            "seed": seed,
            "normalisation": "of VQA's evaluation code",
            "chance": "always the most frequent answer; of choices any",
            "ties": "count against the model",
            "choices_alike": alike,
            "notes": found.notes,
        },
        values=found.values,
        groups=found.groups,
        sections=_sections(folder, said, found),
    )


@dataclass
class _Figures:
    """Percentages, those of chance, and each question's own value with the picture that it is about."""

    metrics: dict[str, float | None]
    chance: dict[str, float | None]
    by_kind: dict[str, Mapping[str, float | None]]
    values: dict[str, Tensor]
    groups: dict[str, list[str]]
    notes: list[str]

    def add_written(self, said: Sequence[_Said]) -> None:
        """Answers in the model's own words."""
        questions = [one.question for one in said]
        scores = score_answers([one.text for one in said], questions)
        always = most_frequent(questions)
        self.chance |= score_answers([always] * len(said), questions).metrics
        self.by_kind |= scores.by_kind
        self.notes += scores.notes
        self.metrics |= dict.fromkeys(scores.metrics)
        for name, values in scores.each.items():
            self._add(name, values, said)

    def add_chosen(self, said: Sequence[_Said]) -> None:
        """Choices: the likeliest as a whole, and the likeliest per token."""
        for name, which in (("choice_sum", "by_sum"), ("choice_mean", "by_mean")):
            self._add(name, [float(getattr(one, which) == one.question.right) for one in said], said)
            self.chance[name] = 100 * sum(1 / len(one.question.choices) for one in said) / len(said)

    def _add(self, name: str, values: Sequence[float], said: Sequence[_Said]) -> None:
        self.metrics[name] = 100 * sum(values) / len(values)
        self.values[f"answers/{name}"] = 100 * torch.tensor(values, dtype=torch.float64)
        self.groups[f"answers/{name}"] = [one.question.image for one in said]


class _Pictures:
    """Pictures of a folder by path, or by the number at the end of their names (COCO_val2014_000000000042.jpg)."""

    def __init__(self, images: Path) -> None:
        self._folder = Folder(images)
        self._numbers: dict[str, list[str]] = defaultdict(list)
        for file in sorted(images.iterdir()):
            if file.suffix.lower()[1:] in PICTURES.split(";") and (found := re.search(r"(\d+)$", file.stem)):
                self._numbers[found[1].lstrip("0")].append(file.name)

    def name(self, question: Question) -> str:
        """ValueError: there is none, or several have that number."""
        number, path = question.image.lstrip("0"), self._folder.path / question.image
        if question.image and path.is_file():
            return question.image
        named = self._numbers.get(number, []) if question.image.isdigit() else []
        if len(named) > 1:
            raise ValueError(
                f"question {question.id}: picture {question.image} may be {named[0]} or {named[1]} in "
                f"{self._folder.path}: leave one of that number in the folder (--images)"
            )
        if named:
            return named[0]
        raise ValueError(f"question {question.id}: no picture {question.image!r} in {self._folder.path} (--images)")

    def read(self, question: Question) -> bytes:
        """As it is stored. BadSample."""
        return self._folder.read(self.name(question))


def _ask(
    ready: Ready, asked: Sequence[Question], folder: _Pictures, decoding: Decoding, seed: int, where: str
) -> tuple[list[_Said], Counter[str]]:
    """Answers in the order of the questions; those about pictures that cannot be read are left out and counted.

    ValueError: more of these than the model's data may have unusable samples.
    """
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
        if (seen := min(start + ready.batch_size, len(asked))) >= MIN_SEEN:
            _refuse_bad(bad, seen, ready.data.max_bad_fraction, where)
        with fast_float32():
            said += _batch(ready, found, decoding, generator)
    if not said:
        raise ValueError(f"no question can be asked: {dict(bad)}")
    _refuse_bad(bad, len(asked), ready.data.max_bad_fraction, where)
    return said, bad


def _refuse_bad(bad: Counter[str], seen: int, limit: float, where: str) -> None:
    if bad.total() > limit * seen:
        counts = ", ".join(f"{reason}: {count}" for reason, count in bad.most_common())
        raise ValueError(
            f"{where}: {bad.total()} of {seen} questions are unusable ({counts}), more than max_bad_fraction={limit}; "
            "repair their pictures, or leave these questions out"
        )


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
            likely = likelihoods(ready, question, image)
            by_sum, by_mean = (likeliest(scores, question.right or 0) for scores in (likely.total, likely.mean))
            done[number] = _Said(question, question.choices[by_mean], by_sum, by_mean)
    return [done[number] for number in range(len(found))]


def _progress(steps: Sequence[int]) -> Iterator[int]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(steps, description="questions")


def _sections(folder: _Pictures, said: Sequence[_Said], found: _Figures) -> list[Section]:
    titles = TITLES | CHOICES
    rows: list[list[str | Score]] = [
        [titles[name], f"{floor:.1f} %", Score(value, floor)]
        for name, value in found.metrics.items()
        if value is not None and (floor := found.chance[name]) is not None
    ]
    every = max(1, len(said) // SHOWN)
    cards = []
    for one in said[::every][:SHOWN]:
        right = one.question.answers or [one.question.choices[one.question.right or 0]]
        correct = score_answers([one.text], [one.question]).metrics["exact"] == 100
        wanted = " | ".join(dict.fromkeys(right))
        cards.append(Card(small(folder.read(one.question)), f"{one.question.text} {one.text}", wanted, correct))
    note = " ".join(["Chance: always the most frequent answer; of choices any of them.", *found.notes])
    return [Table("Answers", ["", "Chance", "Answers"], rows, note), Gallery("Questions and answers", cards)]
