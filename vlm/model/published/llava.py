"""LLaVA and LLaVA-1.5 (Liu et al. 2023, arXiv 2304.08485 and 2310.03744) from the settings in their config.json."""

from collections.abc import Mapping
from typing import Any, cast

from vlm.data.image import ImageTransform
from vlm.model.connector import MlpConnector
from vlm.model.language import Language
from vlm.model.published.clip import CLIP_VISION, clip_vision_part
from vlm.model.published.language import language_part
from vlm.model.published.part import Part, Settings
from vlm.model.vision import ImageEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.llava import llava_table

# What transformers' config class takes where config.json says nothing.
LLAVA: dict[str, Any] = {
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
}
# CLIP ViT-L/14 at 336 pixels, which is what LLaVA takes where its config.json has no vision_config.
TOWER: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
DEPTHS = {"linear": 1, "mlp2x_gelu": 2}


def llava_part(values: Mapping[str, Any], where: str, transform: ImageTransform | None = None) -> Part:
    """What a config.json of model_type "llava" describes, as on the hub or as in the authors' own folders.

    The authors' folders hold no image tower: its weights must come from elsewhere, and its settings may be added as
    "vision_config". ValueError: a setting that our parts do not have.
    """
    if "mm_vision_tower" in values:
        return _original(Settings(values, where, {}), transform)
    s = Settings(values, where, LLAVA)
    s.expect(
        projector_hidden_act=("gelu", "linear"),
        multimodal_projector_bias=(True,),
        vision_feature_select_strategy=CHOICES,
    )
    seen = {"model_type": "clip_vision_model", **s.get("vision_config", TOWER)}
    vision = clip_vision_part(
        seen,
        f"{where}: vision_config",
        layer=_layer(s, "vision_feature_layer", seen.get("num_hidden_layers", CLIP_VISION["num_hidden_layers"])),
        class_token="drop" if s["vision_feature_select_strategy"] == "default" else "keep",
        transform=transform,
    )
    language = language_part({"model_type": "llama", **s.get("text_config", {})}, f"{where}: text_config")
    return _composed(vision, language, depth=2 if s["projector_hidden_act"] == "gelu" else 1)


CHOICES = ("default", "full")


def _original(s: Settings, transform: ImageTransform | None) -> Part:
    """As the authors' code saves it: a Llama's settings, and of the tower only its name."""
    s.expect(
        mm_projector_type=tuple(DEPTHS),
        mm_vision_select_feature=("patch", "cls_patch"),
        mm_use_im_start_end=(False,),
        image_aspect_ratio=(None, "square", "pad"),
    )
    vision = clip_vision_part(
        _tower(s),
        f"{s.where}: mm_vision_tower",
        layer=_layer(s, "mm_vision_select_layer", TOWER["num_hidden_layers"]),
        class_token="drop" if s.get("mm_vision_select_feature", "patch") == "patch" else "keep",
        transform=transform,
    )
    language = language_part({**s.given, "model_type": "llama"}, s.where)
    return _composed(vision, language, DEPTHS[s.get("mm_projector_type", "linear")], original=True)


def _tower(s: Settings) -> Mapping[str, Any]:
    """Settings of the image tower: those of the folder that it was found in, or of CLIP's, which it is named after."""
    name = s["mm_vision_tower"]
    if "vision_config" in s:
        return cast(Mapping[str, Any], s["vision_config"])
    if "clip-vit-large-patch14" not in name:
        raise ValueError(f"{s.where}: mm_vision_tower={name!r}: without its folder only CLIP's ViT-L/14 is known here")
    return {**TOWER, "image_size": 336 if "336" in name else 224}


def _composed(vision: Part, language: Part, depth: int, original: bool = False) -> Part:
    encoder, reader = vision.module, language.module
    assert isinstance(encoder, ImageEncoder) and isinstance(reader, Language)
    connector = MlpConnector(encoder.dim, reader.dim, encoder.tokens, depth)
    model = VisionLanguageModel(encoder, connector, language=reader)
    return Part(model, llava_table(language.table, depth, original, vision.table))


def _layer(s: Settings, name: str, blocks: int) -> int:
    """As an image encoder of ours counts, whose -1 is the last block after the norm that LLaVA leaves out."""
    layer = s[name]
    if not isinstance(layer, int) or layer >= 0:
        raise ValueError(f"{s.where}: {name}={layer!r}: one layer, counted from the end, such as -2")
    return blocks - 1 if layer == -1 else layer
