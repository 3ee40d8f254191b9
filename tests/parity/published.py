"""Shared by the parity tests of published folders: written by the original library, read from disk by ours."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.parity.noise import noise
from vlm.model.published.part import Part
from vlm.model.weights.files import load_strict, read


def saved(model: PreTrainedModel, folder: Path, scale: float = 0.1) -> dict[str, Any]:
    """Noises the model, writes it as its library does, and gives its config.json."""
    noise(model.eval(), scale=scale)
    model.save_pretrained(folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def loaded(part: Part, file: Path) -> nn.Module:
    """The part with the weights of a file, in evaluation mode."""
    load_strict(part.module, part.table.to_ours(read(file)), str(file))
    return part.module.eval()


def written(part: Part, file: Path) -> dict[str, Tensor]:
    """Our weights written in the published layout, and what was written."""
    back = part.table.to_theirs(part.module.state_dict())
    save_file({name: value.contiguous() for name, value in back.items()}, file, {"format": "pt"})  # channels last
    return back


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """The same names, and bit for bit the same numbers."""
    return set(found) == set(wanted) and all(torch.equal(value, wanted[name]) for name, value in found.items())
