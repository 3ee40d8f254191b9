"""Our decoder is transformers' OPT, learned positions with their offset included, at random weights."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from tests.parity.decoders import comes_back, filled, ids, loaded, logit_gap, logits, loss_and_gradient_gap, worst_gap
from vlm.model.language import Decoder, LearnedPositions, opt
from vlm.model.weights.opt import opt_table

NAMES = {
    "stack.blocks.1.mixer.query.bias": "model.decoder.layers.1.self_attn.q_proj.bias",
    "positions.embedding.weight": "model.decoder.embed_positions.weight",
}


def pair(tied: bool = True, **changes: float) -> tuple[Decoder, OPTForCausalLM]:
    config = OPTConfig(
        vocab_size=99,
        hidden_size=48,
        num_hidden_layers=3,
        ffn_dim=80,
        max_position_embeddings=20,
        num_attention_heads=6,
        word_embed_proj_dim=48,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    theirs = filled(OPTForCausalLM(config))
    sizes = {"hidden": 80, "max_positions": 20, **changes}
    return loaded(opt(99, 48, 3, 6, **sizes, tied=tied), theirs, opt_table(tied)), theirs  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_round_trip(tied: bool) -> None:
    ours, theirs = pair(tied)
    assert worst_gap(ours, theirs) < 1e-5
    assert comes_back(ours, theirs, opt_table(tied))
    assert loss_and_gradient_gap(ours, theirs, NAMES) < 1e-5


def test_another_offset_or_norm_is_noticed() -> None:
    ours, theirs = pair()
    assert isinstance(ours.positions, LearnedPositions)
    ours.positions.offset = 1
    assert logit_gap(ours, theirs) > 1e-3
    assert logit_gap(*pair(eps=1e-1)) > 1e-3


def test_the_shorter_prefix_of_some_files() -> None:
    ours, theirs = pair()
    published = {name.removeprefix("model."): value for name, value in theirs.state_dict().items()}
    other = loaded_from(published)
    assert torch.equal(logits(other, ids()), logits(ours, ids()))


def loaded_from(published: dict[str, torch.Tensor]) -> Decoder:
    ours = opt(99, 48, 3, 6, hidden=80, max_positions=20).eval()
    ours.load_state_dict(opt_table(prefix="decoder").to_ours(published))
    return ours
