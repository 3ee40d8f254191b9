"""Mixtures of experts of DeepSeekMoE, DeepSeek-V2, -V3 and Qwen2-MoE, for our `MixtureOfExperts` and `Decoder`."""

from vlm.model.weights.llama import OURS, THEIRS, attention_rows, frame_rows, gated_rows, ignored_names
from vlm.model.weights.rows import Experts, Row
from vlm.model.weights.table import Table


def deepseek_block_table() -> Table:
    """One mixture of DeepSeekMoE, -V2 or -V3 (what stands under "mlp." of a layer), expert by expert as published.

    With `under`, also that of one layer of a whole file: `deepseek_block_table().under("model.layers.3.mlp.", "")`.
    """
    rows = (
        *_routed_rows(),
        Row("gate.e_score_correction_bias", "router.bias"),
        *(Row(f"shared_experts.{part}_proj.weight", f"shared.{part}.weight") for part in ("gate", "up", "down")),
    )
    return Table("deepseek mixture", rows, also=fused_rows())


def qwen2_moe_block_table() -> Table:
    """One mixture of Qwen2-MoE; as `deepseek_block_table`."""
    shared = [(f"shared_expert.{part}_proj", f"shared.network.{part}") for part in ("gate", "up", "down")]
    pairs = [*shared, ("shared_expert_gate", "shared.gate")]
    rows = (*_routed_rows(), *(Row(f"{a}.weight", f"{b}.weight") for a, b in pairs))
    return Table("qwen2 mixture", rows, also=fused_rows())


def deepseek_table(tied: bool = False) -> Table:
    """DeepSeekMoE (its first version, whose attention is Llama's), some blocks dense."""
    return _decoder("deepseek", deepseek_block_table(), tied, bias=False)


def qwen2_moe_table(tied: bool = False, bias: bool = True) -> Table:
    """Qwen2-MoE, some blocks perhaps dense; `bias`: of query, key and value."""
    return _decoder("qwen2_moe", qwen2_moe_block_table(), tied, bias)


def fused_rows() -> tuple[Row, ...]:
    """Routed experts as transformers 5 holds them in memory: ours exactly."""
    return Row("experts.gate_up_proj", "gate_up"), Row("experts.down_proj", "down")


def _routed_rows() -> tuple[Row | Experts, ...]:
    return (
        Row("gate.weight", "router.weight"),
        Experts(("experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight"), "gate_up"),
        Experts(("experts.{e}.down_proj.weight",), "down"),
    )


def _decoder(family: str, block: Table, tied: bool, bias: bool) -> Table:
    mixture = block.under(f"{THEIRS}.mlp.", f"{OURS}.ffn.")
    rows = (*attention_rows(bias), *gated_rows(), *mixture.rows, *frame_rows(tied))
    return Table(family, rows, ignored_names(tied), also=mixture.also)
