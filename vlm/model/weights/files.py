"""Weight files: safetensors, or pickles read with `weights_only=True`; never anything that could run code."""

import hashlib
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by name; wrappers such as {"state_dict": …} and the prefix "module." are taken off.

    Errors: a file that is damaged, or that holds more than plain tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if _is_program(path):
        raise ValueError(
            f"{path}: a TorchScript archive, as OpenAI released CLIP: it holds a program, which is never run here; "
            "take the copy with plain tensors on the hub, such as openai/clip-vit-large-patch14"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # where a damaged pickle breaks the reader is anybody's guess
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: refused, for it is damaged or holds more than plain tensors ({reason})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: holds no plain table of tensors")
    return {name.removeprefix("module."): value for name, value in found.items()}


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # no zip, or a damaged one, of which torch will say more
        return False


def load_into(module: nn.Module, path: Path, optional: Collection[str] = ()) -> None:
    """Loads a file into a module of the same names; names under an `optional` module may be left over."""
    found, own = read(path), module.state_dict()
    prefixes = tuple(f"{name}." for name in optional)
    kept = {name: value for name, value in found.items() if name in own or not name.startswith(prefixes)}
    load_strict(module, kept, str(path))


def load_strict(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads tensors by name; a difference in names or shapes is an error that lists it, and nothing is loaded."""
    problems = differences(module.state_dict(), weights)
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise ValueError(f"{source} does not fit this model:\n  {shown}")
    module.load_state_dict(dict(weights), assign=any(parameter.is_meta for parameter in module.parameters()))


def differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """One line for each name that only one side has, and for each shape that differs."""
    lines = [f"missing: {name} {_shape(own[name])}" for name in own if name not in given]
    lines += [f"not in the model: {name} {_shape(given[name])}" for name in given if name not in own]
    lines += [
        f"other shape: {name} is {_shape(given[name])}, the model's is {_shape(own[name])}"
        for name in own
        if name in given and own[name].shape != given[name].shape
    ]
    return lines


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def fingerprint(tensors: Mapping[str, Tensor], names: Collection[str]) -> str:
    """SHA-256 over names and bytes, the same on every device."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
