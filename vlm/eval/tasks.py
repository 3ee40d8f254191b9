"""What `vlm evaluate` can do, in one place: names of tasks and the functions that give their outcomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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

    def open(self, trained: Ready) -> EvaluationData:
        """The data, read as the model's own unless said otherwise."""
        return open_evaluation_data(self.shards, trained.data, self.protocol, self.caption, self.labels, self.images)


Task = Callable[[Ready, Request], Outcome]

TASKS: Mapping[str, Task] = {
    "retrieval": lambda t, r: retrieval_task(t, r.open(t), r.rerank, r.seed, r.features),
    "classification": lambda t, r: classify(t, r.shards, r.labels, r.classes, r.templates, r.images, r.features),
}


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
