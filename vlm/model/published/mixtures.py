"""Decoders with mixtures of experts as published: Mixtral, Qwen2-MoE, DeepSeekMoE."""

from collections.abc import Callable

from torch import nn

from vlm.model.published.decoders import QWEN2, ROTARY, llama_like, windows
from vlm.model.published.part import Part, Settings
from vlm.model.weights.mixtral import mixtral_table
from vlm.model.weights.moe import deepseek_table, qwen2_moe_table
from vlm.nn.ffn import GatedMlp
from vlm.nn.moe import GatedShared, MixtureOfExperts, softmax_router

MIXTRAL = {
    **ROTARY,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
}
QWEN2_MOE = {
    **QWEN2,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
    "qkv_bias": True,
}
# Of the configuration that is published with the model: transformers has no such class.
DEEPSEEK = {
    **ROTARY,
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def mixtral_part(s: Settings) -> Part:
    """Mixtral: a mixture in every block."""
    s.expect(hidden_act=("silu",))

    def mixture() -> MixtureOfExperts:
        router = softmax_router(s["hidden_size"], s["num_local_experts"], s["num_experts_per_tok"])
        return MixtureOfExperts(s["hidden_size"], s["intermediate_size"], router)

    module = llama_like(s, window=s["sliding_window"], ffn=lambda _: mixture())
    return Part(module, mixtral_table(bool(s["tie_word_embeddings"])))


def qwen2_moe_part(s: Settings) -> Part:
    """Qwen1.5-MoE and Qwen2-MoE: a shared expert behind a gate, some blocks perhaps dense."""
    s.expect(hidden_act=("silu",))
    if s["use_sliding_window"] and s["layer_types"] is None:
        raise ValueError(f"{s.where}: use_sliding_window without layer_types: versions disagree on which blocks it is")
    dim, dense, every = s["hidden_size"], s["mlp_only_layers"] or (), s["decoder_sparse_step"]

    def mixture() -> MixtureOfExperts:
        router = softmax_router(dim, s["num_experts"], s["num_experts_per_tok"], renormalize=bool(s["norm_topk_prob"]))
        shared = GatedShared(dim, GatedMlp(dim, s["shared_expert_intermediate_size"]))
        return MixtureOfExperts(dim, s["moe_intermediate_size"], router, shared)

    sparse = [i not in dense and s["num_experts"] > 0 and (i + 1) % every == 0 for i in range(s["num_hidden_layers"])]
    bias = bool(s["qkv_bias"])
    module = llama_like(s, bias=bias, window=windows(s), ffn=_some(sparse, mixture, s))
    return Part(module, qwen2_moe_table(bool(s["tie_word_embeddings"]), bias))


def deepseek_part(s: Settings) -> Part:
    """DeepSeekMoE 16B and its like: the first version, with Llama's attention."""
    s.expect(hidden_act=("silu",), attention_bias=(False,), scoring_func=("softmax",))
    dim, routed, width = s["hidden_size"], s["n_routed_experts"], s["moe_intermediate_size"]
    first, every = s["first_k_dense_replace"], s["moe_layer_freq"]

    def mixture() -> MixtureOfExperts:
        router = softmax_router(dim, routed, s["num_experts_per_tok"], renormalize=bool(s["norm_topk_prob"]))
        shared = s["n_shared_experts"]
        return MixtureOfExperts(dim, width, router, GatedMlp(dim, shared * width) if shared else None)

    sparse = [routed is not None and i >= first and i % every == 0 for i in range(s["num_hidden_layers"])]
    module = llama_like(s, ffn=_some(sparse, mixture, s))
    return Part(module, deepseek_table(bool(s["tie_word_embeddings"])))


def _some(sparse: list[bool], mixture: Callable[[], nn.Module], s: Settings) -> Callable[[int], nn.Module]:
    """A mixture in the blocks that are `sparse`, a dense network in the others."""
    return lambda block: mixture() if sparse[block] else GatedMlp(s["hidden_size"], s["intermediate_size"])
