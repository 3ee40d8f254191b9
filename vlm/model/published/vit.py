"""Published Vision Transformers as image encoders of ours, on timm's classes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlm.data.image import ImageTransform
from vlm.model.published.part import Part, Settings
from vlm.model.vision import ClassToken, ImageEncoder, TimmBackbone, timm_transform
from vlm.model.weights.vit import blip2_vit_table, eva_vit_g_table, hf_vit_table, timm_table

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# What transformers' config classes take where config.json says nothing.
BLIP2_VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}

VIT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}


def blip2_vit(
    values: Mapping[str, Any],
    where: str,
    layout: Literal["huggingface", "lavis"] = "huggingface",
    transform: ImageTransform | None = None,
) -> Part:
    """EVA-CLIP's ViT-g as BLIP-2 has it: 39 of 40 blocks, no norm after them; class token and patches come out.

    `values`: vision_config of a BLIP-2 or InstructBLIP (empty: LAVIS' sizes); `transform`: BLIP-2's unless given.
    Table: of names under "vision_model." (Hugging Face, without `post_layernorm`) or of `eva_vit_g.pth` (LAVIS).
    """
    s = Settings(values, where, BLIP2_VISION)
    s.expect(hidden_act=("gelu",), qkv_bias=(True,))
    model = timm_vit(s, act=nn.GELU, final_norm=False)
    table = blip2_vit_table() if layout == "huggingface" else eva_vit_g_table(s["num_hidden_layers"])
    transform = squashed(s["image_size"], CLIP_MEAN, CLIP_STD) if transform is None else transform
    return Part(ImageEncoder(TimmBackbone(model), transform), table.under("", "backbone.model."))


def vit_part(values: Mapping[str, Any], where: str, transform: ImageTransform | None = None) -> Part:
    """The plain ViT that a config.json with model_type "vit" describes: class token and patches, after the norm."""
    s = Settings(values, where, VIT)
    s.expect(hidden_act=("gelu",), num_channels=(3,))
    model = timm_vit(s, act=nn.GELU, qkv_bias=s["qkv_bias"])
    if transform is None:
        transform = replace(squashed(s["image_size"], HALF, HALF), interpolation="bilinear")
    return Part(ImageEncoder(TimmBackbone(model), transform), hf_vit_table().under("", "backbone.model."))


def timm_part(values: Mapping[str, Any], where: str, layer: int = -1, class_token: ClassToken = "keep") -> Part:
    """An image encoder from the config.json of one of timm's folders: any architecture that timm knows, EVA too.

    The transform is that of its pretrained_cfg; the classifier is left out. ValueError: an unknown architecture (the
    nearest are named), arguments that it does not take.
    """
    s = Settings(values, where, {"model_args": {}})
    name = s["architecture"]
    published = s["pretrained_cfg"] if "pretrained_cfg" in s else dict(values)  # old files have but one level
    model = timm_model(name, where, pretrained_cfg=published, **{**s["model_args"], "num_classes": 0})
    encoder = ImageEncoder(TimmBackbone(model, layer, class_token), timm_transform(model, None))
    real_buffers(encoder)
    given = published.get("classifier") or getattr(model, "default_cfg", {}).get("classifier") or ()
    classifiers = (given,) if isinstance(given, str) else tuple(given)
    return Part(encoder, timm_table(classifiers).under("", "backbone.model."))


def timm_model(name: str, where: str, **options: Any) -> nn.Module:
    """A model of timm's without weights. Errors as of `timm_part`."""
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models(), n=5)) or "none"
        raise ValueError(f"{where}: this timm ({timm.__version__}) has no architecture '{name}'; near: {near}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    except TypeError as error:
        raise ValueError(f"{where}: timm's {name} does not take what model_args says ({error})") from None
    return model


def real_buffers(model: nn.Module) -> None:
    """Gives buffers that no file holds (EVA-02's rotations) memory on the CPU and values, if they are on meta."""
    for module in model.modules():
        fill = getattr(module, "init_non_persistent_buffers", None)
        kept = module.state_dict().keys()
        lost = [(name, it) for name, it in module.named_buffers(recurse=False) if it.is_meta and name not in kept]
        for name, buffer in lost:
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        if lost:
            assert callable(fill)  # timm's convention for them
            with torch.device("cpu"):
                fill()


def timm_vit(s: Settings, act: Callable[[], nn.Module], **options: Any) -> VisionTransformer:
    """timm's class in the sizes that a config.json of Hugging Face names; `options` are the class's own."""
    width, hidden = s["hidden_size"], s["intermediate_size"]
    return VisionTransformer(
        img_size=s["image_size"],
        patch_size=s["patch_size"],
        num_classes=0,
        embed_dim=width,
        depth=s["num_hidden_layers"],
        num_heads=s["num_attention_heads"],
        mlp_ratio=(hidden + 0.5) / width,  # timm cuts the fraction off
        norm_layer=partial(nn.LayerNorm, eps=s["layer_norm_eps"]),
        act_layer=act,
        **options,
    )


def squashed(size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> ImageTransform:
    """Square, proportions ignored, bicubic: BLIP-2, SigLIP, ViT."""
    return ImageTransform((size, size), mean, std, resize="squash")
