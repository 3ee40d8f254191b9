"""`vlm evaluate`: a trained model against shards."""

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlm import build_data
from vlm.data.sources import Source
from vlm.eval.features import extract, match_pairs
from vlm.eval.retrieval import Ranks, Summary, chance, rank_counts, rerank, summarize
from vlm.nn.backend import best_device
from vlm.ready import open_model
from vlm.restore import Ready

BATCH = 32  # pictures captioned together
ANSWER = 256  # tokens of the longest answer, unless told otherwise
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def evaluate(
    model: str,
    shards: Sequence[str],
    json: bool = False,
    caption: str | None = None,
    k: int = 16,
    parts: Mapping[str, str] | None = None,
) -> None:
    """Prints recall both ways, by ITC and (if the model has the head) re-ranked by ITM.

    `model`, `parts`: as of `open_model`.
    """
    result = retrieval(open_model(model, best_device(), parts), shards, caption, k)
    print(jsonlib.dumps(result, indent=1) if json else as_text(result))


def retrieval(trained: Ready, shards: Sequence[str], caption: str | None = None, k: int = 16) -> dict[str, Any]:
    """Retrieval of a data set; `caption`: where its captions stand (the run's own setting unless given).

    Errors: a model without a contrastive head; data without usable samples; features that are not finite.
    """
    model = trained.model
    if model.contrast is None:
        raise ValueError(f"{trained.name} was trained without itc, so it cannot rank images and texts")
    data = trained.data
    source = build_data.shards(data.model_copy(update={"caption": caption or data.caption}), list(shards))
    if isinstance(source, Source):
        print(source.about, file=sys.stderr)
    transform = build_data.transform(trained.vision, model, source)
    loader = build_data.evaluation_loader(data, source, transform, trained.tokenizer, trained.batch_size)
    features = extract(model, loader, keep_tokens=model.match is not None)
    arguments = (features.image, features.text, features.image_ids, features.text_ids)
    found: dict[str, Any] = {"itc": summarize(rank_counts(*arguments))}
    if model.match is not None:

        def match(image: Tensor, text: Tensor) -> Tensor:
            return match_pairs(model, features, image, text)

        reranked: Ranks = rerank(*arguments, match=match, k=k)
        found["itm"] = summarize(reranked)
    return {
        "retrieval": found,
        "chance": chance(features.image_ids, features.text_ids),
        "counts": {
            "images": len(features.image_ids),
            "captions": len(features.text_ids),
            "unusable": dict(source.bad + loader.bad),
            "rerank_k": k,
        },
    }


def as_text(result: dict[str, Any]) -> str:
    """The recalls as a table beside chance."""
    measures = ("R@1", "R@5", "R@10", "median_rank")
    rows = [["", *(f"{way} {name}" for way in ("t2i", "i2t") for name in measures)]]
    for name, summary in {**result["retrieval"], "chance": result["chance"]}.items():
        rows.append([name, *_values(summary, measures)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    counts = result["counts"]
    return "\n".join(
        [*lines, f"{counts['images']} images, {counts['captions']} captions, ties count against the model"]
    )


def _values(summary: Summary, measures: Sequence[str]) -> list[str]:
    return [f"{summary[way][name]:.1f}" for way in ("t2i", "i2t") for name in measures]
