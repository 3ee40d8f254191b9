"""CoCa as open_clip publishes it: one pool for both purposes, and a decoder of causal and looking blocks in turn."""

from dataclasses import asdict

from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import nn

from vlm.model.coca import CoCa, caption_decoder
from vlm.model.connector import AttentionPool
from vlm.model.heads import ContrastiveHead
from vlm.model.published.open_clip_towers import MODEL, PLAIN, activation, known, own_vit
from vlm.model.published.part import Part, Settings
from vlm.model.vision import ImageEncoder, open_clip_backbone, open_clip_transform
from vlm.model.weights.coca import coca_table

SECTIONS = ("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg")


def coca_part(s: Settings) -> Part:
    """The CoCa of an open_clip_config.json. ValueError: settings that our parts do not have."""
    model = known(s.section("model_cfg", MODEL), extra=SECTIONS)
    seen = known(model.section("vision_cfg", asdict(CLIPVisionCfg())))
    read = known(model.section("text_cfg", asdict(CLIPTextCfg())))
    written = known(model.section("multimodal_cfg", asdict(MultimodalCfg())))
    _refuse(model, seen, read, written)
    quick, dim = model["quick_gelu"], model["embed_dim"]
    pool = AttentionPool(
        seen["width"],
        dim,
        seen["attn_pooler_queries"],
        seen["attn_pooler_heads"],
        norms=nn.LayerNorm,
        out_norm=nn.LayerNorm(dim),
    )
    caption = caption_decoder(
        read["vocab_size"],
        read["width"],
        read["context_length"],
        layers=(read["layers"], written["layers"]),
        heads=(read["heads"], written["heads"]),
        hidden=(int(read["width"] * read["mlp_ratio"]), 4 * written["width"]),  # open_clip never reads the second ratio
        activation=activation(read, quick),
        pad=read["pad_id"],
    )
    logit_bias = model["init_logit_bias"]
    contrast = ContrastiveHead(dim, read["width"], dim, logit_bias=None if logit_bias is None else float(logit_bias))
    module = CoCa(_vision(seen, quick, s), pool, caption, contrast)
    return Part(module, coca_table(written["layers"], seen["width"] == dim, logit_bias is not None))


def _vision(seen: Settings, quick: bool, s: Settings) -> ImageEncoder:
    tower = own_vit(seen, quick)
    tower.ln_post = nn.Identity()  # it stands behind the pool
    return ImageEncoder(
        open_clip_backbone(tower), open_clip_transform({"size": seen["image_size"], **s["preprocess_cfg"]})
    )


def _refuse(model: Settings, seen: Settings, read: Settings, written: Settings) -> None:
    model.expect(nonscalar_logit_scale=(False,))
    plain = dict.fromkeys(PLAIN, (None, False))
    seen.expect(
        timm_model_name=(None,),
        attentional_pool=(True,),
        pool_type=("tok",),
        no_ln_pre=(False,),
        ls_init_value=(None,),
        pos_embed_type=("learnable",),
        norm_kwargs=(None, {}),
        **plain,
    )
    read.expect(
        hf_model_name=(None,),
        embed_cls=(True,),
        no_causal_mask=(False,),
        proj_type=("linear",),
        proj_bias=(False,),
        ls_init_value=(None,),
        norm_kwargs=(None, {}),
        act_kwargs=(None, {}),
        **plain,
    )
    written.expect(ls_init_value=(None,))
    widths = {model["embed_dim"], read["width"], written["width"]}
    if len(widths) > 1 or read["vocab_size"] != written["vocab_size"]:
        raise ValueError(
            f"{model.where}: embed_dim, width and vocab_size of text_cfg and multimodal_cfg have to be equal"
        )
