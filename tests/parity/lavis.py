"""Shared by the parity tests of LAVIS' files: their names for the tensors of transformers' BLIP-2, by a map of its own.

The map was written from LAVIS' modules (lavis/models/blip2_models, lavis/models/eva_vit.py), not from our tables.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.parity.blip2 import QFORMER, VISION
from vlm.model.published.lavis import Assembled, lavis_language, lavis_system, together
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import load_strict, read

# Heads are 88 wide in ViT-g and 64 in BERT: LAVIS' files do not say it.
TOWER = {**VISION, "hidden_size": 176, "num_attention_heads": 2, "intermediate_size": 200}
BERT = {
    **QFORMER,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "encoder_hidden_size": 176,
}
RENAMED = [
    (r"^vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv", r"visual_encoder.blocks.\1.attn.qkv"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection", r"visual_encoder.blocks.\1.attn.proj"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp", r"visual_encoder.blocks.\1.mlp"),
    (r"^vision_model\.post_layernorm", "ln_vision"),
    (r"^qformer\.(embeddings\.)?layernorm", "Qformer.bert.embeddings.LayerNorm"),
    (r"^(qformer\.)?embeddings\.", "Qformer.bert.embeddings."),
    (
        r"^qformer\.encoder\.layer\.(\d+)\.(attention|crossattention)\.attention",
        r"Qformer.bert.encoder.layer.\1.\2.self",
    ),
    (r"^qformer\.", "Qformer.bert."),
    (r"^vision_projection", "vision_proj"),
    (r"^text_projection", "text_proj"),
]
FROZEN = ("visual_encoder.", "language_model.")


def lavis_names(state: Mapping[str, Tensor], projection: str) -> dict[str, Tensor]:
    """Tensors as LAVIS names them, the language model's left as they were."""
    found = {}
    for name, value in state.items():
        for old, new in [*RENAMED, (r"^language_projection", projection)]:
            name = re.sub(old, new, name)
        if name.endswith("attn.qkv.bias"):  # EVA has no bias of the key
            query, _, value_bias = value.chunk(3)
            found[name.replace("qkv.bias", "q_bias")] = query.clone()
            found[name.replace("qkv.bias", "v_bias")] = value_bias.clone()
        else:
            found[name] = value
    return found


def save_lavis(theirs: PreTrainedModel, folder: Path, projection: str) -> dict[str, Path]:
    """What was trained, EVA's whole tower and the language model, in the files that their authors keep them in."""
    theirs.vision_model.post_layernorm.eps = 1e-5  # LAVIS' own LayerNorm, unlike those in the tower
    every = lavis_names(theirs.state_dict(), projection)
    paths = {"main": folder / "blip2.pth", "vision": folder / "eva_vit_g.pth"}
    trained = {name: value for name, value in every.items() if not name.startswith(FROZEN)}
    trained["Qformer.bert.embeddings.position_ids"] = torch.arange(24)[None]
    tower = {n.removeprefix("visual_encoder."): v for n, v in every.items() if n.startswith("visual_encoder.")}
    last = {name.replace("blocks.2", "blocks.3"): value for name, value in tower.items() if "blocks.2" in name}
    norm = {"norm.weight": torch.ones(176), "norm.bias": torch.zeros(176), "head.weight": torch.zeros(9, 176)}
    torch.save({"model": trained}, paths["main"])
    torch.save({**tower, **last, **norm}, paths["vision"])
    torch.save(
        {"model": {name: v for name, v in every.items() if not name.startswith("language_model.")}},
        folder / "whole.pth",
    )
    if (language := getattr(theirs, "language_model", None)) is not None:
        language.save_pretrained(folder / "language")
        paths["language"] = folder / "language"
    return paths


def opened(paths: Mapping[str, Path]) -> tuple[VisionLanguageModel, Assembled]:
    """The system of such files, with their weights."""
    files = {name: read(path) for name, path in paths.items() if name != "language"}
    others = {name: weights for name, weights in files.items() if name != "main"}
    language = None
    if "language" in paths:
        language = lavis_language(config_of(paths["language"]), "config.json")
        files["language"] = read(paths["language"] / "model.safetensors")
    system = lavis_system(paths["main"].name, files["main"], others, language)
    load_strict(system.module, system.table.to_ours(together(files)), "LAVIS")
    return system.module.eval(), system


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
