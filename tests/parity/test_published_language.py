"""Published language models from disk are transformers': logits, loss, gradients, texts, and the way back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from tests.parity.decoder_folders import (
    changed,
    fused_experts_apart,
    loaded_from,
    padding_gap,
    part_of,
    same_state,
    same_texts,
    tensors,
    written_back,
)
from tests.parity.decoders import filled, ids, logit_gap, logits, loss_and_gradient_gap, worst_gap
from tests.parity.noise import gap

PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
# Wavelengths 6, 53, 444 and 3737 against 32 and 128: one fast, one between, two slow.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rope_parameters": PLAIN,
}
OPT = {
    "vocab_size": 99,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "ffn_dim": 80,
    "max_position_embeddings": 20,
    "num_attention_heads": 6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"moe_intermediate_size": 40, "num_experts_per_tok": 2, "norm_topk_prob": False}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]


class Case(NamedTuple):
    """A published model, the parameters whose gradients are compared (ours: theirs), and settings that matter."""

    make: Callable[..., PretrainedConfig]
    settings: dict[str, Any]
    gradient: dict[str, str]
    facts: list[dict[str, Any]]


def block(ours: str, theirs: str) -> dict[str, str]:
    return {f"stack.blocks.1.{ours}": f"model.layers.1.{theirs}"}


KEY = block("mixer.key.weight", "self_attn.k_proj.weight")
VALUE = block("mixer.value.bias", "self_attn.v_proj.bias")
HEAD_NORM = block("mixer.key_norm.weight", "self_attn.k_norm.weight")
EXPERT = block("ffn.gate_up", "mlp.experts.gate_up_proj")
CASES = {
    "llama": Case(
        LlamaConfig,
        {**SIZES, "rms_norm_eps": 1e-5},
        KEY | {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"},
        [{"rope_parameters": {**PLAIN, "rope_theta": 1e4}}, {"rms_norm_eps": 1e-1}],
    ),
    "llama, tied, wide heads": Case(
        LlamaConfig, {**SIZES, "tie_word_embeddings": True, "head_dim": 10}, KEY, [{"rope_parameters": LINEAR}]
    ),
    "llama 3.1": Case(
        LlamaConfig,
        {**SIZES, "rope_parameters": LLAMA3},
        KEY,
        [{"rope_parameters": {**LLAMA3, name: value}} for name, value in (("factor", 7.0), ("low_freq_factor", 2.0))]
        + [{"rope_parameters": PLAIN}, {"rope_parameters": {**LLAMA3, "high_freq_factor": 5.0}}],
    ),
    "llama, linear": Case(LlamaConfig, {**SIZES, "rope_parameters": LINEAR}, KEY, [{"rope_parameters": PLAIN}]),
    "mistral": Case(
        MistralConfig, {**SIZES, "sliding_window": 5}, KEY, [{"sliding_window": size} for size in (4, 6, None)]
    ),
    "mistral without a window": Case(MistralConfig, {**SIZES, "sliding_window": None}, KEY, [{"sliding_window": 5}]),
    "qwen2": Case(
        Qwen2Config, {**SIZES, "tie_word_embeddings": True}, VALUE, [{"rope_parameters": {**PLAIN, "rope_theta": 1e4}}]
    ),
    "qwen2 with windows": Case(
        Qwen2Config,
        {**SIZES, **SLIDING, "max_window_layers": 1},
        VALUE,
        [{"sliding_window": 4}, {"layer_types": MIXED[::-1]}, {"use_sliding_window": False}],
    ),
    "qwen3": Case(
        Qwen3Config,
        {**SIZES, **SLIDING, "max_window_layers": 2, "head_dim": 10},
        HEAD_NORM,
        [{"rms_norm_eps": 1e-1}, {"layer_types": MIXED}],
    ),
    "smollm3": Case(
        SmolLM3Config,
        {**SIZES, "tie_word_embeddings": True, "no_rope_layer_interval": 2},
        KEY,
        [{"no_rope_layers": [0, 1, 1]}, {"no_rope_layers": None, "no_rope_layer_interval": 3}],
    ),
    "opt": Case(
        OPTConfig,
        OPT,
        {
            "stack.blocks.1.mixer.query.bias": "model.decoder.layers.1.self_attn.q_proj.bias",
            "positions.embedding.weight": "model.decoder.embed_positions.weight",
        },
        [],
    ),
    "opt, not tied": Case(OPTConfig, {**OPT, "tie_word_embeddings": False}, {"head.weight": "lm_head.weight"}, []),
    "mixtral": Case(
        MixtralConfig,
        {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5, "rms_norm_eps": 1e-5},
        EXPERT | block("ffn.router.weight", "mlp.gate.weight"),
        [{"num_experts_per_tok": 1}, {"rms_norm_eps": 1e-1}, {"sliding_window": None}],
    ),
    "qwen2_moe": Case(
        Qwen2MoeConfig,
        {
            **SIZES,
            **MOE,
            **SLIDING,
            "num_experts": 5,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [0],
            "layer_types": MIXED,
        },
        EXPERT | VALUE | block("ffn.shared.gate.weight", "mlp.shared_expert_gate.weight"),
        [{"num_experts_per_tok": 1}, {"norm_topk_prob": True}, {"sliding_window": 4}],
    ),
    "qwen2_moe, every second block": Case(
        Qwen2MoeConfig,
        {
            **SIZES,
            **MOE,
            "num_experts": 5,
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
        },
        EXPERT,
        [{"norm_topk_prob": False}],
    ),
}


def published(name: str) -> PreTrainedModel:
    case = CASES[name]
    return filled(AutoModelForCausalLM.from_config(case.make(**case.settings), attn_implementation="eager"))


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name: str, tmp_path: Path) -> None:
    theirs = published(name)
    theirs.save_pretrained(tmp_path)
    ours = loaded_from(tmp_path)
    assert worst_gap(ours, theirs) < 1e-4
    assert loss_and_gradient_gap(ours, theirs, CASES[name].gradient) < 1e-4
    assert padding_gap(ours) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_texts(name: str, tmp_path: Path) -> None:
    theirs = published(name)
    theirs.save_pretrained(tmp_path)
    assert same_texts(loaded_from(tmp_path), theirs)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_by_files_in_parts(name: str, tmp_path: Path) -> None:
    theirs = published(name)
    theirs.save_pretrained(tmp_path / "given", max_shard_size="40KB")
    assert len(list((tmp_path / "given").glob("*.safetensors"))) > 1
    ours = loaded_from(tmp_path / "given")
    again = opened(written_back(ours, tmp_path / "given", tmp_path / "back"))
    assert same_state(theirs, again)
    assert logit_gap(ours, again) < 1e-4


@pytest.mark.parametrize(("name", "fact"), [(name, fact) for name, case in CASES.items() for fact in case.facts])
def test_a_changed_setting_is_noticed(name: str, fact: dict[str, Any], tmp_path: Path) -> None:
    theirs = published(name)
    theirs.save_pretrained(tmp_path)
    assert logit_gap(loaded_from(changed(tmp_path, **fact)), theirs) > 1e-3


def test_another_offset_of_opt_is_noticed(tmp_path: Path) -> None:
    theirs = published("opt")
    theirs.save_pretrained(tmp_path)
    ours = loaded_from(tmp_path)
    ours.positions.offset = 1  # type: ignore[union-attr]
    assert logit_gap(ours, theirs) > 1e-3


def test_an_expert_changed_on_the_way_back_is_noticed(tmp_path: Path) -> None:
    theirs = published("mixtral")
    theirs.save_pretrained(tmp_path / "given")
    ours = loaded_from(tmp_path / "given")
    back = written_back(ours, tmp_path / "given", tmp_path / "back")
    weights = tensors(back)
    weights["model.layers.0.block_sparse_moe.experts.2.w3.weight"] *= 1.5
    save_file(weights, back / "model.safetensors", {"format": "pt"})
    assert logit_gap(ours, opened(back)) > 1e-3


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_that_are_fused_as_in_memory_are_read_too(name: str, tmp_path: Path) -> None:
    theirs = published(name)
    theirs.save_pretrained(tmp_path)
    table, ours = part_of(tmp_path).table, loaded_from(tmp_path).state_dict()
    found = table.to_ours(theirs.state_dict())
    assert any("gate_up_proj" in key for key in theirs.state_dict())
    assert set(found) == set(ours) and all(torch.equal(value, ours[key]) for key, value in found.items())


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    theirs = published("mixtral")
    theirs.save_pretrained(tmp_path)
    weights = tensors(tmp_path)
    del weights["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    with pytest.raises(ValueError, match=r"missing beside others: .*\.experts\.3\.w3\.weight$"):
        part_of(tmp_path).table.to_ours(weights)


def test_biases_of_qwen2_are_noticed(tmp_path: Path) -> None:
    theirs = published("qwen2")
    theirs.save_pretrained(tmp_path)
    ours = loaded_from(tmp_path)
    torch.nn.init.zeros_(ours.get_parameter("stack.blocks.1.mixer.value.bias"))
    assert logit_gap(ours, theirs) > 1e-3
    with pytest.raises(ValueError, match=r"llama: published tensors .*: model\.layers\.0\.self_attn\.k_proj\.bias"):
        loaded_from(changed(tmp_path, model_type="llama"))


@pytest.mark.parametrize("name", ["llama", "llama 3.1", "llama, linear", "mixtral"])
def test_the_older_spelling_of_rotary_settings(name: str, tmp_path: Path) -> None:
    theirs = published(name)
    theirs.save_pretrained(tmp_path)
    ours = loaded_from(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")  # oldest of all
    values["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    file.write_text(json.dumps(values))
    assert torch.equal(logits(loaded_from(tmp_path), ids()), logits(ours, ids()))


def test_the_shorter_prefix_of_some_files_of_opt(tmp_path: Path) -> None:
    theirs = published("opt")
    theirs.save_pretrained(tmp_path)
    expected = logits(loaded_from(tmp_path), ids())
    short = {name.removeprefix("model."): value for name, value in tensors(tmp_path).items()}
    assert all(name.startswith("decoder.") for name in short)
    save_file(short, tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded_from(tmp_path), ids()), expected)


def deepseek(folder: Path) -> LlamaForCausalLM:
    """DeepSeekMoE in its published layout: Llama, whose blocks after the first have DeepSeek's mixtures."""
    mixture = DeepseekV2Config(
        hidden_size=48,
        num_attention_heads=6,
        moe_intermediate_size=20,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=3,
        routed_scaling_factor=1.0,
        topk_method="greedy",
    )
    theirs = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="eager")
    for layer in theirs.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(mixture)
    filled(theirs)
    folder.mkdir(exist_ok=True)
    save_file(fused_experts_apart(theirs.state_dict()), folder / "model.safetensors")
    own = {"n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
    plain = {name: value for name, value in SIZES.items() if name != "rope_parameters"}
    settings = {"model_type": "deepseek", **plain, **own, "first_k_dense_replace": 1, "rope_theta": 5000.0}
    (folder / "config.json").write_text(json.dumps(settings))
    return theirs


def test_deepseek(tmp_path: Path) -> None:
    theirs = deepseek(tmp_path / "given")
    assert "model.layers.2.mlp.experts.5.up_proj.weight" in tensors(tmp_path / "given")
    ours = loaded_from(tmp_path / "given")
    assert worst_gap(ours, theirs) < 1e-4
    gradient = EXPERT | block("ffn.shared.down.weight", "mlp.shared_experts.down_proj.weight") | KEY
    assert loss_and_gradient_gap(ours, theirs, gradient) < 1e-4
    assert padding_gap(ours) < 1e-4
    assert same_texts(ours, theirs)
    back = loaded_from(written_back(ours, tmp_path / "given", tmp_path / "back"))
    assert gap(logits(back, ids()), logits(ours, ids())) == 0


@pytest.mark.parametrize("fact", [{"num_experts_per_tok": 2}, {"norm_topk_prob": True}, {"rms_norm_eps": 1e-1}])
def test_a_changed_setting_of_deepseek_is_noticed(fact: dict[str, Any], tmp_path: Path) -> None:
    theirs = deepseek(tmp_path)
    assert logit_gap(loaded_from(changed(tmp_path, **fact)), theirs) > 1e-3
