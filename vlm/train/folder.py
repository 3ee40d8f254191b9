"""The folder of a run: whether it may be used, where to go on, and what lies in it before the first step."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from vlm import build_data, checkpoint
from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.config.load import dump, load
from vlm.data.text import Tokenizer
from vlm.restore import READER, TOKENIZER
from vlm.train.log import BOARD, METRICS

Resume = bool | Literal["auto"]

# Settings that cannot change what a step computes (but for rounding), so a run may go on with others.
FREE = (
    "data.workers",
    "data.cache_mb",
    "data.shard_cache",
    "data.shard_cache_gb",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.max_bad_steps",
    "train.report_to",
    "train.parallel",
    "train.activation_checkpointing",
    "train.timeout",
)


def check_folder(out: Path, run: schema.Run, resume: Resume, overwrite: bool) -> bool:
    """Whether to go on from a checkpoint. Refuses another run's folder and settings that differ. Changes nothing."""
    held = out / CONFIG
    if resume and overwrite:
        raise ValueError("--resume goes on with what --overwrite replaces: give one of them")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file")
    if resume is True and not held.is_file():
        raise ValueError(f"--resume: {out} holds no run (no {CONFIG})")
    if not held.is_file():
        return False
    if not resume:
        if not overwrite:
            raise ValueError(f"{out} holds a run already: choose another --out, --resume it, or --overwrite it")
        return False
    if changed := differences(load(schema.Run, held), run):
        raise ValueError(
            f"--resume: the settings differ from {held}; resume with that file, or start another folder:\n  "
            + "\n  ".join(changed)
        )
    if not checkpoint.begun(out):
        if resume == "auto":  # killed before its first save
            return False
        raise ValueError(f"--resume: {out} holds no checkpoint yet; --resume auto starts where there is none")
    return True


def differences(held: schema.Run, given: schema.Run) -> list[str]:
    """Settings that differ and matter, as `path: was A, now B`."""
    old, new = (dict(_flat(run.model_dump(mode="json"))) for run in (held, given))
    nothing = "not set"
    return [
        f"{path}: was {old.get(path, nothing)}, now {new.get(path, nothing)}"
        for path in sorted({*old, *new})
        if old.get(path, nothing) != new.get(path, nothing) and path not in FREE
    ]


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def prepare(out: Path, run: schema.Run, tokenizer: Tokenizer, fresh: bool) -> None:
    """Clears what an earlier run left if `fresh`; the settings come last and whole, so what has them has the rest."""
    if fresh:
        if (out / CONFIG).is_file():  # a folder that holds no run is nobody's to clear
            _clear(out)
        tokenizer.save(out / f".{TOKENIZER}.tmp")
        os.replace(out / f".{TOKENIZER}.tmp", out / TOKENIZER)
        if (reads := build_data.reader(run, tokenizer)) is not None:
            reads.tokenizer.save(out / READER)
    draft = out / f".{CONFIG}.tmp"
    draft.write_text(dump(run), encoding="utf-8")
    draft.replace(out / CONFIG)


def _clear(out: Path) -> None:
    for name in (checkpoint.LATEST, checkpoint.BEST, METRICS):
        (out / name).unlink(missing_ok=True)
    for old in out.glob("step-*"):
        shutil.rmtree(old)
    shutil.rmtree(out / BOARD, ignore_errors=True)
