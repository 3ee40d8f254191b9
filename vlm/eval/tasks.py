"""What `vlm evaluate` can do, in one place: names of tasks and the functions that give their outcomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlm.eval.outcome import Outcome
from vlm.eval.ranking import retrieval_task
from vlm.restore import Ready


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; a task takes from it what concerns it."""

    shards: Sequence[str]
    caption: str | None = None  # where captions stand; the model's own setting unless given
    protocol: str | None = None
    rerank: int = 16
    seed: int = 0


Task = Callable[[Ready, Request], Outcome]

TASKS: Mapping[str, Task] = {
    "retrieval": lambda trained, asked: retrieval_task(trained, asked.shards, asked.caption, asked.rerank, asked.seed),
}


def default_tasks(trained: Ready) -> list[str]:
    """What the model can do: retrieval with a contrastive head, captions if it writes. ValueError: neither."""
    can = {"retrieval": trained.model.contrast is not None, "captions": trained.writes}
    found = [name for name in TASKS if can.get(name)]
    if not found:
        raise ValueError(f"{trained.name} has nothing that {' or '.join(TASKS)} measures; name a --task")
    return found
