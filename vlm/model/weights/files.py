"""Whole files of weights, and loading by name: any difference in names or shapes is an error that lists it."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm.model.weights.source import open_file


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by name; wrappers such as {"state_dict": …} and the prefix "module." are taken off pickles.

    Errors: a file that is damaged, or that holds more than plain tensors.
    """
    weights = open_file(path)
    return {name: weights.read(name) for name in weights}


def load_into(module: nn.Module, path: Path, optional: Collection[str] = ()) -> None:
    """Loads a file into a module of the same names; names under an `optional` module may be left over."""
    found, own = read(path), module.state_dict()
    prefixes = tuple(f"{name}." for name in optional)
    kept = {name: value for name, value in found.items() if name in own or not name.startswith(prefixes)}
    load_strict(module, kept, str(path))


def load_strict(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads tensors by name; a difference in names or shapes is an error that lists it, and nothing is loaded."""
    refuse(differences(module.state_dict(), weights), source)
    module.load_state_dict(dict(weights), assign=any(parameter.is_meta for parameter in module.parameters()))


def refuse(problems: Sequence[str], source: str) -> None:
    """Raises a ValueError that lists them, if there are any."""
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise ValueError(f"{source} does not fit this model:\n  {shown}")


def differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """One line for each name that only one side has, and for each shape that differs."""
    lines = [f"missing: {name} {shape(own[name])}" for name in own if name not in given]
    lines += [f"not in the model: {name} {shape(given[name])}" for name in given if name not in own]
    lines += [
        f"other shape: {name} is {shape(given[name])}, the model's is {shape(own[name])}"
        for name in own
        if name in given and own[name].shape != given[name].shape
    ]
    return lines


def shape(tensor: Tensor) -> str:
    """Its sizes for messages, such as 3x4."""
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def fingerprint(tensors: Mapping[str, Tensor], names: Collection[str]) -> str:
    """SHA-256 over names and bytes, the same on every device."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
