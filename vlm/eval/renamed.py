"""Figures of an evaluation as LAVIS and CLIP_benchmark print them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from vlm.eval.names import clip_benchmark_classification, clip_benchmark_record, clip_benchmark_retrieval, lavis

Names = Literal["lavis", "clip_benchmark"]


NAMED: Mapping[Names, Collection[str]] = {"lavis": ("retrieval",), "clip_benchmark": ("retrieval", "classification")}


def refuse_unnamed(tasks: Collection[str], names: Names) -> None:
    """ValueError: not the one task that has such names."""
    known = NAMED[names]
    if len(tasks) != 1 or next(iter(tasks)) not in known:
        raise ValueError(f"--names {names} is of one --task, {' or '.join(known)}, not of {', '.join(tasks)}")


def renamed(record: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """LAVIS' figures of the final ranking, re-ranked where ITM did; the record of a CLIP_benchmark run, by ITC alone.

    `record`: as metrics.json holds it. ValueError: as of `refuse_unnamed`.
    """
    refuse_unnamed(record["tasks"], names)
    task, told = next(iter(record["tasks"].items()))
    metrics = told["metrics"]
    if names == "lavis":
        return lavis(list(metrics.values())[-1])
    found = clip_benchmark_retrieval(metrics["itc"]) if task == "retrieval" else clip_benchmark_classification(metrics)
    model = record["model"]
    dataset = Path(record["data"]["shards"][0]).stem
    return clip_benchmark_record(found, f"zeroshot_{task}", dataset, Path(model["name"]).name, model["weights"][:12])
