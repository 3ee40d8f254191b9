"""A module's weights back into the published layout, shard by shard, written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.model.weights.layout import FOLDER, INDEX, SINGLE
from vlm.model.weights.rows import Unit
from vlm.model.weights.table import Table


def save(
    module: nn.Module, table: Table, folder: Path, dtype: torch.dtype | None = None, shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Writes model.safetensors, or shards of `shard_bytes` and their index, into a folder; returns the files.

    Beside the module at most one shard is in memory. Tensors that are made together stay in one shard, though it be
    larger. `dtype`: of floating tensors (None: as they are).

    Errors: ValueError, before anything is written: tensors that the table does not know, a folder that holds weights;
    OSError: the disk is full or not writable; nothing is left of what was written.
    """
    if held := [name for name in FOLDER if (folder / name).exists()]:
        raise ValueError(f"{folder}: holds {held[0]} already; choose another folder, or remove it")
    own = _own(module, table)
    shards = _divide(table.writing(own), own, dtype, shard_bytes)
    several = len(shards) > 1
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if several else SINGLE for i in range(len(shards))]
    with _drafted(folder, [*names, *([INDEX] if several else [])]) as draft:
        places, total = dict[str, str](), 0
        for name, units in zip(names, shards, strict=True):
            tensors = _published(units, own, dtype)
            _write(draft / name, tensors)
            places |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
            del tensors  # before the next shard
        if several:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in ([*names, INDEX] if several else names)]


def _own(module: nn.Module, table: Table) -> dict[str, Tensor]:
    """Of tensors with several names those that the table knows."""
    names = dict[int, list[str]]()
    every: dict[str, Tensor] = module.state_dict(keep_vars=True)
    for name, tensor in every.items():
        names.setdefault(id(tensor), []).append(name)

    def known(name: str) -> bool:
        return any(row.writing({name: every[name]})[0] for row in table.rows)

    kept = [([n for n in tied if known(n)] or tied[:1]) if len(tied) > 1 else tied for tied in names.values()]
    return {name: every[name].detach() for tied in kept for name in tied}


def _divide(
    units: Sequence[Unit], own: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int
) -> list[list[Unit]]:
    shards, room = list[list[Unit]](), 0
    for unit in units:
        size = sum(own[name].numel() * _type(own[name], dtype).itemsize for name in unit.ours)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(unit)
        room -= size
    return shards


def _published(units: Sequence[Unit], own: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    found, used = dict[str, Tensor](), set[int]()
    for unit in units:
        for name, tensor in unit.to_theirs(own).items():
            dense = tensor.to("cpu", _type(tensor, dtype)).contiguous()
            shared = dense.untyped_storage().nbytes() > dense.nbytes or dense.data_ptr() in used
            found[name] = dense.clone() if shared else dense  # a file may not hold views of one storage
            used.add(found[name].data_ptr())
    return found


def _type(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None


@contextmanager
def _drafted(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A hidden folder whose files move into `folder` at the end, the last of `names`, by which they are found, last."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".weights.tmp"
    shutil.rmtree(draft, ignore_errors=True)  # of a save that was killed
    try:
        draft.mkdir()
        yield draft
        for name in names:
            _sync(draft / name)
        for name in names:
            (draft / name).replace(folder / name)
        _sync(folder)
    except OSError as error:
        raise OSError(f"could not save weights in {folder}: {error}; nothing was written") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
