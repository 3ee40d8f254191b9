"""Our decoder with experts is transformers' Mixtral, in the published layout of its files, at random weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from tests.parity.decoders import comes_back, filled, loaded, logit_gap, loss_and_gradient_gap, worst_gap
from vlm.model.language import Decoder, mixtral
from vlm.model.weights.files import load_strict
from vlm.model.weights.mixtral import mixtral_memory_table, mixtral_table

NAMES = {
    "stack.blocks.1.ffn.gate_up": "model.layers.1.mlp.experts.gate_up_proj",
    "stack.blocks.1.ffn.router.weight": "model.layers.1.mlp.gate.weight",
    "stack.blocks.0.mixer.query.weight": "model.layers.0.self_attn.q_proj.weight",
}


def ours(top_k: int = 2, eps: float = 1e-5) -> Decoder:
    return mixtral(99, 48, 2, 6, 2, 40, experts=5, top_k=top_k, theta=5000.0, eps=eps).eval()


def published() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        attn_implementation="eager",
    )
    return filled(MixtralForCausalLM(config))


def pair(**changes: float) -> tuple[Decoder, MixtralForCausalLM]:
    theirs = published()
    return loaded(ours(**changes), theirs, mixtral_memory_table()), theirs  # type: ignore[arg-type]


def test_logits_and_round_trip() -> None:
    mine, theirs = pair()
    assert worst_gap(mine, theirs) < 1e-5
    assert comes_back(mine, theirs, mixtral_memory_table())
    assert loss_and_gradient_gap(mine, theirs, NAMES) < 1e-5


@pytest.mark.parametrize("change", [{"top_k": 1}, {"eps": 1e-1}])
def test_a_changed_fact_is_noticed(change: dict[str, float]) -> None:
    assert logit_gap(*pair(**change)) > 1e-3


def test_published_files_both_ways(tmp_path: Path) -> None:
    expected, theirs = pair()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    names, mine = load_file(file), ours()
    assert "model.layers.1.block_sparse_moe.experts.4.w3.weight" in names
    load_strict(mine, mixtral_table().to_ours(names), "transformers")
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in mine.state_dict().items())
    back = mixtral_table().to_theirs(mine.state_dict())
    assert set(back) == set(names) and all(torch.equal(value, names[name]) for name, value in back.items())
    save_file(back, file)
    assert worst_gap(mine, MixtralForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()) < 1e-5
    back["model.layers.0.block_sparse_moe.experts.2.w3.weight"] *= 1.5
    save_file(back, file)
    assert logit_gap(mine, MixtralForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()) > 1e-3


def test_a_missing_expert_is_named() -> None:
    names = mixtral_table().to_theirs(ours().state_dict())
    del names["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    with pytest.raises(ValueError, match=r"missing beside others: .*\.experts\.3\.w3\.weight$"):
        mixtral_table().to_ours(names)
