"""Dense decoders as published: Llama and those that differ from it in a few settings, and OPT."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from vlm.model.language import Decoder, llama, opt
from vlm.model.published.part import Part, Settings
from vlm.model.weights.llama import llama_table, qwen2_table, qwen3_table
from vlm.model.weights.opt import opt_table
from vlm.nn.rotary import LinearScaling, Llama3Scaling, Scaling

# What transformers' config classes take where config.json says nothing (old files hold only what differs from these).
ROTARY = {"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": None}
LLAMA = {
    **ROTARY,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
MISTRAL = {
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
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
QWEN2 = {
    **ROTARY,
    **WINDOWS,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN3 = {**QWEN2, "head_dim": 128, "attention_bias": False}
SMOLLM3 = {
    **ROTARY,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2_000_000.0,
    "use_sliding_window": False,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}
OPT = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}


def llama_part(s: Settings) -> Part:
    """Llama 1 to 3.2, Vicuna, SmolLM and all others that are published as Llama."""
    s.expect(hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,))
    tied = bool(s["tie_word_embeddings"])
    return Part(llama_like(s), llama_table(tied))


def mistral_part(s: Settings) -> Part:
    """Mistral: Llama with a window, in some versions."""
    s.expect(hidden_act=("silu",))
    return Part(llama_like(s, window=s["sliding_window"]), llama_table(bool(s["tie_word_embeddings"])))


def qwen2_part(s: Settings) -> Part:
    """Qwen1.5, Qwen2 and Qwen2.5."""
    s.expect(hidden_act=("silu",))
    return Part(llama_like(s, bias=True, window=windows(s)), qwen2_table(bool(s["tie_word_embeddings"])))


def qwen3_part(s: Settings) -> Part:
    """Qwen3, dense."""
    s.expect(hidden_act=("silu",), attention_bias=(False,))
    return Part(llama_like(s, head_norm=True, window=windows(s)), qwen3_table(bool(s["tie_word_embeddings"])))


def smollm3_part(s: Settings) -> Part:
    """SmolLM3: some blocks know no positions."""
    s.expect(hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), use_sliding_window=(False,))
    blocks, given = range(s["num_hidden_layers"]), s["no_rope_layers"]
    interval = s["no_rope_layer_interval"]
    unrotated = [i for i in blocks if (not given[i] if given is not None else (i + 1) % interval == 0)]
    return Part(llama_like(s, unrotated=unrotated), llama_table(bool(s["tie_word_embeddings"])))


def opt_part(s: Settings) -> Part:
    """OPT of all sizes but 350M, whose norms stand after the branches and whose embeddings are narrower."""
    s.expect(
        activation_function=("relu",),
        do_layer_norm_before=(True,),
        _remove_final_layer_norm=(False,),
        enable_bias=(True,),
        layer_norm_elementwise_affine=(True,),
        word_embed_proj_dim=(None, s["hidden_size"]),
    )
    tied = bool(s["tie_word_embeddings"])
    module = opt(
        s["vocab_size"],
        s["hidden_size"],
        s["num_hidden_layers"],
        s["num_attention_heads"],
        s["ffn_dim"],
        s["max_position_embeddings"],
        tied=tied,
    )
    return Part(module, opt_table(tied))


def llama_like(
    s: Settings,
    *,
    bias: bool = False,
    head_norm: bool = False,
    window: int | Sequence[int | None] | None = None,
    unrotated: Collection[int] = (),
    ffn: Callable[[int], nn.Module] | None = None,
) -> Decoder:
    """A decoder whose settings are named as Llama's; arguments as of `language.llama`."""
    theta, scaling = rotary(s)
    return llama(
        s["vocab_size"],
        s["hidden_size"],
        s["num_hidden_layers"],
        s["num_attention_heads"],
        s["num_key_value_heads"],
        s["intermediate_size"],
        theta,
        s["rms_norm_eps"],
        bool(s["tie_word_embeddings"]),
        scaling=scaling,
        bias=bias,
        head_dim=s["head_dim"],
        head_norm=head_norm,
        window=window,
        unrotated=unrotated,
        ffn=ffn,
    )


def rotary(s: Settings) -> tuple[float, Scaling | None]:
    """Theta and the stretch to longer texts, from `rope_parameters`, or `rope_theta` and `rope_scaling` as before."""
    # transformers 5 fills both in, and the newer one says it all.
    given: dict[str, Any] = s["rope_parameters"] or s["rope_scaling"] or {}
    theta = float(given.get("rope_theta", s["rope_theta"]))
    kind = given.get("rope_type", given.get("type", "default"))
    share = given.get("partial_rotary_factor", s["partial_rotary_factor"])
    if share not in (None, 1.0):
        raise ValueError(f"{s.where}: partial_rotary_factor={share}: vlm rotates whole heads")
    try:
        match kind:
            case "default":
                return theta, None
            case "linear":
                return theta, LinearScaling(float(given["factor"]))
            case "llama3":
                low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
                longest = given.get("original_max_position_embeddings") or s["max_position_embeddings"]
                return theta, Llama3Scaling(float(given["factor"]), low, high, int(longest))
    except KeyError as missing:
        raise ValueError(f"{s.where}: rotary scaling {kind!r} without {missing}: {given}") from None
    raise ValueError(f"{s.where}: rotary scaling {kind!r} is not known here (default, linear, llama3)")


def windows(s: Settings) -> list[int | None]:
    """The window of each block, None for everything: from `layer_types`, or by where the windows begin as before."""
    blocks, kinds = s["num_hidden_layers"], s["layer_types"]
    size = s["sliding_window"] if s["use_sliding_window"] else None
    if kinds is None:
        return [size if i >= s["max_window_layers"] else None for i in range(blocks)]
    if len(kinds) != blocks or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{s.where}: layer_types={kinds}: one of full_attention and sliding_attention for each of {blocks} blocks"
        )
    return [size if kind == "sliding_attention" else None for kind in kinds]
