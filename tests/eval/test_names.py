"""Figures under other tools' names: the right direction, the right unit, and equal to what those tools compute."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.eval.golden_retrieval import KEPT, KS, data
from vlm.eval.names import clip_benchmark_classification, clip_benchmark_record, clip_benchmark_retrieval, lavis
from vlm.eval.retrieval import Ranks, rank_counts, summarize

GOLDEN = json.loads(KEPT.read_text(encoding="utf-8"))


def ranks() -> Ranks:
    image, text, owner = data()
    return rank_counts(image[:, None], text, torch.arange(len(image)), owner)


def test_recalls_are_those_of_clip_benchmark() -> None:
    found = clip_benchmark_retrieval(summarize(ranks(), KS))
    assert found == pytest.approx(GOLDEN["clip_benchmark"], abs=1e-7)
    assert 0 < found["image_retrieval_recall@1"] < found["text_retrieval_recall@1"] < 1  # the ways cannot be mixed up


def test_hits_and_reciprocal_ranks_are_those_of_torchmetrics() -> None:
    ways = {"image": ranks().t2i, "text": ranks().i2t}
    found = {f"{way} hit@{k}": float((rank <= k).double().mean()) for way, rank in ways.items() for k in KS}
    found |= {f"{way} mrr": float((1 / rank.double()).mean()) for way, rank in ways.items()}
    assert found == pytest.approx(GOLDEN["torchmetrics"], abs=1e-6)


def lavis_report(scores: Tensor, owner: Tensor) -> dict[str, float]:
    """The definition of LAVIS' retrieval task: 0-based places after argsort, percentages below 1, 5 and 10."""
    order = {"txt": scores.numpy().argsort(1)[:, ::-1], "img": scores.T.numpy().argsort(1)[:, ::-1]}
    place = {
        "txt": [min(np.flatnonzero(owner.numpy()[row] == image)) for image, row in enumerate(order["txt"])],
        "img": [int(np.flatnonzero(row == image)[0]) for row, image in zip(order["img"], owner.tolist(), strict=True)],
    }
    found = {f"{w}_r{k}": 100.0 * sum(p < k for p in places) / len(places) for w, places in place.items() for k in KS}
    means = {f"{w}_r_mean": sum(found[f"{w}_r{k}"] for k in KS) / 3 for w in place}
    return (
        found | means | {"r_mean": (means["txt_r_mean"] + means["img_r_mean"]) / 2, "agg_metrics": means["txt_r_mean"]}
    )


def test_lavis_names_hold_what_lavis_computes() -> None:
    image, text, owner = data()
    found = lavis(summarize(ranks(), (1, 5, 10, 50)))
    assert found == pytest.approx(lavis_report(image @ text.T, owner))
    assert list(found) == [
        *("txt_r1", "txt_r5", "txt_r10", "txt_r_mean", "img_r1", "img_r5", "img_r10", "img_r_mean"),
        *("r_mean", "agg_metrics"),
    ]


def test_lavis_needs_its_three_recalls() -> None:
    with pytest.raises(ValueError, match=r"need R@1, R@5 and R@10; these figures lack R@5, R@10$"):
        lavis(summarize(ranks(), (1, 20)))


def test_accuracies() -> None:
    found = clip_benchmark_classification({"top1": 25.0, "top5": None, "mean_per_class_recall": 20.0, "per_class": []})
    assert found == pytest.approx({"acc1": 0.25, "acc5": math.nan, "mean_per_class_recall": 0.2}, nan_ok=True)


def test_the_record_is_a_row_of_clip_benchmarks_table(tmp_path: Path) -> None:
    """Its `build` flattens the metrics into the record and names the model, as here."""
    metrics = clip_benchmark_retrieval(summarize(ranks(), (5,)))
    record = json.loads(
        json.dumps(clip_benchmark_record(metrics, "zeroshot_retrieval", "flickr30k", "ViT-B-32", "openai"))
    )
    assert list(record) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    row = record["metrics"] | {name: value for name, value in record.items() if name != "metrics"}
    with (tmp_path / "benchmark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*row, "model_fullname"])
        writer.writeheader()
        writer.writerow(row | {"model_fullname": f"{record['model']} {record['pretrained']}"})
    with (tmp_path / "benchmark.csv").open(newline="") as file:
        read = next(csv.DictReader(file))
    assert read["model_fullname"] == "ViT-B-32 openai" and read["language"] == "en"
    assert float(read["image_retrieval_recall@5"]) == metrics["image_retrieval_recall@5"]


def test_the_page_s_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/retrieval.md: an interval and a comparison; then LAVIS' names and CLIP_benchmark's record."""
    page = (Path(__file__).parents[2] / "docs" / "retrieval.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/retrieval.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(blocks) == 2 and len(printed) == 5
    assert printed[2].startswith("Comparison(difference=0.0, ") and "p=1.0" in printed[2]
    assert "'agg_metrics': 100.0" in printed[3] and "'image_retrieval_recall@5': 1.0" in printed[4]
