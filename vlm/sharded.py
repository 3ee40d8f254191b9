"""Tensors that lie in parts on several processes, to files and back: torch.distributed.checkpoint, as safetensors.

The library's default format is pickle, which runs what it holds when it is read; nothing here reads or writes that.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm.world import World


def in_parts(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of them lies in parts."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every process writes its own parts; all must call. OSError when it fails on any of them."""
    _save(tensors, HuggingFaceStorageWriter(str(folder), save_distributed=True))


def write_whole(file: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """One plain safetensors file, put together on disk: no process ever holds it all. As `write`."""
    draft = file.with_suffix("")
    _save(tensors, HuggingFaceStorageWriter(str(draft), save_distributed=True, enable_consolidation=True))

    def tidy() -> None:
        (whole,) = draft.glob("model-*.safetensors")
        whole.replace(file)
        shutil.rmtree(draft)

    world.first_does(tidy)


def _save(tensors: Mapping[str, Tensor], writer: HuggingFaceStorageWriter) -> None:
    try:
        save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
    except CheckpointException as error:
        reasons = "; ".join(f"process {rank}: {reason}" for rank, reason in sorted(error.failures.items()))
        raise OSError(reasons) from None


def read(folder: Path, room: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """What `write` wrote, by any number of processes: each tensor into the `room` made for its name, size and dtype.

    All processes must call. ValueError when it is not whole.
    """
    reader = HuggingFaceStorageReader(str(folder))
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    try:
        known = reader.read_metadata().state_dict_metadata
        found = {
            name: room(name, entry.size, entry.properties.dtype)
            for name, entry in known.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        load(found, storage_reader=reader, no_dist=alone)
    except (CheckpointException, SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{folder}: not a whole set of safetensors files ({error})") from None
    return found


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, divided over the processes as `parameter` is, if that is and both have one shape."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
