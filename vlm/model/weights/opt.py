"""OPT's weights in the layout of `transformers`, for our `Decoder`."""

from vlm.model.weights.rows import Row, linear
from vlm.model.weights.table import Table


def opt_table(tied: bool = True) -> Table:
    """Some published files begin their names with "decoder.". The two rows before position 0 are kept as they are."""
    prefix, ours = "model.decoder", "stack.blocks.{i}"
    theirs = f"{prefix}.layers.{{i}}"
    pairs = [
        (f"{theirs}.self_attn.q_proj", f"{ours}.mixer.query"),
        (f"{theirs}.self_attn.k_proj", f"{ours}.mixer.key"),
        (f"{theirs}.self_attn.v_proj", f"{ours}.mixer.value"),
        (f"{theirs}.self_attn.out_proj", f"{ours}.mixer.out"),
        (f"{theirs}.self_attn_layer_norm", f"{ours}.mixer_residual.norm"),
        (f"{theirs}.fc1", f"{ours}.ffn.up"),
        (f"{theirs}.fc2", f"{ours}.ffn.down"),
        (f"{theirs}.final_layer_norm", f"{ours}.ffn_residual.norm"),
        (f"{prefix}.final_layer_norm", "stack.norm"),
    ]
    rows = [row for a, b in pairs for row in linear(a, b)]
    rows += [
        Row(f"{prefix}.embed_tokens.weight", "embedding.weight"),
        Row(f"{prefix}.embed_positions.weight", "positions.embedding.weight"),
    ]
    if not tied:
        rows.append(Row("lm_head.weight", "head.weight"))
    return Table("opt", tuple(rows), (r"lm_head\.weight",) if tied else (), ((r"^decoder\.", "model.decoder."),))
