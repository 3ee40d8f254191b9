"""Published language models from the settings in their config.json."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from vlm.model.published import decoders, mixtures
from vlm.model.published.part import Part, Settings
from vlm.model.published.retnet import RETNET, retnet_part
from vlm.model.published.t5 import T5, t5_part


class Family(NamedTuple):
    """What transformers' config class takes where config.json says nothing, and how the rest becomes a model."""

    defaults: Mapping[str, Any]
    build: Callable[[Settings], Part]


FAMILIES = {
    "llama": Family(decoders.LLAMA, decoders.llama_part),
    "mistral": Family(decoders.MISTRAL, decoders.mistral_part),
    "qwen2": Family(decoders.QWEN2, decoders.qwen2_part),
    "qwen3": Family(decoders.QWEN3, decoders.qwen3_part),
    "smollm3": Family(decoders.SMOLLM3, decoders.smollm3_part),
    "opt": Family(decoders.OPT, decoders.opt_part),
    "mixtral": Family(mixtures.MIXTRAL, mixtures.mixtral_part),
    "qwen2_moe": Family(mixtures.QWEN2_MOE, mixtures.qwen2_moe_part),
    "deepseek": Family(mixtures.DEEPSEEK, mixtures.deepseek_part),
    "t5": Family(T5, t5_part),
}
_LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2")


def language_part(values: Mapping[str, Any], where: str) -> Part:
    """The language model that a config.json (or its text_config) describes; torchscale's arguments mean its RetNet.

    ValueError: a family that is not known (the nearest is named), a setting that our parts do not have, weights that
    are quantised.
    """
    family = values.get("model_type")
    refuse_quantised(values, where)
    if family in _LATENT:
        raise ValueError(
            f"{where}: model_type={family!r}: its attention is multi-head latent attention (MLA), which vlm does not "
            "have; its mixtures of experts alone are read by vlm.model.weights.moe.deepseek_block_table"
        )
    if "decoder_retention_heads" in values:
        return retnet_part(Settings(values, where, RETNET))
    if family not in FAMILIES:
        near = get_close_matches(str(family), FAMILIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"{where}: model_type={family!r} is no language model known here ({', '.join(FAMILIES)}){hint}"
        )
    known = FAMILIES[family]
    return known.build(Settings(values, where, known.defaults))


def known_language(values: Mapping[str, Any]) -> bool:
    """Whether these are the settings of a language model, be it one that is refused by its name."""
    return values.get("model_type") in (*FAMILIES, *_LATENT) or "decoder_retention_heads" in values


def refuse_quantised(values: Mapping[str, Any], where: str) -> None:
    """ValueError: settings of weights that were quantised."""
    if (packed := values.get("quantization_config")) is not None:
        method = packed.get("quant_method", "unknown") if isinstance(packed, Mapping) else packed
        raise ValueError(f"{where}: its weights are quantised ({method}); give the checkpoint they were made from")
