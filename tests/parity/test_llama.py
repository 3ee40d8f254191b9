"""Our decoder is transformers' Llama, also with Llama 3.1's rotary scaling, and Mistral: at random weights."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.parity.decoders import comes_back, filled, loaded, logit_gap, loss_and_gradient_gap, worst_gap
from vlm.model.language import Decoder, llama
from vlm.model.weights.llama import llama_table
from vlm.nn.rotary import LinearScaling, Llama3Scaling

SIZES = {
    "vocabulary": 99,
    "dim": 48,
    "layers": 3,
    "heads": 6,
    "kv_heads": 2,
    "hidden": 80,
    "theta": 5000.0,
    "eps": 1e-5,
}
THEIRS = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
# Wavelengths 6, 53, 444 and 3737 against 32 and 128: one fast, one between, two slow.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def pair(tied: bool = True, rope: object = PLAIN, **changes: object) -> tuple[Decoder, LlamaForCausalLM]:
    theirs = filled(LlamaForCausalLM(LlamaConfig(**THEIRS, tie_word_embeddings=tied, rope_parameters=rope)))
    return loaded(llama(**{**SIZES, **changes}, tied=tied), theirs, llama_table(tied)), theirs


def mistral(window: int | None) -> tuple[Decoder, MistralForCausalLM]:
    config = MistralConfig(**THEIRS, tie_word_embeddings=False, rope_parameters=PLAIN, sliding_window=5, head_dim=8)
    theirs = filled(MistralForCausalLM(config))
    return loaded(llama(**SIZES, tied=False, window=window), theirs, llama_table(False)), theirs


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_round_trip(tied: bool) -> None:
    ours, theirs = pair(tied)
    assert worst_gap(ours, theirs) < 1e-5
    assert comes_back(ours, theirs, llama_table(tied))


def test_loss_and_gradients() -> None:
    names = {
        "stack.blocks.1.mixer.key.weight": "model.layers.1.self_attn.k_proj.weight",
        "embedding.weight": "model.embed_tokens.weight",
    }
    assert loss_and_gradient_gap(*pair(), names) < 1e-5


@pytest.mark.parametrize("change", [{"theta": 10_000.0}, {"eps": 1e-1}, {"scaling": LinearScaling(2.0)}])
def test_a_changed_fact_is_noticed(change: dict[str, object]) -> None:
    assert logit_gap(*pair(**change)) > 1e-3


def test_scaling_of_llama_3() -> None:
    assert worst_gap(*pair(rope=LLAMA3, scaling=Llama3Scaling(8.0, 1.0, 4.0, 128))) < 1e-5


@pytest.mark.parametrize(
    "scaling",
    [None, Llama3Scaling(7.0, 1.0, 4.0, 128), Llama3Scaling(8.0, 2.0, 4.0, 128), Llama3Scaling(8.0, 1.0, 5.0, 128)],
)
def test_another_scaling_is_noticed(scaling: Llama3Scaling | None) -> None:
    assert logit_gap(*pair(rope=LLAMA3, scaling=scaling)) > 1e-3


def test_linear_scaling() -> None:
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    assert worst_gap(*pair(rope=rope, scaling=LinearScaling(4.0))) < 1e-5


def test_the_window_of_mistral() -> None:
    assert worst_gap(*mistral(5)) < 1e-5
    names = {"stack.blocks.1.mixer.key.weight": "model.layers.1.self_attn.k_proj.weight"}
    assert loss_and_gradient_gap(*mistral(5), names) < 1e-5


@pytest.mark.parametrize("window", [4, 6, None])
def test_another_window_is_noticed(window: int | None) -> None:
    assert logit_gap(*mistral(window)) > 1e-3
