"""`vlm evaluate`: a trained model against a data set, with a record for programs and a page for people."""

import json as jsonlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from vlm.eval.attention import attention_section
from vlm.eval.data import EvaluationData, open_evaluation_data
from vlm.eval.measure import intervals
from vlm.eval.origin import data_fingerprint
from vlm.eval.outcome import Outcome
from vlm.eval.page import as_text, page_of
from vlm.eval.ranking import rank
from vlm.eval.record import REPORT, default_folder, files_fingerprint, refuse_other, versions, write
from vlm.eval.renamed import NAMED, Names, refuse_unnamed, renamed
from vlm.eval.report import render
from vlm.eval.tasks import TASKS, Request, check, chosen_tasks
from vlm.model.weights.files import fingerprint
from vlm.nn.backend import best_device
from vlm.ready import open_model
from vlm.restore import Ready, Trained

Dtype = Literal["float32", "bfloat16", "float16"]


def evaluate(
    model: str,
    asked: Request,
    tasks: Sequence[str] = (),
    out: Path | None = None,
    dtype: Dtype = "float32",
    overwrite: bool = False,
    json: bool = False,
    parts: Mapping[str, str] | None = None,
    command: str = "",
    names: Names | None = None,
) -> Path:
    """Runs the tasks (what the model can do unless named), writes their record into `out` and prints the figures.

    `model`, `parts`: as of `open_model`. `out`: see `default_folder`. `dtype`: of the computation; weights stay as they
    are. `command`: kept in the record. `names`: prints JSON with the keys of another tool. Returns the folder.
    ValueError: the folder holds another evaluation and `overwrite` is not set; errors of `check` and of the tasks.
    """
    began = time.perf_counter()
    folder = out or default_folder(model, asked.shards)
    if asked.features is not None and dtype != "float32":
        raise ValueError(f"--features keeps what float32 gives: leave --dtype {dtype} away, or --features")
    check(asked, tasks)
    trained = open_model(model, best_device(), parts)
    chosen, data = chosen_tasks(trained, asked, tasks)
    _tell(data)
    if names is not None:
        chosen = chosen if tasks else [name for name in chosen if name in NAMED[names]]
        refuse_unnamed(chosen, names)
    record = _about(trained, data, asked, chosen, dtype)
    refuse_other(folder, record["identity"], overwrite)
    outcomes, seconds = {}, {}
    for name in chosen:
        start = time.perf_counter()
        with _in(dtype):
            outcomes[name] = TASKS[name].run(trained, asked, data)
        seconds[name] = time.perf_counter() - start
    found = {name: _told(outcome, asked.seed) for name, outcome in outcomes.items()}
    looks = [] if data is None else attention_section(trained, data.source)
    seconds["total"] = time.perf_counter() - began
    record |= {"tasks": found, "seconds": seconds, "command": command}
    sections = [section for outcome in outcomes.values() for section in outcome.sections]
    html = render(page_of(record, [*sections, *looks]))
    if names is not None:
        text = jsonlib.dumps(renamed(record, names), indent=1)
    else:
        text = jsonlib.dumps({"folder": str(folder), **record}, indent=1) if json else as_text(outcomes)
    try:
        print(text, flush=True)  # before the record, as a full disk must not swallow the figures
    finally:  # nor is the record lost where who reads has enough, such as head
        write(folder, record, outcomes, html)
    if not json and names is None:
        print(f"open {folder / REPORT}")
    return folder


def _tell(data: EvaluationData | None) -> None:
    """What the data was recognised as."""
    if data is not None and data.about:
        print(data.about, file=sys.stderr)


@contextmanager
def _in(dtype: Dtype) -> Iterator[None]:
    if dtype == "float32":
        yield
        return
    with torch.autocast(best_device().type, getattr(torch, dtype)):
        yield


def _about(trained: Ready, data: EvaluationData | None, asked: Request, tasks: list[str], dtype: str) -> dict[str, Any]:
    """What is known before anything is measured; `identity` is what makes two evaluations the same."""
    weights = trained.model.state_dict()
    model: dict[str, Any] = {"name": trained.name, "weights": fingerprint(weights, list(weights))}
    if isinstance(trained, Trained):
        model["step"] = trained.step
    told = _data(data, asked)
    settings = {
        "tasks": tasks,
        "caption": None if data is None else data.settings.caption,
        "protocol": asked.protocol,
        "labels": None if data is None else data.labels,
        "classes": asked.classes,
        "templates": asked.templates,
        "rerank": asked.rerank,
        "seed": asked.seed,
        "dtype": dtype,
    }
    return {
        "identity": {"model": model["weights"], "data": told["fingerprint"], **settings},
        "model": model,
        "data": {"shards": list(asked.shards), **told},
        "settings": settings,
        "device": _device(),
        "versions": versions(),
    }


def _data(data: EvaluationData | None, asked: Request) -> dict[str, Any]:
    """What was measured on, and how `vlm compare` finds its pictures again."""
    if data is None:
        apart = [] if asked.annotations is None else [str(asked.annotations)]
        return {"fingerprint": files_fingerprint([*asked.shards, *apart])}
    read = data.settings.model_copy(update={"train": "", "val": None, "augment": None}).model_dump(mode="json")
    return {"samples": len(data.source), "fingerprint": data_fingerprint(data.source), "settings": read}


def _device() -> str:
    device = best_device()
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def _told(outcome: Outcome, seed: int) -> dict[str, Any]:
    within = outcome.intervals or intervals(outcome.values, outcome.groups, seed, outcome.counts)
    return {
        "metrics": dict(outcome.metrics),
        "chance": dict(outcome.chance),
        "intervals": {name: list(ends) for name, ends in within.items()},
        "counts": dict(outcome.counts),
        "protocol": dict(outcome.protocol),
    }


def retrieval(trained: Ready, shards: Sequence[str], caption: str | None = None, k: int = 16) -> dict[str, Any]:
    """Recalls and ranks of a data set by method, beside chance; as of `rank`."""
    data = open_evaluation_data(shards, trained.data, caption=caption)
    _tell(data)
    ranked = rank(trained, data, k)
    return {
        "retrieval": {way: ranked.summary(way) for way in ranked.methods},
        "chance": ranked.chance(),
        "counts": ranked.counts | {"rerank_k": k},
    }
