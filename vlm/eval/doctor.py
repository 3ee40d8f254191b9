"""`vlm shards check`: what the shard doctor found, as a table for people or as JSON."""

import json as jsonlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from vlm import build_data
from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.config.load import load
from vlm.config.pictures import PictureData
from vlm.data.check import Finding, Patience, Report, TextLimit
from vlm.data.check import check as look
from vlm.data.pictures import Pictures
from vlm.data.record import Record
from vlm.data.shards import find_shards
from vlm.data.talk_record import TalkRecord
from vlm.data.text import Tokenizer, load_tokenizer
from vlm.restore import TOKENIZER


def check(
    shards: Sequence[str],
    config: Path | None = None,
    image: str | None = None,
    caption: str | None = None,
    min_side: int = 1,
    tokenizer: Path | None = None,
    max_tokens: int | None = None,
    max_bad_fraction: float | None = None,
    workers: int = 0,
    json: bool = False,
    talks: bool = False,
) -> bool:
    """Prints the report; False when nothing is usable, or more than `max_bad_fraction` is not.

    What is not given is taken from the config, or from the defaults of training. `talks`: of conversations.
    """
    if (tokenizer is None) != (max_tokens is None) and config is None:
        raise ValueError("--tokenizer and --max-tokens belong together: the one counts what the other limits")
    run = None if config is None else read_run(config)
    data = schema.PairData(train=list(shards)) if run is None else run.pictures
    given = {"image": image, "caption": caption, "max_bad_fraction": max_bad_fraction, "max_tokens": max_tokens}
    data = data.model_copy(update={name: value for name, value in given.items() if value is not None})
    files = find_shards(shards, build_data.shard_cache(data))
    patience = Patience(min_side, text=_limit(run, config, data, tokenizer, shards))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("shards", total=len(files))
        form = TalkRecord if talks or isinstance(data, schema.ChatData) else Record
        record = form(data.image, data.caption, data.id)
        report = look(files, record, patience, workers, done=lambda: progress.advance(task))
    limit = data.max_bad_fraction
    healthy = report.bad < report.samples and report.bad <= limit * report.samples
    print(as_json(report, healthy, limit) if json else as_text(report, len(files), healthy, limit))
    return healthy


def read_run(config: Path) -> schema.Run:
    """Settings of a YAML file, or of the folder of a run."""
    return load(schema.Run, config / CONFIG if config.is_dir() else config)


def read_tokenizer(run: schema.Run, config: Path, shards: Sequence[str]) -> Tokenizer:
    """That of the run's folder; else what the settings name, learned from the shards if it is to be learned."""
    if config.is_dir():
        return load_tokenizer(config / TOKENIZER)
    data = run.pictures.model_copy(update={"max_bad_fraction": 1.0})
    captions = build_data.shards(data, list(shards)).captions() if run.tokenizer.kind == "bpe" else ()
    return build_data.tokenizer(run.tokenizer, captions)


def any_shards(data: PictureData, shards: Sequence[str]) -> Pictures:
    """An index that any share of unusable samples may stand beside."""
    return build_data.shards(data.model_copy(update={"max_bad_fraction": 1.0}), list(shards))


def _limit(
    run: schema.Run | None,
    config: Path | None,
    data: schema.PairData | schema.ChatData,
    tokenizer: Path | None,
    shards: Sequence[str],
) -> TextLimit | None:
    if tokenizer is not None:
        own = load_tokenizer(tokenizer)
    elif run is None or config is None:
        return None
    else:
        own = read_tokenizer(run, config, shards)
    if run is None:
        return TextLimit(own, data.max_tokens)
    run = run.model_copy(update={"data": data})
    return TextLimit(own, data.max_tokens, build_data.caption_template(run), build_data.talk_form(run, own, 0))


def as_json(report: Report, healthy: bool, limit: float) -> str:
    """The report for programs."""
    found: dict[str, Any] = {"samples": report.samples, "unusable": report.bad, "max_bad_fraction": limit}
    for name, findings in (("errors", report.errors), ("notes", report.notes)):
        found[name] = {one.reason: {k: v for k, v in asdict(one).items() if k != "reason"} for one in findings}
    return jsonlib.dumps(found | {"healthy": healthy}, indent=1)


def as_text(report: Report, shards: int, healthy: bool, limit: float) -> str:
    """The report for people."""
    rows = [["", "count", "share", "first"]]
    for title, findings in (
        ("errors: unusable in training", report.errors),
        ("notes: used all the same", report.notes),
    ):
        if findings:
            rows += [[title, "", "", ""], *(_row(one, report.samples) for one in findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {count:>{widths[1]}}  {share:>{widths[2]}}  {first}".rstrip()
        for name, count, share, first in rows
    ]
    usable = report.bad < report.samples
    verdict = "healthy" if healthy else "too many errors" if usable else "no sample is usable"
    share = report.bad / max(1, report.samples)
    place = "1 shard" if shards == 1 else f"{shards} shards"
    end = f"{report.bad} of {report.samples} samples in {place} are unusable ({share:.2%}, limit {limit:.2%})"
    return "\n".join([*(lines if len(lines) > 1 else []), f"{end}: {verdict}"])


def _row(finding: Finding, samples: int) -> list[str]:
    return [f"  {finding.reason}", str(finding.count), f"{finding.count / max(1, samples):.2%}", finding.example]
