"""config.json of a language model from the sizes and switches of its modules: what `language_part` reads, the way back.

ValueError everywhere: something that no published family has, in words.
"""

from typing import Any

from torch import nn

from vlm.model.language import Decoder, Language, LearnedPositions
from vlm.model.seq2seq import EncoderDecoder
from vlm.nn.attention import Attention
from vlm.nn.block import Block, PostNorm
from vlm.nn.ffn import GatedMlp, Mlp, QuickGELU
from vlm.nn.moe import MixtureOfExperts
from vlm.nn.norm import RMSNorm
from vlm.nn.retention import Retention
from vlm.nn.rotary import LinearScaling, Llama3Scaling, Rotary
from vlm.nn.window import Window

EXPORTABLE = "attention with gated_mlp (Llama and its like), experts as Mixtral has them, OPT, T5"
LONGEST = 2048  # what Llama's config says where nobody knows; rotary positions have no end of their own
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "opt": "OPTForCausalLM",
    "t5": "T5ForConditionalGeneration",
}


def language_values(model: Language, where: str) -> dict[str, Any]:
    """Its config.json, without ids of control tokens. `where`: what messages call it, such as "language"."""
    match model:
        case EncoderDecoder():
            found = _t5(model, where)
        case Decoder() if isinstance(model.positions, LearnedPositions):
            found = _opt(model, model.positions, where)
        case Decoder():
            found = _llama(model, where)
        case _:
            raise ValueError(f"{where}: {type(model).__name__} is a model of transformers itself: take its own folder")
    return {"architectures": [ARCHITECTURES[found["model_type"]]], **found}


def activation_name(module: Any) -> str:
    """As a config.json calls it. `module`: of ours, torch's or open_clip's. ValueError: another one."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    names = {nn.ReLU: "relu", nn.SiLU: "silu", QuickGELU: "quick_gelu"}
    name = names.get(type(module), "quick_gelu" if type(module).__name__ == "QuickGELU" else None)
    if name is None:
        raise ValueError(f"an activation that no config.json has a name for: {type(module).__name__}")
    return name


def _blocks(model: Decoder, where: str) -> list[tuple[Block, Attention]]:
    found = []
    for i, block in enumerate(model.stack.blocks):
        assert isinstance(block, Block)
        if isinstance(block.mixer, Retention):
            raise _refused(where, f"block {i} has retention (RetNet), for which transformers has no class")
        if not isinstance(block.mixer, Attention):
            raise _refused(where, f"block {i} mixes tokens by {type(block.mixer).__name__}")
        if isinstance(block.mixer_residual, PostNorm):
            raise _refused(where, f"block {i} has its norms after the branches (model.language.placement=post)")
        found.append((block, block.mixer))
    return found


def _llama(model: Decoder, where: str) -> dict[str, Any]:
    blocks = _blocks(model, where)
    rotary, norm, first = model.stack.rotary, model.stack.norm, blocks[0][1]
    if not isinstance(rotary, Rotary) or not isinstance(norm, RMSNorm):
        raise _refused(where, "a decoder with rotary positions has RMSNorm in every published family")
    if isinstance(first.query_norm, RMSNorm) and first.query_norm.eps != norm.eps:
        raise _refused(where, f"norms of heads with eps={first.query_norm.eps} beside others with eps={norm.eps}")
    biased, windows = first.query.bias is not None, [_window(mixer) for _, mixer in blocks]
    unrotated = [i for i, (_, mixer) in enumerate(blocks) if not mixer.rotated]
    special = {
        "biases of query, key and value": biased,
        "norms of query and key heads": first.query_norm is not None,
        "blocks without positions": bool(unrotated),
        "experts": any(isinstance(block.ffn, MixtureOfExperts) for block, _ in blocks),
        "windows": any(window is not None for window in windows),
    }
    own = [name for name, there in special.items() if there]
    family = _FAMILIES.get(tuple(own))
    if family is None:
        raise _refused(where, f"no published family has {' and '.join(own)} together")
    return {
        "model_type": family,
        "vocab_size": model.vocabulary,
        "hidden_size": model.dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": LONGEST,
        "rms_norm_eps": norm.eps,
        "tie_word_embeddings": model.head is None,
        **_rope(rotary),
        **_windows(family, windows, where),
        **({"no_rope_layers": [int(i not in unrotated) for i in range(len(blocks))]} if unrotated else {}),
        **(_experts if family == "mixtral" else _dense)([block for block, _ in blocks], where),
    }


_FAMILIES = {
    (): "llama",
    ("windows",): "mistral",
    ("biases of query, key and value",): "qwen2",
    ("biases of query, key and value", "windows"): "qwen2",
    ("norms of query and key heads",): "qwen3",
    ("norms of query and key heads", "windows"): "qwen3",
    ("blocks without positions",): "smollm3",
    ("experts",): "mixtral",
    ("experts", "windows"): "mixtral",
}


def _window(mixer: Attention) -> int | None:
    return mixer.memory.size if isinstance(mixer.memory, Window) else None


def _windows(family: str, windows: list[int | None], where: str) -> dict[str, Any]:
    sizes = {size for size in windows if size is not None}
    if len(sizes) > 1:
        raise _refused(where, f"windows of different sizes ({', '.join(map(str, sorted(sizes)))})")
    size = next(iter(sizes), None)
    if family in ("qwen2", "qwen3"):
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        return {"use_sliding_window": size is not None, "sliding_window": size, "layer_types": kinds}
    if size is not None and None in windows:
        raise _refused(where, f"windows in some blocks alone, which {family} does not have")
    return {"sliding_window": size} if family in ("mistral", "mixtral") else {}


def _rope(rotary: Rotary) -> dict[str, Any]:
    """In the older spelling, which every version of transformers reads."""
    match rotary.scaling:
        case None:
            scaling = None
        case LinearScaling(factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, longest):
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            scaling["original_max_position_embeddings"] = longest
        case other:
            raise ValueError(f"a stretch of rotary positions that no config.json has a name for: {other}")
    return {"rope_theta": rotary.theta, "rope_scaling": scaling}


def _dense(blocks: list[Block], where: str) -> dict[str, Any]:
    for i, block in enumerate(blocks):
        if not isinstance(block.ffn, GatedMlp):
            raise _refused(where, f"block {i} has {type(block.ffn).__name__} in place of gated_mlp")
    ffn = blocks[0].ffn
    assert isinstance(ffn, GatedMlp)
    return {"intermediate_size": ffn.gate.out_features}


def _experts(blocks: list[Block], where: str) -> dict[str, Any]:
    """Mixtral's: in every block, none shared, the chosen weights summing to one."""
    for i, block in enumerate(blocks):
        ffn = block.ffn
        if not isinstance(ffn, MixtureOfExperts):
            raise _refused(where, f"block {i} is dense beside blocks with experts, which Mixtral does not have")
        router = ffn.router
        plain = isinstance(router.score, nn.Softmax) and router.renormalize and router.scale == 1.0
        if ffn.shared is not None or not plain or router.bias is not None or router.top_groups != router.groups:
            raise _refused(where, f"block {i} has shared experts or another router than Mixtral's softmax")
    first = blocks[0].ffn
    assert isinstance(first, MixtureOfExperts)
    return {
        "intermediate_size": first.down.shape[2],
        "num_local_experts": first.router.experts,
        "num_experts_per_tok": first.router.top_k,
    }


def _opt(model: Decoder, positions: LearnedPositions, where: str) -> dict[str, Any]:
    blocks = _blocks(model, where)
    first, ffn = blocks[0][1], blocks[0][0].ffn
    shaped = isinstance(ffn, Mlp) and isinstance(ffn.activation, nn.ReLU) and isinstance(model.stack.norm, nn.LayerNorm)
    if not shaped or positions.offset != 2 or first.out.bias is None:
        raise _refused(where, "learned positions, but not as OPT has them (LayerNorm, ReLU, biases, two rows before)")
    assert isinstance(ffn, Mlp)
    return {
        "model_type": "opt",
        "vocab_size": model.vocabulary,
        "hidden_size": model.dim,
        "word_embed_proj_dim": model.dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.heads,
        "ffn_dim": ffn.up.out_features,
        "max_position_embeddings": positions.max_positions,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "tie_word_embeddings": model.head is None,
    }


def _t5(model: EncoderDecoder, where: str) -> dict[str, Any]:
    block = model.encoder.blocks[0]
    assert isinstance(block, Block)
    ffn, mixer, relative, norm = block.ffn, block.mixer, model.encoder.relative, model.encoder.norm
    if not isinstance(mixer, Attention) or relative is None or not isinstance(norm, RMSNorm):
        raise _refused(where, "an encoder-decoder of another kind than T5")
    assert isinstance(ffn, Mlp | GatedMlp)
    gated, activation = isinstance(ffn, GatedMlp), activation_name(ffn.activation).replace("pytorch_tanh", "new")
    plain = "gelu" if activation == "gelu_new" else activation
    return {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": model.vocabulary,
        "d_model": model.dim,
        "d_kv": mixer.head_dim,
        "d_ff": ffn.up.out_features,
        "num_layers": len(model.encoder.blocks),
        "num_decoder_layers": len(model.decoder.blocks),
        "num_heads": mixer.heads,
        "relative_attention_num_buckets": relative.buckets,
        "relative_attention_max_distance": relative.longest,
        "layer_norm_epsilon": norm.eps,
        "feed_forward_proj": f"gated-{plain}" if gated else plain,
        "dense_act_fn": activation,
        "tie_word_embeddings": model.head is None,
        "decoder_start_token_id": model.start,
    }


def _refused(where: str, what: str) -> ValueError:
    return ValueError(f"{where}: cannot be exported: {what}; there is a published layout for {EXPORTABLE}")
