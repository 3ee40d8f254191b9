"""Our decoder is transformers' Llama: logits, cached decoding, loss and gradients, at random weights."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity.noise import gap, noise
from vlm.loss.language import language, supervised
from vlm.model.language import Decoder, llama
from vlm.model.weights.files import load_strict
from vlm.model.weights.llama import llama_table
from vlm.nn.tokens import Tokens

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


def pair(tied: bool, **changes: float) -> tuple[Decoder, LlamaForCausalLM]:
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        attn_implementation="eager",
    )
    theirs = LlamaForCausalLM(config).eval()
    noise(theirs)
    theirs.tie_weights()
    ours = llama(**{**SIZES, **changes}, tied=tied).eval()
    load_strict(ours, llama_table(tied).to_ours(theirs.state_dict()), "transformers")
    return ours, theirs


def ids(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: Decoder, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    return model.logits(model(Tokens.of(model.embed(tokens), causal=True, valid=valid)).hidden)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_round_trip(tied: bool) -> None:
    ours, theirs = pair(tied)
    assert gap(logits(ours, ids()), theirs(ids()).logits) < 1e-4
    back = llama_table(tied).to_theirs(ours.state_dict())
    for name, value in back.items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_left_padding_shifts_nothing() -> None:
    ours, theirs = pair(True)
    valid = torch.ones(3, 17, dtype=torch.bool)
    valid[0, :5] = valid[2, :11] = False
    expected = theirs(ids(), attention_mask=valid.long(), position_ids=(valid.long().cumsum(1) - 1).clamp_min(0)).logits
    assert gap(logits(ours, ids(), valid)[valid], expected[valid]) < 1e-4


def test_loss_and_gradients() -> None:
    ours, theirs = pair(True)
    labels = ids().clone()
    labels[:, :6] = -100
    hidden, target = supervised(ours(Tokens.of(ours.embed(ids()))).hidden, labels)
    loss = language(ours.logits(hidden), target)
    expected = theirs(ids(), labels=labels).loss
    assert gap(loss, expected) < 1e-5
    loss.backward()
    expected.backward()
    mine = ours.get_parameter("stack.blocks.1.mixer.key.weight").grad
    other = theirs.model.layers[1].self_attn.k_proj.weight.grad
    assert mine is not None and other is not None
    assert gap(mine, other) < 1e-5


@pytest.mark.parametrize("change", [{"theta": 10_000.0}, {"eps": 1e-1}])
def test_a_changed_fact_is_noticed(change: dict[str, float]) -> None:
    ours, theirs = pair(True, **change)
    assert gap(logits(ours, ids()), theirs(ids()).logits) > 1e-3
