"""Which system of ours a published folder or file is, by its settings, or by the names of its tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.data.image import ImageTransform
from vlm.data.text import load_tokenizer
from vlm.data.vocabulary import FILES
from vlm.model.language import Language
from vlm.model.published.bert import text_part
from vlm.model.published.blip2 import blip2_part
from vlm.model.published.clip import clip_part, clip_vision_part, openai_clip_part
from vlm.model.published.family import unknown_family
from vlm.model.published.hub import read_json
from vlm.model.published.language import language_part
from vlm.model.published.llava import llava_part
from vlm.model.published.open_clip import open_clip_part
from vlm.model.published.part import Part
from vlm.model.published.pixels import image_transform
from vlm.model.published.siglip import siglip_part
from vlm.model.published.vit import blip2_vit, timm_part, vit_part
from vlm.model.text import TextTower
from vlm.model.vision import ImageEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.llama import llama_table
from vlm.model.weights.open_clip import hf_clip_table, open_clip_table
from vlm.model.weights.opt import opt_table

CONFIG, OPEN_CLIP, PIXELS = "config.json", "open_clip_config.json", "preprocessor_config.json"


def settings_of(path: Path) -> dict[str, Any]:
    """What a folder says of its model: config.json, or open_clip's; nothing for a single file."""
    if not path.is_dir():
        return {}
    if not (path / CONFIG).is_file() and (path / OPEN_CLIP).is_file():
        return read_json(path, OPEN_CLIP)
    return read_json(path, CONFIG)


SYSTEMS: Mapping[str, Callable[[Mapping[str, Any], str], Part]] = {
    "clip": clip_part,
    "blip-2": blip2_part,
    "instructblip": blip2_part,
    "llava": llava_part,
    "llava_llama": llava_part,
}


def system_part(values: Mapping[str, Any], path: Path, weights: Mapping[str, Tensor]) -> Part:
    """The `VisionLanguageModel` that a folder's settings describe, or that a file's tensors are.

    ValueError: a family that is not known (with the nearest one), a setting that our parts do not have.
    """
    if not path.is_dir():
        return _of_file(path, weights)
    if "model_cfg" in values:
        return open_clip_part(values, str(path / OPEN_CLIP), _pad(path))
    where, family = str(path / CONFIG), str(values.get("model_type"))
    if family == "siglip":
        part = siglip_part(values, where, pad=_pad(path))
    else:
        part = SYSTEMS[family](values, where) if family in SYSTEMS else _alone(_of_one_part(values, where, weights))
    _look_as(part, path, values)
    return part


def _pad(path: Path) -> int | None:
    """The tokenizer's in the folder, if one lies there."""
    return load_tokenizer(path).pad if any((path / name).is_file() for name in FILES) else None


def _of_one_part(values: Mapping[str, Any], where: str, weights: Mapping[str, Tensor]) -> Part:
    if "architecture" in values:
        return timm_part(values, where)
    match values.get("model_type"):
        case "vit":
            return vit_part(values, where)
        case "bert":
            return text_part(values, where, any("pooler" in name for name in weights))
        case _:
            return language_part(values, where)


def _look_as(part: Part, path: Path, values: Mapping[str, Any]) -> None:
    """Gives the image encoder the transform that lies beside the weights, if one does."""
    transform, encoder = transform_of(path, values), getattr(part.module, "vision", None)
    if transform is None or not isinstance(encoder, ImageEncoder):
        return
    if transform.size != encoder.transform.size:
        raise ValueError(f"{path}: {PIXELS} says pictures of {transform.size}, {CONFIG} of {encoder.transform.size}")
    encoder.transform = transform


def vision_part(values: Mapping[str, Any], where: str) -> Part:
    """The image encoder that a vision_config describes. ValueError: a family that is not known."""
    match values.get("model_type"):
        case "clip_vision_model":
            return clip_vision_part(values, where)
        case "blip_2_vision_model" | "instructblip_vision_model":
            return blip2_vit(values, where)
        case "vit":
            return vit_part(values, where)
        case other:
            known = "clip_vision_model, blip_2_vision_model, vit"
            raise ValueError(f"{where}: model_type={other!r} is no image encoder known here ({known})")


def transform_of(path: Path, values: Mapping[str, Any]) -> ImageTransform | None:
    """The image transform that lies in a folder, if one does."""
    name = next((name for name in (PIXELS, "processor_config.json") if (path / name).is_file()), None)
    if name is None:
        return None
    found = read_json(path, name)
    if name != PIXELS and "image_processor" not in found:
        return None
    return image_transform(found, str(path / name), pad=values.get("image_aspect_ratio") == "pad")


def _alone(part: Part) -> Part:
    """A system of one part."""
    match part.module:
        case ImageEncoder():
            return Part(VisionLanguageModel(vision=part.module), part.table.under("", "vision."))
        case Language():
            return Part(VisionLanguageModel(language=part.module), part.table.under("", "language."))
        case _:
            assert isinstance(part.module, TextTower)
            return Part(VisionLanguageModel(text=part.module), part.table.under("", "text."))


def _of_file(path: Path, weights: Mapping[str, Tensor]) -> Part:
    if "visual.conv1.weight" in weights or "visual.layer1.0.conv1.weight" in weights:
        return openai_clip_part({name: tuple(tensor.shape) for name, tensor in weights.items()}, str(path))
    families = {
        "OpenAI's CLIP": open_clip_table(),
        "CLIP of Hugging Face": hf_clip_table(),
        "Llama": llama_table(tied=False),
        "OPT": opt_table(),
    }
    remedy = "; a file alone is read of OpenAI's CLIP, LAVIS and MiniGPT-4: give the folder with its config.json"
    raise ValueError(unknown_family(weights, families, str(path)) + remedy)
