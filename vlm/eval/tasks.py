"""What `vlm evaluate` can do, in one place: names of tasks and the functions that give their outcomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.eval.answer_task import answers
from vlm.eval.caption_task import captions
from vlm.eval.data import EvaluationData, open_evaluation_data
from vlm.eval.outcome import Outcome
from vlm.eval.ranking import retrieval_task
from vlm.eval.zeroshot import classify
from vlm.restore import Ready


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; a task takes from it what concerns it."""

    shards: Sequence[str]
    caption: str | None = None  # where captions stand; the model's own setting unless given
    protocol: str | None = None
    rerank: int = 16
    seed: int = 0
    images: Path | None = None  # the folder that paths in a table or JSON file are relative to
    features: Path | None = None  # where vectors are kept for a later run
    labels: str | None = None  # where classes stand
    classes: str | None = None  # a file with their names
    templates: str | None = None  # a file with prompts
    annotations: Path | None = None  # the answers, where they stand apart from the questions (VQA)

    def open(self, trained: Ready) -> EvaluationData:
        """The data, read as the model's own unless said otherwise."""
        return open_evaluation_data(self.shards, trained.data, self.protocol, self.caption, self.labels, self.images)

    def questions(self) -> tuple[Path, Path]:
        """The file of questions and the folder of their pictures. ValueError: several files, one of them is missing."""
        if len(self.shards) != 1:
            raise ValueError(f"--task answers: one file of questions is read, not {len(self.shards)}")
        if self.images is None:
            raise ValueError("--task answers: name the folder of the pictures that are asked about (--images FOLDER)")
        if not self.images.is_dir():
            raise ValueError(f"--images {self.images}: no such folder")
        questions = Path(self.shards[0])
        if not questions.is_file():
            raise ValueError(f"{questions}: no such file of questions")
        return questions, self.images


@dataclass(frozen=True)
class Task:
    """A function that gives an outcome; `questions`: its data is a file of questions, and none is opened for it."""

    run: Callable[[Ready, Request, EvaluationData | None], Outcome]
    questions: bool = False


def _opened(data: EvaluationData | None) -> EvaluationData:
    assert data is not None, "only tasks on questions are without"
    return data


TASKS: Mapping[str, Task] = {
    "retrieval": Task(lambda t, r, d: retrieval_task(t, _opened(d), r.rerank, r.seed, r.features)),
    "captions": Task(lambda t, r, d: captions(t, _opened(d), seed=r.seed)),
    "answers": Task(lambda t, r, _: answers(t, *r.questions(), r.annotations, seed=r.seed), questions=True),
    "classification": Task(lambda t, r, d: classify(t, _opened(d), r.classes, r.templates, r.features)),
}


def check(asked: Request, named: Sequence[str]) -> None:
    """What is known before the model is. ValueError: tasks on questions beside others, or without their pictures."""
    on_questions = [name for name in named if TASKS[name].questions]
    if others := [name for name in dict.fromkeys(named) if name not in on_questions] if on_questions else []:
        raise ValueError(
            f"--task {on_questions[0]} is on a file of questions, and {', '.join(others)} on pictures: one at a time"
        )
    if "answers" in on_questions:
        asked.questions()


def chosen_tasks(trained: Ready, asked: Request, named: Sequence[str]) -> tuple[list[str], EvaluationData | None]:
    """The tasks, what the model can do unless named, and their data; None: it is a file of questions.

    ValueError: nothing that the model can do; data that cannot be opened.
    """
    names = list(dict.fromkeys(named))
    if any(TASKS[name].questions for name in names):
        return names, None
    data = asked.open(trained)
    return names or default_tasks(trained, data), data


def default_tasks(trained: Ready, data: EvaluationData) -> list[str]:
    """What the model can do: classification where the data has classes; else retrieval, and captions if it writes.

    ValueError: nothing.
    """
    contrasts = trained.model.contrast is not None
    if data.labels is not None:
        can = {"classification": contrasts}
    else:
        can = {"retrieval": contrasts, "captions": trained.writes}
    found = [name for name in TASKS if can.get(name)]
    if not found:
        raise ValueError(f"{trained.name} was trained without itc, so it cannot rank images and texts")
    return found
