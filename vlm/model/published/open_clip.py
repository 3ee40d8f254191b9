"""open_clip's published folders: CLIP and SigLIP from open_clip_config.json, and CoCa, which has a file of its own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlm.model.heads import ContrastiveHead
from vlm.model.published.coca import coca_part
from vlm.model.published.open_clip_towers import MODEL, image_tower, known, text_tower
from vlm.model.published.part import Part, Settings
from vlm.model.published.vit import real_buffers
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.open_clip import open_clip_table


def open_clip_part(values: Mapping[str, Any], where: str, pad: int | None = None) -> Part:
    """The CLIP, SigLIP or CoCa that an open_clip_config.json describes, with the transform of its preprocess_cfg.

    `pad`: the tokenizer's, where texts see their padding (SigLIP). ValueError: settings that our parts do not have,
    such as a text tower of Hugging Face's.
    """
    s = Settings(values, where, {"preprocess_cfg": {}})
    if "multimodal_cfg" in s["model_cfg"]:
        return coca_part(s)
    model = known(s.section("model_cfg", MODEL), extra=("embed_dim", "vision_cfg", "text_cfg"))
    model.expect(nonscalar_logit_scale=(False,))
    tower = image_tower(model, s["preprocess_cfg"])
    text, bias = text_tower(model, pad)
    logit_bias = model["init_logit_bias"]
    module = VisionLanguageModel(
        tower.vision,
        tower.pool,
        text=text,
        contrast=ContrastiveHead(
            tower.vision.dim,
            text.dim,
            model["embed_dim"],
            image=tower.projection,
            text=nn.Linear(text.dim, model["embed_dim"], bias=bias),
            logit_bias=None if logit_bias is None else float(logit_bias),
        ),
    )
    real_buffers(module)
    prefix = "text." if model["custom_text"] else ""
    return Part(module, open_clip_table(tower.table, prefix, bias, logit_bias is not None))
