"""CLIP's weights: open_clip's text tower and projections for ours, Hugging Face's image tower for open_clip's."""

from vlm.model.weights.table import SCALAR, Row, Table, Transposed, linear


def _attention(theirs: str, ours: str) -> list[Row]:
    parts = ("query", "key", "value")
    return [
        Row(f"{theirs}.in_proj_weight", tuple(f"{ours}.{part}.weight" for part in parts)),
        Row(f"{theirs}.in_proj_bias", tuple(f"{ours}.{part}.bias" for part in parts)),
        *linear(f"{theirs}.out_proj", f"{ours}.out"),
    ]


def open_clip_table() -> Table:
    """Text tower, projections and temperature of open_clip's `CLIP` with a ViT image tower.

    The image tower itself runs as open_clip's own module (`vision.backbone.visual`), except its last projection,
    which is our contrastive head's.
    """
    theirs, ours = "transformer.resblocks.{i}", "text.stack.blocks.{i}"
    rows = [
        *_attention(f"{theirs}.attn", f"{ours}.mixer"),
        *linear(f"{theirs}.ln_1", f"{ours}.mixer_residual.norm"),
        *linear(f"{theirs}.ln_2", f"{ours}.ffn_residual.norm"),
        *linear(f"{theirs}.mlp.c_fc", f"{ours}.ffn.up"),
        *linear(f"{theirs}.mlp.c_proj", f"{ours}.ffn.down"),
        *linear("ln_final", "text.stack.norm"),
        Row("token_embedding.weight", "text.embedding.weight"),
        Row("positional_embedding", "text.position"),
        Row("text_projection", "contrast.text.weight", Transposed()),
        Row("visual.proj", "contrast.image.weight", Transposed()),
        Row("logit_scale", "contrast.log_scale", SCALAR),
    ]
    return Table("open_clip", tuple(rows), ignored=(r"visual\.(?!proj$).*", r"attn_mask"))


def hf_clip_vision_table() -> Table:
    """Hugging Face's CLIP image tower (`vision_model.` already taken off) for open_clip's `VisionTransformer`."""
    theirs, ours = "encoder.layers.{i}", "transformer.resblocks.{i}"
    attention = f"{theirs}.self_attn"
    fused = [
        Row(tuple(f"{attention}.{name}_proj.{part}" for name in "qkv"), f"{ours}.attn.in_proj_{part}")
        for part in ("weight", "bias")
    ]
    pairs = [
        (f"{attention}.out_proj", f"{ours}.attn.out_proj"),
        (f"{theirs}.layer_norm1", f"{ours}.ln_1"),
        (f"{theirs}.layer_norm2", f"{ours}.ln_2"),
        (f"{theirs}.mlp.fc1", f"{ours}.mlp.c_fc"),
        (f"{theirs}.mlp.fc2", f"{ours}.mlp.c_proj"),
        ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"),
    ]
    rows = fused + [row for a, b in pairs for row in linear(a, b)]
    rows += [
        Row("embeddings.class_embedding", "class_embedding"),
        Row("embeddings.position_embedding.weight", "positional_embedding"),
        Row("embeddings.patch_embedding.weight", "conv1.weight"),
    ]
    return Table("CLIP image tower", tuple(rows), ignored=(r"embeddings\.position_ids",))
