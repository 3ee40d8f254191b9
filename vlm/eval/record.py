"""An evaluation on disk: metrics.json, values.safetensors, queries.json and report.html, whole or not at all."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from jaxtyping import Int, Shaped
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlm import __version__
from vlm.eval.outcome import Outcome
from vlm.model.weights.layout import PICKLES, SAFE

METRICS, VALUES, QUERIES, REPORT = "metrics.json", "values.safetensors", "queries.json", "report.html"
FORMAT = 1
SAMPLE = "sample:"  # before the name of values: which sample of the data each query is about
PACKAGES = {"torch": "torch", "open_clip": "open_clip_torch", "timm": "timm", "pillow": "pillow"}


def default_folder(model: str, shards: Sequence[str]) -> Path:
    """runs/evaluate/<the model's stem>-<the data's stem>."""
    name = re.sub(r"@.*", "", model.rstrip("/")).rpartition("/")[2]
    data = shards[0].rstrip("/").rpartition("/")[2].replace(".json#", "-")
    parts = [_stem(name, (SAFE, *PICKLES)), _stem(data, (".tar", ".csv", ".tsv", ".json", ".jsonl", ".parquet"))]
    return Path("runs", "evaluate", "-".join(re.sub(r"[^\w.-]+", "_", part).strip("_.") or "data" for part in parts))


def _stem(name: str, suffixes: Sequence[str]) -> str:
    return next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name)


def files_fingerprint(names: Sequence[str]) -> str:
    """SHA-256 over the bytes of small files. FileNotFoundError."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(hashlib.sha256(Path(name).read_bytes()).digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    packages = {name: version(package) for name, package in PACKAGES.items()}
    return {"vlm": __version__, **packages, "python": python_version()}


def refuse_other(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """ValueError: the folder holds something else than an evaluation of this identity. Changes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--out: {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
    held = [name for name in (METRICS, VALUES, QUERIES, REPORT) if (folder / name).exists()]
    if overwrite or not held:
        return
    remedy = "choose another --out, or --overwrite it"
    before = _identity_of(folder)
    if before is None:
        raise ValueError(f"{folder} holds {', '.join(held)} of something else than an evaluation: {remedy}")
    other = [
        f"{name}: was {_short(before.get(name))}, now {_short(identity.get(name))}"
        for name in sorted({*before, *identity})
        if before.get(name) != identity.get(name)
    ]
    if other:
        raise ValueError(f"{folder} holds another evaluation ({'; '.join(other)}): {remedy}")


def _identity_of(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        return dict(record["identity"]) if record["format"] == FORMAT else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[1:13]}…" if re.fullmatch(r'"[0-9a-f]{64}"', text) else text


def write(folder: Path, record: Mapping[str, Any], outcomes: Mapping[str, Outcome], page: str) -> None:
    """All files beside each other under other names first, then in place of the old ones, metrics.json last."""
    files = {VALUES: _values(outcomes), QUERIES: _queries(outcomes), REPORT: page.encode("utf-8")}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[METRICS] = (json.dumps({"format": FORMAT, **record, "files": hashes}, indent=1) + "\n").encode("utf-8")
    write_files(folder, files)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """All of them or, where the disk is full, none; those before stay until then. Makes missing folders. OSError."""
    drafts = {folder / f".{name}.{os.getpid()}.part": folder / name for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft, data in zip(drafts, files.values(), strict=True):
            with draft.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        for draft, final in drafts.items():
            draft.replace(final)
    except OSError as error:
        raise OSError(f"could not write {', '.join(files)} in {folder}: {error}") from None
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def _values(outcomes: Mapping[str, Outcome]) -> bytes:
    tensors = dict[str, Tensor]()
    for task, outcome in outcomes.items():
        tensors |= {f"{task}/{name}": each.cpu().contiguous() for name, each in outcome.values.items()}
        tensors |= {f"{SAMPLE}{task}/{name}": each.cpu().clone() for name, each in outcome.samples.items()}
    return save(tensors)


def _queries(outcomes: Mapping[str, Outcome]) -> bytes:
    """Each list once: those of several methods are the same."""
    lists: list[list[str]] = []
    number: dict[tuple[str, ...], int] = {}

    def place(names: Sequence[str]) -> int:
        at = number.setdefault(tuple(names), len(lists))
        if at == len(lists):
            lists.append(list(names))
        return at

    of = {
        f"{task}/{name}": {
            "query": place(outcome.queries.get(name, outcome.groups[name])),
            "group": place(outcome.groups[name]),
        }
        for task, outcome in outcomes.items()
        for name in outcome.values
    }
    return (json.dumps({"values": of, "lists": lists}, ensure_ascii=False, indent=0) + "\n").encode(
        "utf-8", "surrogatepass"
    )


@dataclass(frozen=True)
class Evaluation:
    """An evaluation read back; values, queries, groups and samples by the task's name and the value's."""

    folder: Path
    record: Mapping[str, Any]
    values: Mapping[str, Shaped[Tensor, "_"]]
    queries: Mapping[str, Sequence[str]]
    groups: Mapping[str, Sequence[str]]
    samples: Mapping[str, Int[Tensor, "_"]]


def read(folder: Path) -> Evaluation:
    """ValueError: no evaluation, one of another version, or files that are not those written together."""
    if not (folder / METRICS).is_file():
        raise ValueError(f"{folder} holds no evaluation (no {METRICS}): vlm evaluate SHARDS --model M --out {folder}")
    try:
        record = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"{folder / METRICS}: format {record['format']}, this version reads {FORMAT}")
        parts = {name: (folder / name).read_bytes() for name in (VALUES, QUERIES)}
        wrong = [name for name, data in parts.items() if hashlib.sha256(data).hexdigest() != record["files"][name]]
        if wrong:
            raise ValueError(f"{folder / wrong[0]} is not the file that was written with {METRICS}: evaluate again")
        tensors, told = load(parts[VALUES]), json.loads(parts[QUERIES])
    except (FileNotFoundError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder / METRICS} is not of vlm evaluate, or damaged ({error!r}): evaluate again") from None
    return Evaluation(
        folder,
        record,
        {name: each for name, each in tensors.items() if not name.startswith(SAMPLE)},
        {name: told["lists"][one["query"]] for name, one in told["values"].items()},
        {name: told["lists"][one["group"]] for name, one in told["values"].items()},
        {name.removeprefix(SAMPLE): each for name, each in tensors.items() if name.startswith(SAMPLE)},
    )
