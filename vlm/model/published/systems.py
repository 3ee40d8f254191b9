"""Which system of ours a published folder or file is, by its settings, or by the names of its tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.data.image import ImageTransform
from vlm.data.text import load_tokenizer
from vlm.model.language import Language
from vlm.model.published.bert import text_part
from vlm.model.published.blip2 import blip2_part
from vlm.model.published.clip import clip_part, clip_vision_part, openai_clip_part
from vlm.model.published.family import unknown_family
from vlm.model.published.hub import read_json
from vlm.model.published.language import known_language, language_part, refuse_quantised
from vlm.model.published.llava import llava_part
from vlm.model.published.open_clip import open_clip_part
from vlm.model.published.part import Part, Settings
from vlm.model.published.pixels import image_transform, padded
from vlm.model.published.siglip import SIGLIP_VISION, siglip_part, siglip_vision
from vlm.model.published.tokens import has_tokenizer
from vlm.model.published.vit import blip2_vit, timm_part, vit_part
from vlm.model.text import TextTower
from vlm.model.vision import ImageEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.bert import bert_table
from vlm.model.weights.llama import llama_table
from vlm.model.weights.open_clip import hf_clip_table, hf_siglip_vision_table, open_clip_table
from vlm.model.weights.opt import opt_table
from vlm.model.weights.t5 import t5_table
from vlm.model.weights.table import Table

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
        pad = load_tokenizer(path).pad if has_tokenizer(path) else None
        return open_clip_part(values, str(path / OPEN_CLIP), pad)
    where, family = str(path / CONFIG), str(values.get("model_type"))
    refuse_quantised(values, where)
    if family == "siglip":
        part = _siglip(values, path)
    elif family in SYSTEMS:
        part = SYSTEMS[family](values, where)
    else:
        part = _alone(_of_one_part(values, where, weights))
    look_as(part, path, values)
    return part


def _siglip(values: Mapping[str, Any], path: Path) -> Part:
    """With the padding of the tokenizer that lies beside it, which SigLIP's texts see."""
    pad = load_tokenizer(path).pad if has_tokenizer(path) else None
    return siglip_part(values, str(path / CONFIG), pad=pad)


def _of_one_part(values: Mapping[str, Any], where: str, weights: Mapping[str, Tensor]) -> Part:
    if "architecture" in values:
        return timm_part(values, where)
    match values.get("model_type"):
        case "vit":
            return vit_part(values, where)
        case "bert":
            return text_part(values, where, any("pooler" in name for name in weights))
        case _ if known_language(values):
            return language_part(values, where)
        case other:
            told = unknown_family(weights, _families(), where)
            raise ValueError(f"{told}; its model_type is {other!r}")


def look_as(part: Part, path: Path, values: Mapping[str, Any]) -> None:
    """Gives the image encoder the transform that lies in a folder, if one does.

    ValueError: it is for pictures of another size.
    """
    transform, encoder = transform_of(path, values), getattr(part.module, "vision", None)
    if not isinstance(encoder, ImageEncoder):
        return
    if transform is None:  # LLaVA's own folders say only this
        pads = values.get("image_aspect_ratio") == "pad"
        encoder.transform = padded(encoder.transform) if pads else encoder.transform
        return
    if transform.size != encoder.transform.size:
        height, width = transform.size
        raise ValueError(
            f"{path}: {PIXELS} makes pictures of {height} x {width}, and the image encoder of {CONFIG} takes "
            f"{encoder.transform.size[0]} x {encoder.transform.size[1]}: one of the two is another model's"
        )
    encoder.transform = transform


def vision_part(values: Mapping[str, Any], where: str) -> Part:
    """The image encoder that a vision_config describes. ValueError: a family that is not known."""
    match values.get("model_type"):
        case "clip_vision_model":
            return clip_vision_part(values, where)
        case "blip_2_vision_model" | "instructblip_vision_model":
            return blip2_vit(values, where)
        case "siglip_vision_model":
            encoder = siglip_vision(Settings(values, where, SIGLIP_VISION))
            return Part(encoder, hf_siglip_vision_table(encoder.dim))
        case "vit":
            return vit_part(values, where)
        case other:
            known = "clip_vision_model, blip_2_vision_model, siglip_vision_model, vit"
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
    remedy = "; a file alone is read of OpenAI's CLIP, LAVIS and MiniGPT-4: give the folder with its config.json"
    raise ValueError(unknown_family(weights, _families(), str(path)) + remedy)


def _families() -> dict[str, Table]:
    """What unknown weights are compared with."""
    return {
        "OpenAI's CLIP": open_clip_table(),
        "CLIP": hf_clip_table(),
        "Llama": llama_table(tied=False),
        "OPT": opt_table(),
        "T5": t5_table(tied=False, gated=True),
        "BERT": bert_table(),
    }
