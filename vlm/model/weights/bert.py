"""BERT's weights in the layout of `transformers`, for ours: alone, or inside a model with heads ("bert.")."""

from vlm.model.weights.rows import Row, linear
from vlm.model.weights.table import Table

# Old files call gain and bias of a norm by the letters of its paper; heads for pretraining are no part of the encoder.
SPELLINGS = (
    (r"^bert\.", ""),
    (r"^(.*)LayerNorm\.gamma$", r"\1LayerNorm.weight"),
    (r"^(.*)LayerNorm\.beta$", r"\1LayerNorm.bias"),
)
IGNORED = (r"embeddings\.position_ids", r"cls\..*")


def bert_table(pooler: bool = True) -> Table:
    """`pooler`: whether ours has one; a published one is left out otherwise. Segments are kept as their own rows."""
    theirs, ours = "encoder.layer.{i}", "stack.blocks.{i}"
    pairs = [
        *((f"{theirs}.attention.self.{part}", f"{ours}.mixer.{part}") for part in ("query", "key", "value")),
        (f"{theirs}.attention.output.dense", f"{ours}.mixer.out"),
        (f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer_residual.norm"),
        (f"{theirs}.intermediate.dense", f"{ours}.ffn.up"),
        (f"{theirs}.output.dense", f"{ours}.ffn.down"),
        (f"{theirs}.output.LayerNorm", f"{ours}.ffn_residual.norm"),
        ("embeddings.LayerNorm", "embed_norm"),
        *([("pooler.dense", "pooler.0")] if pooler else []),
    ]
    words = [("word", "embedding"), ("position", "position"), ("token_type", "segment")]
    rows = [row for a, b in pairs for row in linear(a, b)]
    rows += [Row(f"embeddings.{a}_embeddings.weight", f"{b}.weight") for a, b in words]
    return Table("bert", tuple(rows), IGNORED if pooler else (*IGNORED, r"pooler\..*"), SPELLINGS)
