"""Mixtral's weights for our `Decoder`: expert by expert as published, or fused as in `transformers`' memory."""

from vlm.model.weights.llama import OURS, THEIRS, attention_rows, frame_rows, ignored_names
from vlm.model.weights.moe import fused_rows
from vlm.model.weights.rows import Experts, Row
from vlm.model.weights.table import Table


def mixtral_table(tied: bool = False) -> Table:
    """The published files' layout, which `save_pretrained` writes; the `state_dict` of transformers 5 is read too."""
    moe, ours = f"{THEIRS}.block_sparse_moe", f"{OURS}.ffn"
    rows = (*attention_rows(), Row(f"{moe}.gate.weight", f"{ours}.router.weight"), *frame_rows(tied))
    experts = (
        Experts((f"{moe}.experts.{{e}}.w1.weight", f"{moe}.experts.{{e}}.w3.weight"), f"{ours}.gate_up"),
        Experts((f"{moe}.experts.{{e}}.w2.weight",), f"{ours}.down"),
    )
    memory = (
        Row(f"{THEIRS}.mlp.gate.weight", f"{ours}.router.weight"),
        *(row.under(f"{THEIRS}.mlp.", f"{ours}.") for row in fused_rows()),
    )
    return Table("mixtral", (*rows, *experts), ignored_names(tied), also=memory)
