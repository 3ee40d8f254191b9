"""Weights of Llama (also Vicuna, Mistral), Qwen2 and Qwen3 in the layout of `transformers`, for our `Decoder`."""

from vlm.model.weights.rows import Row, linear
from vlm.model.weights.table import Table

THEIRS, OURS = "model.layers.{i}", "stack.blocks.{i}"


def llama_table(tied: bool) -> Table:
    """`tied`: the vocabulary head is the embedding, so a published copy of it is not read twice."""
    return Table("llama", (*attention_rows(), *gated_rows(), *frame_rows(tied)), ignored_names(tied))


def qwen2_table(tied: bool) -> Table:
    """Llama's with biases of query, key and value."""
    return Table("qwen2", (*attention_rows(bias=True), *gated_rows(), *frame_rows(tied)), ignored_names(tied))


def qwen3_table(tied: bool) -> Table:
    """Llama's with norms of query and key heads."""
    norms = [
        Row(f"{THEIRS}.self_attn.{theirs}_norm.weight", f"{OURS}.mixer.{ours}_norm.weight")
        for theirs, ours in (("q", "query"), ("k", "key"))
    ]
    return Table("qwen3", (*attention_rows(), *norms, *gated_rows(), *frame_rows(tied)), ignored_names(tied))


def attention_rows(bias: bool = False) -> list[Row]:
    """Projections and the norms around them; `bias`: of query, key and value."""
    inner = [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")]
    return [
        *(row for a, b in inner for row in linear(f"{THEIRS}.self_attn.{a}", f"{OURS}.mixer.{b}", bias)),
        *linear(f"{THEIRS}.self_attn.o_proj", f"{OURS}.mixer.out", bias=False),
        Row(f"{THEIRS}.input_layernorm.weight", f"{OURS}.mixer_residual.norm.weight"),
        Row(f"{THEIRS}.post_attention_layernorm.weight", f"{OURS}.ffn_residual.norm.weight"),
    ]


def gated_rows() -> list[Row]:
    """The dense SwiGLU."""
    return [Row(f"{THEIRS}.mlp.{part}_proj.weight", f"{OURS}.ffn.{part}.weight") for part in ("gate", "up", "down")]


def frame_rows(tied: bool) -> list[Row]:
    """Embedding, last norm and head."""
    rows = [Row("model.embed_tokens.weight", "embedding.weight"), Row("model.norm.weight", "stack.norm.weight")]
    return rows if tied else [*rows, Row("lm_head.weight", "head.weight")]


def ignored_names(tied: bool) -> tuple[str, ...]:
    """Published tensors without weights of their own."""
    return (r".*rotary_emb\.inv_freq", *([r"lm_head\.weight"] if tied else []))
