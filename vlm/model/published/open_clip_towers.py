"""Towers from the settings in an open_clip_config.json: images by open_clip's own ViT or timm's, and texts."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import VisionTransformer as OwnVit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlm.model.connector import AttentionPool, FirstToken
from vlm.model.published.clip import open_clip_vit
from vlm.model.published.part import Settings
from vlm.model.published.vit import timm_model
from vlm.model.text import PaddedTextEncoder, TextEncoder
from vlm.model.vision import ImageEncoder, TimmBackbone, open_clip_backbone, open_clip_transform
from vlm.model.weights.open_clip import own_vit_table, timm_map_table, timm_token_table
from vlm.model.weights.table import Table
from vlm.nn.ffn import Mlp, QuickGELU

# What open_clip's classes take where model_cfg says nothing.
MODEL = {
    "quick_gelu": False,
    "custom_text": False,
    "init_logit_bias": None,
    "init_logit_scale": None,
    "nonscalar_logit_scale": False,
}
# Settings of open_clip's other blocks, which a plain Transformer has unset.
PLAIN = ("block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


class Tower(NamedTuple):
    """An image tower with what makes one vector of its tokens, and the table of both."""

    vision: ImageEncoder
    pool: FirstToken | AttentionPool
    projection: nn.Module
    table: Table


def image_tower(model: Settings, preprocess: Mapping[str, Any]) -> Tower:
    """The image tower of a vision_cfg. ValueError: settings that our parts do not have."""
    s = known(model.section("vision_cfg", asdict(CLIPVisionCfg())))
    preprocess = {"size": s["image_size"], **preprocess}
    if s["timm_model_name"]:
        return _timm_tower(s, preprocess, model["embed_dim"])
    s.expect(attentional_pool=(False,), pool_type=("tok",), no_ln_pre=(False,), final_ln_after_pool=(False,))
    s.expect(**dict.fromkeys(PLAIN, (None, False)), ls_init_value=(None,), pos_embed_type=("learnable",))
    if not isinstance(s["layers"], int):
        raise ValueError(f"{s.where}: layers={s['layers']}: a ResNet, which has no class token to compare")
    vision = ImageEncoder(open_clip_backbone(own_vit(s, model["quick_gelu"])), open_clip_transform(preprocess))
    projection = nn.Linear(vision.dim, model["embed_dim"], bias=False)
    return Tower(vision, FirstToken(vision.dim), projection, own_vit_table())


def own_vit(s: Settings, quick: bool) -> OwnVit:
    """open_clip's ViT in the sizes of a vision_cfg, without its projection."""
    return open_clip_vit(
        s["image_size"],
        s["patch_size"],
        s["width"],
        s["layers"],
        s["width"] // s["head_width"],
        int(s["width"] * s["mlp_ratio"]),
        activation(s, quick),
        (s["norm_kwargs"] or {}).get("eps", 1e-5),
    )


def activation(s: Settings, quick: bool) -> Callable[[], nn.Module]:
    """Of a tower's blocks."""
    s.expect(act_kwargs=(None, {}, {"approximate": "tanh"}))
    if quick and s["act_kwargs"]:
        raise ValueError(f"{s.where}: act_kwargs={s['act_kwargs']} beside quick_gelu, which takes none")
    return QuickGELU if quick else partial(nn.GELU, **(s["act_kwargs"] or {}))


def _timm_tower(s: Settings, preprocess: Mapping[str, Any], embed: int) -> Tower:
    s.expect(timm_pool=("token", "map"), timm_proj=(None, "", "none"))
    name, pool = s["timm_model_name"], s["timm_pool"]
    model = timm_model(name, s.where, num_classes=0, global_pool=pool)
    projected = s["timm_proj"] != "none"
    if pool == "token":
        if not projected or not isinstance(getattr(model, "fc_norm", None), nn.Identity):
            raise ValueError(f"{s.where}: a class token of timm's {name} that is not normalised and then projected")
        vision = ImageEncoder(TimmBackbone(model), open_clip_transform(preprocess))
        return Tower(vision, FirstToken(vision.dim), nn.Linear(vision.dim, embed), timm_token_table())
    if projected or not isinstance(model, VisionTransformer):
        raise ValueError(
            f"{s.where}: timm's {name} with timm_pool=map: only a ViT without projection is known (SigLIP)"
        )
    connector = pool_of(model)
    vision = ImageEncoder(TimmBackbone(model, class_token="drop"), open_clip_transform(preprocess))
    return Tower(vision, connector, nn.Identity(), timm_map_table(vision.dim))


def pool_of(model: VisionTransformer) -> AttentionPool:
    """Our pool in the sizes of timm's, which is taken off the model."""
    pool: Any = model.attn_pool
    dim: int = model.embed_dim
    ffn = Mlp(dim, pool.mlp.fc1.out_features, pool.mlp.act)
    model.register_module("attn_pool", None)
    return AttentionPool(dim, dim, 1, pool.num_heads, ffn, ffn_norm=nn.LayerNorm(dim, eps=pool.norm.eps))


def text_tower(model: Settings, pad: int | None) -> tuple[TextEncoder, bool]:
    """The text tower of a text_cfg, and whether its projection has a bias."""
    s = known(model.section("text_cfg", asdict(CLIPTextCfg())))
    s.expect(hf_model_name=(None,), embed_cls=(False,), proj_type=("linear",), ls_init_value=(None,))
    s.expect(**dict.fromkeys(PLAIN, (None, False)), final_ln_after_pool=(False,))
    whole = s["no_causal_mask"]
    s.expect(pool_type=("last",) if whole else ("argmax", "eos"))
    sizes = (
        s["vocab_size"],
        s["width"],
        s["layers"],
        s["heads"],
        s["context_length"],
        activation(s, model["quick_gelu"]),
    )
    options = {"hidden": int(s["width"] * s["mlp_ratio"]), "eps": (s["norm_kwargs"] or {}).get("eps", 1e-5)}
    if whole:
        return PaddedTextEncoder(*sizes, pad=s["pad_id"] if pad is None else pad, **options), s["proj_bias"]
    return TextEncoder(*sizes, **options), s["proj_bias"]


def known(s: Settings, extra: tuple[str, ...] = ()) -> Settings:
    """The same, after refusing settings that open_clip itself would not know."""
    if strangers := [name for name in s.given if name not in s.defaults and name not in extra]:
        raise ValueError(f"{s.where}: no settings of open_clip's: {', '.join(strangers)}")
    return s
