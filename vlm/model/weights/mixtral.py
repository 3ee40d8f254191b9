"""Mixtral's weights for our `Decoder`: expert by expert as published, or fused as in `transformers`' memory."""

from vlm.model.weights.llama import OURS, THEIRS, attention_rows, frame_rows, ignored_names
from vlm.model.weights.table import Experts, Row, Table


def mixtral_table(tied: bool = False) -> Table:
    """The published files' layout, which `save_pretrained` writes."""
    moe = f"{THEIRS}.block_sparse_moe"
    rows = (*attention_rows(), Row(f"{moe}.gate.weight", f"{OURS}.ffn.router.weight"), *frame_rows(tied))
    experts = (
        Experts((f"{moe}.experts.{{e}}.w1.weight", f"{moe}.experts.{{e}}.w3.weight"), f"{OURS}.ffn.gate_up"),
        Experts((f"{moe}.experts.{{e}}.w2.weight",), f"{OURS}.ffn.down"),
    )
    return Table("mixtral", (*rows, *experts), ignored_names(tied))


def mixtral_memory_table(tied: bool = False) -> Table:
    """The `state_dict` of transformers' module (version 5)."""
    rows = (
        *attention_rows(),
        Row(f"{THEIRS}.mlp.gate.weight", f"{OURS}.ffn.router.weight"),
        Row(f"{THEIRS}.mlp.experts.gate_up_proj", f"{OURS}.ffn.gate_up"),
        Row(f"{THEIRS}.mlp.experts.down_proj", f"{OURS}.ffn.down"),
        *frame_rows(tied),
    )
    return Table("mixtral in memory", rows, ignored_names(tied))
