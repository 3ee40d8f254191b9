"""Weights of Vision Transformers as Hugging Face and LAVIS name them, for timm's classes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.model.weights.rows import Row, Subtree, linear
from vlm.model.weights.table import Table

BLOCK = "blocks.{i}"


@dataclass(frozen=True)
class QueryValueBias:
    """Biases of query and value alone (EVA, BEiT), as the bias of one fused layer.

    Between them stands a key's of zero, which is dropped on the way back: a key's bias adds the same number to all the
    scores of a query, and softmax does not see that.
    """

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Query, zero, value."""
        query, value = theirs
        return (torch.cat([query, torch.zeros_like(query), value]),)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Query and value."""
        query, _, value = ours[0].chunk(3)
        return query.clone(), value.clone()


def blip2_vit_table() -> Table:
    """BLIP-2's tower as Hugging Face publishes it (under "vision_model."), without the norm after it.

    That norm, `post_layernorm`, is LAVIS' `ln_vision` and the Q-Former's `image_norm` here.
    """
    theirs = "encoder.layers.{i}"
    pairs = [
        ("embeddings.patch_embedding", "patch_embed.proj"),
        (f"{theirs}.self_attn.qkv", f"{BLOCK}.attn.qkv"),
        (f"{theirs}.self_attn.projection", f"{BLOCK}.attn.proj"),
        (f"{theirs}.layer_norm1", f"{BLOCK}.norm1"),
        (f"{theirs}.layer_norm2", f"{BLOCK}.norm2"),
        (f"{theirs}.mlp.fc1", f"{BLOCK}.mlp.fc1"),
        (f"{theirs}.mlp.fc2", f"{BLOCK}.mlp.fc2"),
    ]
    rows = [row for a, b in pairs for row in linear(a, b)]
    rows += [Row("embeddings.class_embedding", "cls_token"), Row("embeddings.position_embedding", "pos_embed")]
    return Table("BLIP-2 image tower", tuple(rows))


def eva_vit_g_table(blocks: int) -> Table:
    """The same as LAVIS keeps it (`eva_vit_g.pth`; "visual_encoder." in whole checkpoints).

    What LAVIS leaves out as well is ignored: EVA-CLIP's blocks from number `blocks` on, its last norm and its head.
    """
    same = ["patch_embed.proj", *(f"{BLOCK}.{part}" for part in ("attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2"))]
    rows = [row for name in same for row in linear(name, name)]
    rows += [
        Row("cls_token", "cls_token"),
        Row("pos_embed", "pos_embed"),
        Row(f"{BLOCK}.attn.qkv.weight", f"{BLOCK}.attn.qkv.weight"),
        Row((f"{BLOCK}.attn.q_bias", f"{BLOCK}.attn.v_bias"), f"{BLOCK}.attn.qkv.bias", QueryValueBias()),
    ]
    return Table("EVA ViT-g", tuple(rows), ignored=(rf"blocks\.{blocks}\..*", r"(fc_)?norm\..*", r"head\..*"))


def hf_vit_table() -> Table:
    """Hugging Face's plain ViT, with or without "vit." before its names; its pooler and classifier are left out."""
    theirs = "encoder.layer.{i}"
    fused = [
        Row(
            tuple(f"{theirs}.attention.attention.{name}.{part}" for name in ("query", "key", "value")),
            f"{BLOCK}.attn.qkv.{part}",
        )
        for part in ("weight", "bias")
    ]
    pairs = [
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        (f"{theirs}.attention.output.dense", f"{BLOCK}.attn.proj"),
        (f"{theirs}.layernorm_before", f"{BLOCK}.norm1"),
        (f"{theirs}.layernorm_after", f"{BLOCK}.norm2"),
        (f"{theirs}.intermediate.dense", f"{BLOCK}.mlp.fc1"),
        (f"{theirs}.output.dense", f"{BLOCK}.mlp.fc2"),
        ("layernorm", "norm"),
    ]
    rows = fused + [row for a, b in pairs for row in linear(a, b)]
    rows += [Row("embeddings.cls_token", "cls_token"), Row("embeddings.position_embeddings", "pos_embed")]
    ignored = (r"pooler\..*", r"classifier\..*", r"embeddings\.mask_token")
    return Table("vit", tuple(rows), ignored, spellings=((r"^vit\.", ""),))


def timm_table(classifiers: Sequence[str]) -> Table:
    """Any model of timm by its own names, except the classifiers that those modules are."""
    return Table("timm", (Subtree("", ""),), ignored=tuple(re.escape(name) + r"\..*" for name in classifiers))
