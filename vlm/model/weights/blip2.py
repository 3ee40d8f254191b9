"""BLIP-2's Q-Former in the layout of `transformers`, for ours."""

from vlm.model.weights.table import Row, Table, linear


def _attention(theirs: str, ours: str) -> list[Row]:
    parts = [
        ("attention.query", "query"),
        ("attention.key", "key"),
        ("attention.value", "value"),
        ("output.dense", "out"),
    ]
    return [row for a, b in parts for row in linear(f"{theirs}.{a}", f"{ours}.{b}")]


def qformer_table() -> Table:
    """`Blip2QFormerModel` under "qformer.", its text embeddings under "embeddings.", and "query_tokens" (1 Q D)."""
    theirs, ours = "qformer.encoder.layer.{i}", "stack.blocks.{i}"
    routes = [("intermediate", "output", "text"), ("intermediate_query", "output_query", "query")]
    rows = [
        *_attention(f"{theirs}.attention", f"{ours}.mixer"),
        *linear(f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer_residual.norm"),
        *_attention(f"{theirs}.crossattention", f"{ours}.cross.attention"),
        *linear(f"{theirs}.crossattention.output.LayerNorm", f"{ours}.cross.residual.norm"),
        *linear("qformer.layernorm", "embed_norm"),
        Row("query_tokens", "queries"),
        Row("embeddings.word_embeddings.weight", "text.embedding.weight"),
        Row("embeddings.position_embeddings.weight", "text.position.weight"),
    ]
    for up, down, route in routes:
        rows += linear(f"{theirs}.{up}.dense", f"{ours}.ffn.routes.{route}.up")
        rows += linear(f"{theirs}.{down}.dense", f"{ours}.ffn.routes.{route}.down")
        rows += linear(f"{theirs}.{down}.LayerNorm", f"{ours}.ffn_residual.norm.routes.{route}")
    return Table("blip2 qformer", tuple(rows), ignored=(r".*position_ids",))
