"""Published checkpoints by path or by their name on the Hugging Face hub, which alone may need a network."""

import json
import logging
import re
import sys
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from vlm.model.weights.layout import FOLDER, PICKLES, SAFE

NAME = re.compile(r"(?!.*(?:--|\.\.))(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
SMALL = (".json", ".txt", ".model", ".jinja")  # settings, tokenizers, templates
TIMEOUT = 20.0  # seconds for the hub's first answer
CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # folders in the hub's cache
ELSEWHERE = "or download it elsewhere and give the folder in place of the name"

log = logging.getLogger(__name__)


def find(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder or file of a published checkpoint.

    A path is returned as it is. A name `owner/name` or `owner/name@revision` (a branch, tag or commit) is fetched into
    the hub's cache: settings, tokenizer and one set of weights, as safetensors where there are any. With
    HF_HUB_OFFLINE=1 only the cache is looked at; without a network the cache is used with a warning.

    ValueError: neither a path nor a name; not on the hub, gated or out of reach, and not in the cache.
    """
    path = Path(name_or_path).expanduser()
    if str(name_or_path) and path.exists():
        if revision is not None:
            raise ValueError(f"{path} lies on this disk: a revision ({revision}) is for names on the hub")
        return path
    match = NAME.fullmatch(str(name_or_path))
    if match is not None and Path(match["name"].partition("/")[0]).is_dir():
        raise ValueError(f"'{name_or_path}': there is no such file in this folder (and so it is no name on the hub)")
    if match is None:
        raise ValueError(
            f"'{name_or_path}' is neither a file or folder nor a name on the hub (owner/name or owner/name@revision)"
        )
    if revision is not None and match["revision"] is not None:
        raise ValueError(f"'{name_or_path}' names a revision already: give {revision} in one place")
    return _fetch(match["name"], revision or match["revision"])


def pinned(path: Path) -> str:
    """owner/name@commit for a folder in the hub's cache, so that it can be named again; else the path itself."""
    parts = path.absolute().parts
    for i in range(len(parts) - 2):
        if parts[i + 1] == "snapshots" and (match := CACHED.fullmatch(parts[i])) is not None:
            return "/".join((f"{match['owner']}/{match['name']}@{parts[i + 2]}", *parts[i + 3 :]))
    return str(path)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A table of settings beside the weights. ValueError: it is missing, or is no table in JSON."""
    path = folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) if folder.is_dir() else "no folder"
        raise ValueError(f"{path}: is missing; there is {names or 'nothing'}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is no table of settings, but {type(found).__name__}")
    return found


def wanted(names: Sequence[str]) -> list[str]:
    """Of a repository's files those that are of use here: small ones, and one set of weights by preference."""
    top = [name for name in names if "/" not in name]
    inside = [name for name in names if name.startswith("qformer_tokenizer/")]  # InstructBLIP has two vocabularies
    small = [name for name in (*top, *inside) if name.endswith(SMALL) and not name.endswith(".index.json")]
    for whole in FOLDER:
        if whole not in top:
            continue
        stem, _, ending = whole.removesuffix(".index.json").rpartition(".")
        shards = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{ending}")
        return [*small, whole, *(name for name in top if whole.endswith(".json") and shards.fullmatch(name))]
    weights = next((found for ends in ((SAFE,), PICKLES) if (found := [n for n in top if n.endswith(ends)])), [])
    return [*small, *weights]


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    label = name if revision is None else f"{name}@{revision}"
    if constants.HF_HUB_OFFLINE:
        return _cached(
            name, revision, f"{label} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it: unset that,"
        )
    try:
        siblings = HfApi().model_info(name, revision=revision, timeout=TIMEOUT).siblings or []
        patterns = [escape(file) for file in wanted([file.rfilename for file in siblings])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        why = f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, log in (hf auth login),"
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision '{revision}' on the hub: name a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        why = (
            f"{name} is no folder here, and not on the hub or private there: compare its name, log in (hf auth login),"
        )
    except _network_errors() as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        why = f"{label} is not in the hub's cache, and the hub is out of reach ({reason}): look at the network,"
    return _cached(name, revision, why)


def _cached(name: str, revision: str | None, why: str) -> Path:
    """The copy in the cache, perhaps a part of it: what is missing is told where it is missed."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        part = getattr(error, "snapshot_path", None)
        if part is None:
            raise ValueError(f"{why} {ELSEWHERE}") from None
        path = Path(part)
    if not constants.HF_HUB_OFFLINE:
        log.warning("warning: the hub gave no answer for %s; using %s from the cache", name, pinned(path))
    return path


def _network_errors() -> tuple[type[BaseException], ...]:
    """Of the packages that the hub's client may use; some of their errors are no OSError."""
    loaded = (sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules)
    return (OSError, *(module.HTTPError for module in loaded))
