"""A published checkpoint by its name or path: found, understood, and loaded into our parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.model.language import Language
from vlm.model.published.blip2 import blip2_part
from vlm.model.published.clip import clip_part, clip_vision_part, openai_clip_part
from vlm.model.published.hub import find, read_json
from vlm.model.published.language import language_part
from vlm.model.published.llava import llava_part
from vlm.model.published.part import Part
from vlm.model.published.processor import image_transform
from vlm.model.published.siglip import siglip_part
from vlm.model.published.vit import blip2_vit
from vlm.model.vision import ClassToken, ImageEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.fill import fill
from vlm.model.weights.source import Weights, open_weights

CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, found and understood; its weights are not read, and the module is on the meta device."""

    path: Path
    values: Mapping[str, Any]  # of its config.json
    part: Part
    weights: Weights

    @property
    def model(self) -> VisionLanguageModel:
        """The system that it is."""
        assert isinstance(self.part.module, VisionLanguageModel)
        return self.part.module

    def piece(self, name: str) -> Part:
        """One part of the system, such as "vision". ValueError: it has no such part."""
        module = getattr(self.model, name)
        if module is None:
            raise ValueError(f"{self.path}: has no part '{name}'")
        return Part(module, self.part.table.only(f"{name}."))


def open_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """`name`: a folder, a file, or OWNER/NAME[@REVISION] of the hub (then, and only then, the network is used).

    ValueError: nothing of that name, no weights, a family that is not known, a setting that our parts do not have.
    """
    path = find(name, revision)
    weights = open_weights(path)
    values = read_json(path, CONFIG) if path.is_dir() else {}
    with torch.device("meta"):
        part = system_part(values, path, weights)
    return Checkpoint(path, values, part, weights)


def load(
    name: str,
    parts: Mapping[str, str] | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Checkpoint:
    """A published checkpoint with its weights, in evaluation mode, nothing of it learning.

    `parts`: of which parts the weights lie elsewhere (names or paths as well): what the authors' own files leave out.
    `dtype`: of the weights; as published unless given, but fp32 in place of fp16 on CPUs, which are slow at that.
    ValueError as of `open_checkpoint` and `fill`.
    """
    found = open_checkpoint(name, revision)
    others = {part: open_checkpoint(source) for part, source in (parts or {}).items()}
    for part in [part for part, _ in found.model.named_children()]:
        source = others.get(part, found)
        take(found.piece(part).module, source, part, dtype, device)
    found.model.eval().requires_grad_(False)
    return found


def take(
    module: nn.Module,
    source: Checkpoint,
    part: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Fills a module of ours (on the meta device) with that part of a published checkpoint."""
    fill(module, source.piece(part).table, source.weights, fitting(source.weights, dtype, device), device)
    if isinstance(module, ImageEncoder):
        module.backbone.to(memory_format=torch.channels_last)


def fitting(weights: Weights, dtype: torch.dtype | None, device: torch.device | str) -> torch.dtype | None:
    """The dtype asked for; fp32 for what is published in half precision, if the device is a CPU and none is asked."""
    half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in weights.values())
    return torch.float32 if dtype is None and half and torch.device(device).type == "cpu" else dtype


def system_part(values: Mapping[str, Any], path: Path, weights: Weights) -> Part:
    """The system of ours that a config.json describes; without one (a single file) the names of the weights tell."""
    where = str(path / CONFIG) if path.is_dir() else str(path)
    if not values:
        return openai_clip_part({name: tuple(tensor.shape) for name, tensor in weights.items()}, where)
    transform = image_transform(path)
    match values.get("model_type"):
        case "clip":
            return clip_part(values, where, transform)
        case "siglip":
            return siglip_part(values, where, transform)
        case "blip-2" | "instructblip":
            return blip2_part(values, where)
        case "llava" | "llava_llama":
            return llava_part(values, where, transform)
        case _:
            part = language_part(values, where)
            assert isinstance(part.module, Language)
            return Part(VisionLanguageModel(language=part.module), part.table.under("", "language."))


def vision_part(values: Mapping[str, Any], where: str) -> Part:
    """The image encoder that a vision_config describes. ValueError: a family that is not known."""
    match values.get("model_type"):
        case "clip_vision_model":
            return clip_vision_part(values, where)
        case "blip_2_vision_model":
            return blip2_vit(values, where)
        case other:
            raise ValueError(f"{where}: model_type={other!r}: known are clip_vision_model, blip_2_vision_model")


def language_model(name: str | None, architecture: Mapping[str, Any] | None, dtype: torch.dtype | None) -> Language:
    """A published language model; without a name, or on the meta device, only its architecture."""
    if name is None or torch.get_default_device().type == "meta":
        assert architecture is not None
        module = language_part(architecture, "model.language.architecture").module
    else:
        source = open_checkpoint(name)
        _agree(source.values.get("text_config", source.values), architecture, "model.language.architecture", name)
        module = source.piece("language").module
        take(module, source, "language", dtype or torch.float32, torch.get_default_device())
    assert isinstance(module, Language)
    return module


def image_encoder(
    name: str | None,
    architecture: Mapping[str, Any] | None,
    layer: int,
    class_token: ClassToken,
    frozen: bool,
    dtype: torch.dtype | None,
) -> ImageEncoder:
    """The image encoder of a published system; `name` and `architecture` as of `language_model`.

    `layer`, `class_token`: which of its tokens are read, whatever the system itself reads.
    """
    if name is None or torch.get_default_device().type == "meta":
        assert architecture is not None
        module = vision_part(architecture, "model.vision.architecture").module
        assert isinstance(module, ImageEncoder)
        return module.reading(layer, class_token, frozen, dtype)
    source = open_checkpoint(name)
    _agree(source.values.get("vision_config", source.values), architecture, "model.vision.architecture", name)
    own = source.piece("vision").module
    assert isinstance(own, ImageEncoder)
    encoder = own.reading(layer, class_token, frozen, dtype)
    take(encoder, source, "vision", dtype or torch.float32, torch.get_default_device())
    return encoder


def _agree(values: Mapping[str, Any], wanted: Mapping[str, Any] | None, where: str, name: str) -> None:
    pairs = [(key, value, values.get(key, value)) for key, value in (wanted or {}).items()]
    differing = [f"{key}={value!r}, there {there!r}" for key, value, there in pairs if there != value]
    if differing:
        raise ValueError(f"{where}: {name} is another model: {'; '.join(differing)}")
