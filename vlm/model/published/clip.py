"""Published CLIP (Radford et al. 2021, arXiv 2103.00020) as Hugging Face and OpenAI name it.

open_clip's own folders are read in `open_clip.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from open_clip.transformer import LayerNorm, VisionTransformer
from torch import nn

from vlm.data.image import ImageTransform
from vlm.model.connector import FirstToken
from vlm.model.heads import ContrastiveHead
from vlm.model.published.part import Part, Settings
from vlm.model.published.vit import CLIP_MEAN, CLIP_STD
from vlm.model.text import TextEncoder
from vlm.model.vision import ClassToken, ImageEncoder, open_clip_backbone
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.open_clip import hf_clip_table, hf_clip_vision_table, open_clip_table
from vlm.nn.ffn import QuickGELU

# What transformers' config classes take where config.json says nothing.
CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
}


def clip_part(values: Mapping[str, Any], where: str, transform: ImageTransform | None = None) -> Part:
    """The two towers that a config.json with model_type "clip" describes; `transform`: CLIP's unless given.

    A text's feature is taken at its last valid token, which has to be the end-of-text token. That is where
    transformers finds it by its id, and, with the wrong eos_token_id=2 of old files, by being the largest id.
    """
    s = Settings(values, where, {"projection_dim": 512})
    # Old files give each tower twice; where they differ, transformers believes "…_config_dict".
    vision, text = (f"{name}_config_dict" if values.get(f"{name}_config_dict") else f"{name}_config" for name in TOWERS)
    tower = clip_vision(s.section(vision, CLIP_VISION), transform)
    model = VisionLanguageModel(
        tower,
        FirstToken(tower.dim),
        text=(words := clip_text(s.section(text, CLIP_TEXT))),
        contrast=ContrastiveHead(tower.dim, words.dim, s["projection_dim"]),
    )
    return Part(model, hf_clip_table())


TOWERS = ("vision", "text")


def clip_vision_part(
    values: Mapping[str, Any],
    where: str,
    layer: int = -1,
    class_token: ClassToken = "keep",
    transform: ImageTransform | None = None,
) -> Part:
    """CLIP's image tower alone from its vision_config, as LLaVA reads it; table: of names under "vision_model."."""
    encoder = clip_vision(Settings(values, where, CLIP_VISION), transform, layer, class_token)
    return Part(encoder, hf_clip_vision_table().under("", "backbone.visual."))


def clip_vision(
    s: Settings, transform: ImageTransform | None = None, layer: int = -1, class_token: ClassToken = "keep"
) -> ImageEncoder:
    """open_clip's ViT in the sizes of a vision_config."""
    s.expect(hidden_act=tuple(ACTIVATIONS), num_channels=(3,))
    tower = open_clip_vit(
        s["image_size"],
        s["patch_size"],
        s["hidden_size"],
        s["num_hidden_layers"],
        s["num_attention_heads"],
        s["intermediate_size"],
        ACTIVATIONS[s["hidden_act"]],
        s["layer_norm_eps"],
    )
    transform = clip_transform(s["image_size"]) if transform is None else transform
    return ImageEncoder(open_clip_backbone(tower, layer, class_token), transform)


def clip_text(s: Settings) -> TextEncoder:
    """Our text tower in the sizes of a text_config."""
    s.expect(hidden_act=tuple(ACTIVATIONS))
    return TextEncoder(
        s["vocab_size"],
        s["hidden_size"],
        s["num_hidden_layers"],
        s["num_attention_heads"],
        s["max_position_embeddings"],
        ACTIVATIONS[s["hidden_act"]],
        s["intermediate_size"],
        eps=s["layer_norm_eps"],
    )


def openai_clip_part(shapes: Mapping[str, Sequence[int]], where: str) -> Part:
    """OpenAI's own CLIP from the shapes of its state dict, which has no config beside it.

    ValueError: a state dict of another model, one with a ResNet.
    """
    if "visual.layer1.0.conv1.weight" in shapes:
        raise ValueError(
            f"{where}: a CLIP with a ResNet; only those with a ViT are read from OpenAI's files "
            "(for its image encoder alone: model.vision.kind=open_clip)"
        )
    needed = ["visual.conv1.weight", "visual.positional_embedding", "positional_embedding", "text_projection"]
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(f"{where}: no CLIP of OpenAI's: it has no {', '.join(missing)}")
    width, _, _, patch = shapes["visual.conv1.weight"]
    grid = math.isqrt(shapes["visual.positional_embedding"][0] - 1)
    tower = open_clip_vit(
        grid * patch, patch, width, _count(shapes, "visual.transformer."), width // 64, 4 * width, QuickGELU
    )
    longest, dim = shapes["positional_embedding"]
    vocabulary = shapes["token_embedding.weight"][0]
    text = TextEncoder(vocabulary, dim, _count(shapes, "transformer."), dim // 64, longest, QuickGELU)
    model = VisionLanguageModel(
        ImageEncoder(open_clip_backbone(tower), clip_transform(grid * patch)),
        FirstToken(width),
        text=text,
        contrast=ContrastiveHead(width, dim, shapes["text_projection"][1]),
    )
    return Part(model, open_clip_table())


def _count(names: Mapping[str, Any], prefix: str) -> int:
    start = f"{prefix}resblocks."
    return len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})


def open_clip_vit(
    image_size: int,
    patch: int,
    width: int,
    layers: int,
    heads: int,
    hidden: int,
    activation: Callable[[], nn.Module],
    eps: float = 1e-5,
) -> VisionTransformer:
    """open_clip's ViT without its projection, which is our contrastive head's."""
    tower = VisionTransformer(
        image_size,
        patch,
        width,
        layers,
        heads,
        (hidden + 0.5) / width,  # open_clip cuts the fraction off
        output_dim=1,
        act_layer=activation,
        norm_layer=partial(LayerNorm, eps=eps),
    )
    tower.proj = None
    return tower


def clip_transform(size: int) -> ImageTransform:
    """The shorter side to `size`, bicubic, and the middle of it."""
    return ImageTransform((size, size), CLIP_MEAN, CLIP_STD)
