"""RetNet's weights as torchscale names them (its GLU decoder of October 2023 and later) for our `Decoder`."""

from vlm.model.weights.rows import Row, linear
from vlm.model.weights.table import Table


def retnet_table(tied: bool = False) -> Table:
    """`tied`: the head is the embedding, of which torchscale publishes a copy; apart unless it is told otherwise."""
    theirs, ours = "layers.{i}", "stack.blocks.{i}"
    pairs = [
        ("retention.q_proj", "mixer.query"),
        ("retention.k_proj", "mixer.key"),
        ("retention.v_proj", "mixer.value"),
        ("retention.g_proj", "mixer.gate"),
        ("retention.out_proj", "mixer.out"),
        ("ffn.fc1", "ffn.gate"),  # what the activation acts on; their "gate" is the plain factor
        ("ffn.gate", "ffn.up"),
        ("ffn.fc2", "ffn.down"),
        ("retention_layer_norm", "mixer_residual.norm"),
        ("final_layer_norm", "ffn_residual.norm"),
    ]
    rows = [row for a, b in pairs for row in linear(f"{theirs}.{a}", f"{ours}.{b}", bias=False)]
    rows += [
        Row("embed_tokens.weight", "embedding.weight"),
        Row("layer_norm.weight", "stack.norm.weight"),
    ]
    if not tied:
        rows.append(Row("output_projection.weight", "head.weight"))
    copies = (r"output_projection\.weight",) if tied else ()
    return Table("torchscale RetNet", tuple(rows), (r"retnet_rel_pos\.(angle|decay)", *copies))
