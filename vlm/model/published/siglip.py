"""Published SigLIP (Zhai et al. 2023, arXiv 2303.15343) as Hugging Face names it; SigLIP 2 of fixed sizes is the same.

open_clip's own folders are read in `open_clip.py`.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlm.data.image import ImageTransform
from vlm.model.connector import AttentionPool
from vlm.model.heads import ContrastiveHead
from vlm.model.published.clip import ACTIVATIONS
from vlm.model.published.part import Part, Settings
from vlm.model.published.vit import HALF, squashed, timm_vit
from vlm.model.text import PaddedTextEncoder
from vlm.model.vision import ImageEncoder, TimmBackbone
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.open_clip import hf_siglip_table
from vlm.nn.ffn import Mlp

# What transformers' config classes take where config.json says nothing.
SIGLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
SIGLIP_TEXT = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "pad_token_id": 1,
    "projection_size": None,
}


def siglip_part(
    values: Mapping[str, Any], where: str, transform: ImageTransform | None = None, pad: int | None = None
) -> Part:
    """The two towers that a config.json with model_type "siglip" describes.

    `pad`: the tokenizer's, which fills all texts up to the same length and is seen by them; the config's unless given.
    """
    s = Settings(values, where, {})
    seen, read = s.section("vision_config", SIGLIP_VISION), s.section("text_config", SIGLIP_TEXT)
    vision, text = siglip_vision(seen, transform), _text(read, pad)
    dim = text.dim if read["projection_size"] is None else read["projection_size"]
    if dim != vision.dim:
        raise ValueError(f"{where}: texts have {dim} numbers and images {vision.dim}: they cannot be compared")
    model = VisionLanguageModel(
        vision,
        _pool(seen),
        text=text,
        contrast=ContrastiveHead(
            dim, dim, dim, image=nn.Identity(), text=nn.Linear(text.dim, dim), temperature=0.1, logit_bias=-10.0
        ),
    )
    return Part(model, hf_siglip_table(vision.dim))


def siglip_vision(s: Settings, transform: ImageTransform | None = None) -> ImageEncoder:
    """timm's ViT without a class token, in the sizes of a vision_config; all patches behind the last norm."""
    s.expect(hidden_act=tuple(ACTIVATIONS), num_channels=(3,), vision_use_head=(True,))
    model = timm_vit(s, ACTIVATIONS[s["hidden_act"]], class_token=False, global_pool="")
    transform = squashed(s["image_size"], HALF, HALF) if transform is None else transform
    return ImageEncoder(TimmBackbone(model), transform)


def _pool(s: Settings) -> AttentionPool:
    dim = s["hidden_size"]
    ffn = Mlp(dim, s["intermediate_size"], ACTIVATIONS[s["hidden_act"]]())
    norm = nn.LayerNorm(dim, eps=s["layer_norm_eps"])
    return AttentionPool(dim, dim, 1, s["num_attention_heads"], ffn, ffn_norm=norm)


def _text(s: Settings, pad: int | None) -> PaddedTextEncoder:
    s.expect(hidden_act=tuple(ACTIVATIONS))
    return PaddedTextEncoder(
        s["vocab_size"],
        s["hidden_size"],
        s["num_hidden_layers"],
        s["num_attention_heads"],
        s["max_position_embeddings"],
        ACTIVATIONS[s["hidden_act"]],
        s["intermediate_size"],
        eps=s["layer_norm_eps"],
        pad=s["pad_token_id"] if pad is None else pad,
    )
