"""Llama's weights (also Vicuna, SmolLM: the layout of `transformers`) for our `Decoder`."""

from vlm.model.weights.table import Row, Table, linear


def llama_table(tied: bool) -> Table:
    """`tied`: the vocabulary head is the embedding, so a published copy of it is not read twice."""
    theirs, ours = "model.layers.{i}", "stack.blocks.{i}"
    pairs = [
        ("self_attn.q_proj", "mixer.query"),
        ("self_attn.k_proj", "mixer.key"),
        ("self_attn.v_proj", "mixer.value"),
        ("self_attn.o_proj", "mixer.out"),
        ("mlp.gate_proj", "ffn.gate"),
        ("mlp.up_proj", "ffn.up"),
        ("mlp.down_proj", "ffn.down"),
        ("input_layernorm", "mixer_residual.norm"),
        ("post_attention_layernorm", "ffn_residual.norm"),
    ]
    rows = [row for a, b in pairs for row in linear(f"{theirs}.{a}", f"{ours}.{b}", bias=False)]
    rows += [Row("model.embed_tokens.weight", "embedding.weight"), Row("model.norm.weight", "stack.norm.weight")]
    if not tied:
        rows.append(Row("lm_head.weight", "head.weight"))
    ignored = (r".*rotary_emb\.inv_freq", *([r"lm_head\.weight"] if tied else []))
    return Table("llama", tuple(rows), ignored)
