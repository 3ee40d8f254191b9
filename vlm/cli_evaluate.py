"""`vlm evaluate` and `vlm compare`: arguments only."""

import shlex
import sys
from pathlib import Path

import click

from vlm.cli_help import Verb
from vlm.cli_options import file, folder, json_option, model_option, overwrite_option, part_option, source
from vlm.cli_shards import pipe_option
from vlm.eval.protocol import PROTOCOLS

TASKS = ("retrieval", "captions", "answers", "classification")  # those of vlm.eval.tasks, which costs a torch to import


@click.command(cls=Verb)
@click.argument("shards", nargs=-1, required=True, type=source, metavar="SHARDS...")
@model_option
@part_option
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=click.Choice(TASKS),
    help="What to measure; may be repeated. Unless given, what the model can do.",
)
@click.option("--out", type=folder, help="Where the record goes; runs/evaluate/ and the names of model and data.")
@overwrite_option
@json_option
@click.option("--names", type=click.Choice(["lavis", "clip_benchmark"]), help="Print JSON with the keys of this tool.")
@click.option("--caption", help="Where the captions stand, such as json:caption; as in training unless given.")
@click.option(
    "--protocol", type=click.Choice(tuple(PROTOCOLS)), help="A standard benchmark: its split, captions, folds."
)
@click.option("--images", type=folder, help="The folder that paths in a table or JSON file are relative to.")
@click.option("--labels", metavar="WHERE", help="Where classes stand, such as json:group, for classification.")
@click.option("--classes", type=source, metavar="FILE", help="Their names, a line each.")
@click.option(
    "--templates", type=source, metavar="FILE", help="Prompts with {c} where a class goes, a line each, or JSON."
)
@click.option("--annotations", type=file, metavar="FILE", help="Of answers, where VQA keeps them apart.")
@click.option("--features", type=folder, help="A folder that keeps vectors: a later run takes what is there.")
@click.option("--rerank", "k", type=click.IntRange(1), default=16, show_default=True, help="Candidates for ITM.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the intervals' draws.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the computation; the others are faster on GPUs, and not exact.",
)
@pipe_option
def evaluate(
    model: str,
    shards: tuple[str, ...],
    parts: dict[str, str],
    tasks: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    json: bool,
    names: str | None,
    caption: str | None,
    protocol: str | None,
    images: Path | None,
    labels: str | None,
    classes: str | None,
    templates: str | None,
    annotations: Path | None,
    features: Path | None,
    k: int,
    seed: int,
    dtype: str,
) -> None:
    """Measure a model on data: retrieval, captions, answers, zero-shot classification.

    SHARDS are tar files, folders of them, patterns such as {000..003}.tar, addresses of them, or what else `vlm shards
    write` can read; of --task answers, a file of questions (VQA's JSON, or JSON lines of image, question and answers or
    choices). The record has metrics.json, what every query got (values.safetensors, queries.json; see `vlm
    compare`) and report.html, one offline page with pictures.
    """
    from vlm.eval.run import evaluate as measure
    from vlm.eval.tasks import Request

    asked = Request(
        shards=shards,
        caption=caption,
        protocol=protocol,
        rerank=k,
        seed=seed,
        images=images,
        features=features,
        labels=labels,
        classes=classes,
        templates=templates,
        annotations=annotations,
    )
    measure(
        model,
        asked,
        tasks,
        out,
        dtype=dtype,  # type: ignore[arg-type]  # click checks it
        overwrite=overwrite,
        json=json,
        parts=parts,
        command=shlex.join(["vlm", *sys.argv[1:]]),
        names=names,  # type: ignore[arg-type]  # click checks it
    )


@click.command(cls=Verb)
@click.argument("first", type=folder)
@click.argument("second", type=folder)
@click.option("--out", type=folder, help="Where the page goes; runs/compare/ and the names of both unless given.")
@overwrite_option
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draws.")
@json_option
def compare(first: Path, second: Path, out: Path | None, overwrite: bool, seed: int, json: bool) -> None:
    """Tell two evaluations apart, query by query.

    FIRST and SECOND are folders of `vlm evaluate` over the same queries. Differences are second - first, with 95 %
    intervals and how likely chance alone gives as much.
    """
    from vlm.eval.compare import compare as run

    run(first, second, out, overwrite=overwrite, seed=seed, json=json)
