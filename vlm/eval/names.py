"""The names of figures in other tools: what LAVIS logs and what CLIP_benchmark writes.

Ours say which way they go: "t2i" has texts as queries and images as gallery. Theirs name what is retrieved: LAVIS'
txt_* and CLIP_benchmark's text_retrieval are image to text.

LAVIS: lavis/tasks/retrieval.py, percent. CLIP_benchmark 1.6: clip_benchmark/metrics/zeroshot_retrieval.py and
zeroshot_classification.py, fractions; its cli.py writes the file.
"""

import math
from collections.abc import Mapping
from typing import Any

RETRIEVED = {"t2i": "image", "i2t": "text"}
CLASSIFICATION = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class_recall"}
LAVIS_KS = (1, 5, 10)


def lavis(summary: Mapping[str, Any]) -> dict[str, float]:
    """What `summarize` gave under LAVIS' keys, in percent. ValueError: it lacks R@1, R@5 or R@10.

    agg_metrics, by which LAVIS chooses its best checkpoint, is the mean recall of image to text alone.
    """
    ours = {"txt": summary["i2t"], "img": summary["t2i"]}
    missing = [f"R@{k}" for k in LAVIS_KS if not all(f"R@{k}" in one for one in ours.values())]
    if missing:
        raise ValueError(f"LAVIS' names need R@1, R@5 and R@10; these figures lack {', '.join(missing)}")
    named: dict[str, float] = {}
    for name, one in ours.items():
        recalls = {f"{name}_r{k}": float(one[f"R@{k}"]) for k in LAVIS_KS}
        named |= recalls | {f"{name}_r_mean": sum(recalls.values()) / len(LAVIS_KS)}
    named["r_mean"] = (named["txt_r_mean"] + named["img_r_mean"]) / 2
    named["agg_metrics"] = named["txt_r_mean"]
    return named


def clip_benchmark_retrieval(summary: Mapping[str, Any]) -> dict[str, float]:
    """The recalls of `summarize` under CLIP_benchmark's keys, as fractions; it knows no ranks."""
    ks = [name.removeprefix("R@") for name in summary["t2i"] if name.startswith("R@")]
    return {
        f"{retrieved}_retrieval_recall@{k}": summary[way][f"R@{k}"] / 100
        for k in ks
        for way, retrieved in RETRIEVED.items()
    }


def clip_benchmark_classification(accuracies: Mapping[str, Any]) -> dict[str, float]:
    """Zero-shot top1, top5 and mean_per_class_recall in percent under CLIP_benchmark's keys, as fractions.

    A top5 of None (fewer than five classes) is NaN, as there.
    """
    values = {theirs: accuracies[ours] for theirs, ours in CLASSIFICATION.items()}
    return {theirs: math.nan if value is None else value / 100 for theirs, value in values.items()}


def clip_benchmark_record(
    metrics: Mapping[str, float], task: str, dataset: str, model: str, pretrained: str, language: str = "en"
) -> dict[str, Any]:
    """The JSON file of one CLIP_benchmark run, as its `build` reads it into a table.

    `task`: zeroshot_retrieval or zeroshot_classification. `model` and `pretrained`: the architecture, its weights.
    """
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "metrics": dict(metrics),
        "language": language,
    }
