"""CoCa's weights in open_clip's layout."""

from vlm.model.weights.conversion import SCALAR, Transposed
from vlm.model.weights.open_clip import VISUAL, block_rows, mha_rows
from vlm.model.weights.rows import Row, Subtree, linear
from vlm.model.weights.table import Table


def coca_table(decoder_layers: int, fused: bool, logit_bias: bool = False) -> Table:
    """`fused`: the pool's projections are one tensor, as torch has them where image and queries are equally wide."""
    rows = [
        Row("logit_scale", "contrast.log_scale", SCALAR),
        *([Row("logit_bias", "contrast.logit_bias", SCALAR)] if logit_bias else []),
        Row("visual.proj", "contrast.image.weight", Transposed()),
        Row("text.text_projection", "contrast.text.weight", Transposed()),
        *_pool_rows("visual.attn_pool", "connector", fused),
        *linear("visual.ln_post", "connector.out_norm"),
        *_text_rows(),
        *_decoder_rows(decoder_layers),
    ]
    body = Subtree("visual.", VISUAL, but=("proj", r"attn_pool\..*", r"ln_post\..*"))
    return Table("coca", (body, *rows), ignored=(r".*attn_mask",))


def _pool_rows(theirs: str, ours: str, fused: bool) -> list[Row]:
    attention = mha_rows(f"{theirs}.attn", f"{ours}.attention")
    if not fused:
        parts = ("query", "key", "value")
        apart = [Row(f"{theirs}.attn.{part[0]}_proj_weight", f"{ours}.attention.{part}.weight") for part in parts]
        attention = apart + attention[1:]
    norms = [*linear(f"{theirs}.ln_q", f"{ours}.query_norm"), *linear(f"{theirs}.ln_k", f"{ours}.image_norm")]
    return [Row(f"{theirs}.query", f"{ours}.queries"), *attention, *norms]


def _text_rows() -> list[Row]:
    return [
        Row("text.cls_emb", "caption.class_token"),
        Row("text.token_embedding.weight", "caption.embedding.weight"),
        Row("text.positional_embedding", "caption.position"),
        *linear("text.ln_final", "caption.norm"),
        *block_rows("text.transformer.resblocks.{i}", "caption.text.blocks.{i}"),
    ]


def _decoder_rows(layers: int) -> list[Row]:
    """Ours has both kinds of blocks in one row: causal ones are even."""
    rows = [
        *linear("text_decoder.ln_final", "caption.decoder.norm"),
        Row("text_decoder.text_projection", "caption.head.weight", Transposed()),
    ]
    for i in range(layers):
        looks, ours = f"text_decoder.cross_attn.{i}", f"caption.decoder.blocks.{2 * i + 1}"
        rows += block_rows(f"text_decoder.resblocks.{i}", f"caption.decoder.blocks.{2 * i}")
        rows += mha_rows(f"{looks}.attn", f"{ours}.mixer.attention")
        rows += linear(f"{looks}.ln_1_kv", f"{ours}.mixer.image_norm")
        rows += block_rows(looks, ours)[len(mha_rows("", "")) :]
    return rows
