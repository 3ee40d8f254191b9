"""Weights of T5, T5 1.1 and Flan-T5 in the layout of `transformers`, for our `EncoderDecoder`."""

from vlm.model.weights.table import Row, Table

# Tied to `shared` in memory; older files hold them all the same, and a bias that nothing reads.
COPIES = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
PROJECTIONS = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
PLAIN, GATED = (("wi", "up"), ("wo", "down")), (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))


def t5_table(tied: bool, gated: bool) -> Table:
    """`tied`: the vocabulary head is the embedding (T5 1.0). `gated`: two matrices in front of the FFN (T5 1.1)."""
    theirs, ours = "decoder.block.{i}.layer.1", "decoder.blocks.{i}.cross"
    pairs = [
        ("shared", "embedding"),
        *_stack("encoder", gated, feed=1),
        *_stack("decoder", gated, feed=2),
        *((f"{theirs}.EncDecAttention.{a}", f"{ours}.attention.{b}") for a, b in PROJECTIONS),
        (f"{theirs}.layer_norm", f"{ours}.residual.norm"),
        *([] if tied else [("lm_head", "head")]),
    ]
    rows = tuple(Row(f"{a}.weight", f"{b}.weight") for a, b in pairs)
    return Table("t5", rows, (*COPIES, r"lm_head\.weight") if tied else COPIES)


def _stack(name: str, gated: bool, feed: int) -> list[tuple[str, str]]:
    """`feed`: where the FFN stands among a block's branches."""
    theirs, ours = f"{name}.block.{{i}}.layer", f"{name}.blocks.{{i}}"
    return [
        *((f"{theirs}.0.SelfAttention.{a}", f"{ours}.mixer.{b}") for a, b in PROJECTIONS),
        (f"{theirs}.0.layer_norm", f"{ours}.mixer_residual.norm"),
        *((f"{theirs}.{feed}.DenseReluDense.{a}", f"{ours}.ffn.{b}") for a, b in (GATED if gated else PLAIN)),
        (f"{theirs}.{feed}.layer_norm", f"{ours}.ffn_residual.norm"),
        (f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{name}.relative.table"),
        (f"{name}.final_layer_norm", f"{name}.norm"),
    ]
