"""Published Vision Transformers as image encoders of ours, on timm's classes."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlm.data.image import ImageTransform
from vlm.model.published.part import Part, Settings
from vlm.model.vision import ImageEncoder, TimmBackbone
from vlm.model.weights.vit import blip2_vit_table, eva_vit_g_table

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

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


def timm_vit(s: Settings, act: type[nn.Module], **options: Any) -> VisionTransformer:
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
