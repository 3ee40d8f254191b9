"""Our decoder is transformers' Qwen2, also with its window in the upper blocks, and Qwen3: at random weights."""

import pytest
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.parity.decoders import comes_back, filled, loaded, logit_gap, loss_and_gradient_gap, worst_gap
from vlm.model.language import Decoder, decoder, llama
from vlm.model.weights.llama import llama_table, qwen2_table, qwen3_table
from vlm.nn.attention import Attention
from vlm.nn.ffn import GatedMlp
from vlm.nn.rotary import Rotary

OURS = {"vocabulary": 99, "dim": 48, "layers": 3, "heads": 6, "kv_heads": 2, "hidden": 80, "theta": 5000.0, "eps": 1e-6}
THEIRS = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "attn_implementation": "eager",
}
BIAS = {"stack.blocks.1.mixer.value.bias": "model.layers.1.self_attn.v_proj.bias"}
NORM = {"stack.blocks.1.mixer.key_norm.weight": "model.layers.1.self_attn.k_norm.weight"}


def qwen2(tied: bool = True) -> tuple[Decoder, Qwen2ForCausalLM]:
    theirs = filled(Qwen2ForCausalLM(Qwen2Config(**THEIRS, tie_word_embeddings=tied)))
    return loaded(llama(**OURS, tied=tied, bias=True), theirs, qwen2_table(tied)), theirs


def sliding(first: int = 1, window: int = 5) -> tuple[Decoder, Qwen2ForCausalLM]:
    """Block 0 of theirs sees everything, the others five tokens."""
    config = Qwen2Config(**THEIRS, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    theirs = filled(Qwen2ForCausalLM(config))
    ours = decoder(
        99,
        48,
        3,
        mixer=lambda i: Attention(48, 6, 2, True, out_bias=False, window=window if i >= first else None),
        ffn=lambda _: GatedMlp(48, 80),
        norm=lambda: nn.RMSNorm(48, eps=1e-6),
        rotary=Rotary(8, 5000.0),
        tied=False,
    )
    return loaded(ours, theirs, qwen2_table(False)), theirs


def qwen3(tied: bool = True, **changes: object) -> tuple[Decoder, Qwen3ForCausalLM]:
    """Heads of 10 together are wider than the stream."""
    theirs = filled(Qwen3ForCausalLM(Qwen3Config(**THEIRS, tie_word_embeddings=tied, head_dim=10)))
    ours = llama(**{**OURS, **changes}, tied=tied, head_dim=10, head_norm=True)
    return loaded(ours, theirs, qwen3_table(tied)), theirs


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2(tied: bool) -> None:
    ours, theirs = qwen2(tied)
    assert worst_gap(ours, theirs) < 1e-5
    assert comes_back(ours, theirs, qwen2_table(tied))
    assert loss_and_gradient_gap(ours, theirs, BIAS) < 1e-5


def test_biases_are_noticed() -> None:
    ours, theirs = qwen2()
    nn.init.zeros_(ours.get_parameter("stack.blocks.1.mixer.value.bias"))
    assert logit_gap(ours, theirs) > 1e-3
    with pytest.raises(ValueError, match=r"llama: published tensors .*: model\.layers\.0\.self_attn\.q_proj\.bias"):
        llama_table(True).to_ours(theirs.state_dict())


def test_qwen2_with_a_window_in_some_blocks() -> None:
    ours, theirs = sliding()
    assert theirs.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert worst_gap(ours, theirs) < 1e-5
    assert loss_and_gradient_gap(ours, theirs, BIAS) < 1e-5


@pytest.mark.parametrize(("first", "window"), [(0, 5), (2, 5), (1, 4)])
def test_other_blocks_and_windows_are_noticed(first: int, window: int) -> None:
    assert logit_gap(*sliding(first, window)) > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3(tied: bool) -> None:
    ours, theirs = qwen3(tied)
    assert worst_gap(ours, theirs) < 1e-5
    assert comes_back(ours, theirs, qwen3_table(tied))
    assert loss_and_gradient_gap(ours, theirs, NORM) < 1e-5


def test_head_norms_are_noticed() -> None:
    ours, theirs = qwen3()
    nn.init.ones_(ours.get_parameter("stack.blocks.1.mixer.key_norm.weight"))
    assert logit_gap(ours, theirs) > 1e-3
    assert logit_gap(*qwen3(eps=1e-1)) > 1e-3
