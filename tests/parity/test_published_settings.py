"""What a config.json leaves out, how large the released models are, and which settings are refused."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from vlm.model.published.language import FAMILIES, language_part


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"deepseek", "t5"}))
def test_defaults_are_those_of_transformers(family: str) -> None:
    config = AutoConfig.for_model(family)
    for name, value in FAMILIES[family].defaults.items():
        match name:
            case "rope_theta":
                assert config.rope_parameters == {"rope_theta": value, "rope_type": "default"}
            case "rope_parameters" | "rope_scaling" | "partial_rotary_factor":
                assert value is None
            case _:
                assert value == getattr(type(config), name, None), name


# Their defaults are the sizes of released models.
DENSE = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "opt"]
RELEASED = {"llama": 6_738_415_616, "mistral": 7_241_732_096, "opt": 125_239_296, "mixtral": 46_702_792_704}
DEEPSEEK_16B = {
    "model_type": "deepseek",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"deepseek", "t5"}))
def test_full_sizes_are_those_of_transformers(family: str) -> None:
    with torch.device("meta"):
        part = language_part({"model_type": family}, "config.json")
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family))
    count = sum(parameter.numel() for parameter in part.module.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) == RELEASED.get(family, count)
    if family in DENSE:
        shapes = {name: value.shape for name, value in part.table.to_theirs(part.module.state_dict()).items()}
        held = {name: value.shape for name, value in theirs.state_dict().items()}
        assert shapes == {name: held[name] for name in shapes} and not set(held) - set(shapes) - {"lm_head.weight"}


def test_the_full_size_of_deepseek_is_the_released_one() -> None:
    with torch.device("meta"):
        part = language_part(DEEPSEEK_16B, "config.json")
    assert sum(parameter.numel() for parameter in part.module.parameters()) == 16_375_728_128
    names = part.table.to_theirs(part.module.state_dict())
    assert names["model.layers.27.mlp.experts.63.down_proj.weight"].shape == (2048, 1408)
    assert names["model.layers.27.mlp.shared_experts.gate_proj.weight"].shape == (2 * 1408, 2048)
    assert names["model.layers.0.mlp.down_proj.weight"].shape == (2048, 10944)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "lama"}, r"model_type='lama' is no language model known here \(llama, .*did you mean llama\?"),
        ({"model_type": "deepseek_v3"}, r"multi-head latent attention \(MLA\), which vlm does not have"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, r"weights are quantised \(gptq\)"),
        ({"model_type": "llama", "attention_bias": True}, r"attention_bias=True \(known: False\)"),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn' is not"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "rotary scaling 'linear' without 'factor'"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"model_type": "opt", "do_layer_norm_before": False}, r"do_layer_norm_before=False \(known: True\)"),
        ({"model_type": "opt", "word_embed_proj_dim": 512}, r"word_embed_proj_dim=512 \(known: None, 768\)"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 32}, "layer_types=.*for each of 32 blocks"),
        ({"model_type": "qwen2_moe", "use_sliding_window": True}, "use_sliding_window without layer_types"),
        ({"decoder_retention_heads": 4, "vocab_size": 9, "deepnorm": True}, r"deepnorm=True \(known: False\)"),
        ({"decoder_retention_heads": 4}, r"vocab_size=-1"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^folder/config\.json: .*" + message):
        language_part(values, "folder/config.json")
