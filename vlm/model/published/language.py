"""Published language models from the settings in their config.json."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from vlm.model.language import llama, opt
from vlm.model.published.part import Part, Settings
from vlm.model.published.t5 import T5, t5_part
from vlm.model.weights.llama import llama_table
from vlm.model.weights.opt import opt_table

# What transformers' config classes take where config.json says nothing (old files hold only what differs from these).
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
OPT = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "word_embed_proj_dim": None,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, Mapping[str, Any]] = {"llama": LLAMA, "opt": OPT, "t5": T5}


def language_part(values: Mapping[str, Any], where: str) -> Part:
    """The language model that a config.json (or its text_config) describes.

    ValueError: a family that is not known (the nearest is named), a setting that our parts do not have.
    """
    family = values.get("model_type")
    if family not in DEFAULTS:
        near = get_close_matches(str(family), DEFAULTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"{where}: model_type={family!r} is no language model known here ({', '.join(DEFAULTS)}){hint}"
        )
    settings = Settings(values, where, DEFAULTS[family])
    match family:
        case "llama":
            return _llama(settings)
        case "t5":
            return t5_part(settings)
        case _:
            return _opt(settings)


def _llama(s: Settings) -> Part:
    s.expect(hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), rope_scaling=(None,))
    tied = bool(s["tie_word_embeddings"])
    module = llama(
        s["vocab_size"],
        s["hidden_size"],
        s["num_hidden_layers"],
        s["num_attention_heads"],
        s["num_key_value_heads"],
        s["intermediate_size"],
        s["rope_theta"],
        s["rms_norm_eps"],
        tied,
        head_dim=s["head_dim"],
    )
    return Part(module, llama_table(tied))


def _opt(s: Settings) -> Part:
    s.expect(
        activation_function=("relu",),
        do_layer_norm_before=(True,),
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
