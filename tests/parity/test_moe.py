"""Our mixtures are transformers' Mixtral, DeepSeek-V2, DeepSeek-V3 and Qwen2-MoE blocks at random weights.

DeepSeek-V2's and -V3's also from the files of whole models, whose attention we do not have.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from tests.parity.decoder_folders import tensors
from tests.parity.noise import gap, noise
from vlm.model.weights.files import load_strict
from vlm.model.weights.moe import deepseek_block_table
from vlm.nn.ffn import GatedMlp
from vlm.nn.moe import Balance, GatedShared, MixtureOfExperts, Router, sigmoid_router, softmax_router

DIM, HIDDEN, EXPERTS, TOP = 24, 20, 8, 3
WIDTHS = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "num_experts_per_tok": TOP, "num_attention_heads": 4}
DEEPSEEK = {**WIDTHS, "n_routed_experts": EXPERTS, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
NAMES = {
    "gate.weight": "router.weight",
    "gate.e_score_correction_bias": "router.bias",
    "experts.gate_up_proj": "gate_up",
    "experts.down_proj": "down",
}


def mixtral() -> nn.Module:
    config = MixtralConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP
    )
    return MixtralSparseMoeBlock(config)


def deepseek2(method: str) -> nn.Module:
    return DeepseekV2Moe(DeepseekV2Config(**DEEPSEEK, topk_method=method, n_group=4, topk_group=2))


def deepseek3() -> nn.Module:
    return DeepseekV3MoE(DeepseekV3Config(**DEEPSEEK, n_group=4, topk_group=2, norm_topk_prob=True))


def qwen2() -> nn.Module:
    config = Qwen2MoeConfig(
        **WIDTHS, num_experts=EXPERTS, shared_expert_intermediate_size=2 * HIDDEN, norm_topk_prob=False
    )
    return Qwen2MoeSparseMoeBlock(config)


def softmax(**options: float) -> Router:
    return softmax_router(DIM, EXPERTS, TOP, **options)  # type: ignore[arg-type]


def sigmoid(**options: float) -> Router:
    return sigmoid_router(DIM, EXPERTS, TOP, **options)  # type: ignore[arg-type]


def no_shared() -> None:
    return None


def plain_shared() -> nn.Module:
    return GatedMlp(DIM, 2 * HIDDEN)


def gated_shared() -> nn.Module:
    return GatedShared(DIM, GatedMlp(DIM, 2 * HIDDEN))


def pair(theirs: nn.Module, router: Router, shared: nn.Module | None) -> tuple[MixtureOfExperts, nn.Module]:
    """Ours with the weights of `theirs`, which get noise; the fused expert weights have the same layout."""
    noise(theirs, scale=0.3)
    weights = {}
    for name, value in theirs.state_dict().items():
        if name == "gate.e_score_correction_bias":
            value.copy_(torch.randn(value.shape) * 0.3)
        part = name.replace("shared_expert_gate.", "shared.gate.").replace("shared_experts.", "shared.")
        part = part.replace("shared_expert.", "shared.network.").replace("_proj.", ".")
        weights[NAMES.get(name, part)] = value
    ours = MixtureOfExperts(DIM, HIDDEN, router, shared)
    ours.load_state_dict(weights, strict=False)
    assert set(weights) - {"router.bias"} == {name for name, _ in ours.named_parameters()}
    return ours, theirs


def differences(ours: MixtureOfExperts, theirs: nn.Module) -> list[float]:
    """Of the output and of the gradients of input, router and experts, each relative to the largest value."""
    values = []
    for model, names in ((ours, NAMES.values()), (theirs, NAMES)):
        x = torch.randn(3, 11, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = model(x)
        out = out if isinstance(out, Tensor) else out[0]
        out.square().sum().backward()
        parameters = dict(model.named_parameters())
        values.append([out, x.grad, *(parameters[name].grad for name in names if name in parameters)])
    assert len(values[0]) == 5
    return [gap(mine, other) / float(other.detach().abs().max()) for mine, other in zip(*values, strict=True)]


Options = dict[str, float]
Shared = Callable[[], nn.Module | None]
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Router], Options, Options, Shared]] = {
    "Mixtral": (mixtral, softmax, {}, {"renormalize": False}, no_shared),
    "DeepSeekMoE": (
        lambda: deepseek2("greedy"),
        softmax,
        {"renormalize": False, "scale": 1.5},
        {"renormalize": True, "scale": 1.5},
        plain_shared,
    ),
    "DeepSeek-V2": (
        lambda: deepseek2("group_limited_greedy"),
        softmax,
        {"renormalize": False, "scale": 1.5, "groups": 4, "top_groups": 2},
        {"renormalize": False, "scale": 1.5, "groups": 2, "top_groups": 1},
        plain_shared,
    ),
    "DeepSeek-V3": (
        deepseek3,
        sigmoid,
        {"scale": 1.5, "groups": 4, "top_groups": 2},
        {"scale": 1.5, "groups": 4, "top_groups": 3},
        plain_shared,
    ),
    "DeepSeek-V3's bias": (
        deepseek3,
        sigmoid,
        {"scale": 1.5, "groups": 4, "top_groups": 2},
        {"scale": 1.5, "groups": 4, "top_groups": 2, "bias": False},
        plain_shared,
    ),
    "Qwen2-MoE": (qwen2, softmax, {"renormalize": False}, {"renormalize": True}, gated_shared),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    make, router, options, _, shared = CASES[name]
    assert max(differences(*pair(make(), router(**options), shared()))) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_changed_fact_is_noticed(name: str) -> None:
    make, router, _, wrong, shared = CASES[name]
    assert min(differences(*pair(make(), router(**wrong), shared()))[:2]) > 1e-2


@pytest.mark.parametrize("padded", [False, True])
def test_mixtrals_balance_loss_is_ours_times_top_k(padded: bool) -> None:
    ours = MixtureOfExperts(DIM, HIDDEN, softmax(), balance=[Balance(1.0)])
    noise(ours)
    x, valid = torch.randn(3, 11, DIM), torch.rand(3, 11) < (0.6 if padded else 2.0)
    logits = x.flatten(0, 1) @ ours.router.weight.T
    theirs = load_balancing_loss_func((logits,), EXPERTS, TOP, valid.long() if padded else None)
    balance = ours(x, valid)[1].balance
    assert gap(TOP * balance, theirs) < 1e-5
    mine, other = (torch.autograd.grad(loss, ours.router.weight)[0] for loss in (TOP * balance, theirs))
    assert gap(mine, other) < 1e-5 < 0.1 * float(other.abs().max())


LAYER = "model.layers.1.mlp."
LATENT = {
    "vocab_size": 30,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
FILES: dict[str, tuple[PretrainedConfig, Router, Router]] = {
    "DeepSeek-V2": (
        DeepseekV2Config(**DEEPSEEK, **LATENT, topk_method="group_limited_greedy"),
        softmax(**CASES["DeepSeek-V2"][2]),
        softmax(**CASES["DeepSeek-V2"][3]),
    ),
    "DeepSeek-V3": (
        DeepseekV3Config(**DEEPSEEK, **LATENT, norm_topk_prob=True),
        sigmoid(**CASES["DeepSeek-V3"][2]),
        sigmoid(**CASES["DeepSeek-V3"][3]),
    ),
}


def from_file(name: str, folder: Path, wrong: bool = False) -> tuple[MixtureOfExperts, nn.Module, dict[str, Tensor]]:
    """The mixture of a layer of a published model, ours and theirs, and its tensors in the file."""
    config, right, other = FILES[name]
    model = AutoModelForCausalLM.from_config(config)
    noise(model, scale=0.3)
    theirs = model.model.layers[1].mlp
    for bias in (value for key, value in theirs.named_buffers() if key.endswith("correction_bias")):
        bias.copy_(torch.randn(bias.shape) * 0.3)
    model.save_pretrained(folder)
    published = {key: value for key, value in tensors(folder).items() if key.startswith(LAYER)}
    ours = MixtureOfExperts(DIM, HIDDEN, other if wrong else right, plain_shared())
    load_strict(ours, deepseek_block_table().under(LAYER, "").to_ours(published), "file")
    return ours, theirs, published


@pytest.mark.parametrize("name", FILES)
def test_mixtures_from_the_files_of_whole_models(name: str, tmp_path: Path) -> None:
    ours, theirs, published = from_file(name, tmp_path)
    assert f"{LAYER}experts.7.gate_proj.weight" in published
    assert max(differences(ours, theirs)) < 1e-5
    back = deepseek_block_table().under(LAYER, "").to_theirs(ours.state_dict())
    assert set(back) == set(published)
    assert all(torch.equal(value, published[key]) for key, value in back.items())


@pytest.mark.parametrize("name", FILES)
def test_other_groups_of_those_are_noticed(name: str, tmp_path: Path) -> None:
    assert min(differences(*from_file(name, tmp_path, wrong=True)[:2])[:2]) > 1e-2
