"""Our decoding is transformers': token by token at random weights, and its rules one by one."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from tests.parity.noise import noise
from vlm.model.generate import Sampling, Step, choose, generate
from vlm.model.language import Decoder, llama
from vlm.model.vlm import last_valid
from vlm.model.weights.files import load_strict
from vlm.model.weights.llama import llama_table
from vlm.nn.state import State
from vlm.nn.tokens import Tokens

VOCABULARY, PAD = 50, 0


def pair() -> tuple[Decoder, LlamaForCausalLM]:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    theirs = LlamaForCausalLM(config).eval()
    noise(theirs, scale=0.3)
    ours = llama(VOCABULARY, 32, 2, 4, 2, hidden=48, tied=False).eval()
    load_strict(ours, llama_table(False).to_ours(theirs.state_dict()), "transformers")
    return ours, theirs


def prompt(padding: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCABULARY, (len(padding), 7), generator=torch.Generator().manual_seed(4))
    valid = torch.arange(7)[None] >= torch.tensor(padding)[:, None]
    return ids.masked_fill(~valid, PAD), valid


@torch.no_grad()
def stepper(model: Decoder, ids: Tensor, valid: Tensor) -> tuple[Tensor, State, Step]:
    """What decoding starts from."""

    def step(chosen: Tensor, state: State) -> tuple[Tensor, State]:
        out = model(Tokens.of(model.embed(chosen), position=state.position[:, None]), state)
        return model.logits(out.hidden[:, -1]), out.state

    out = model(Tokens.of(model.embed(ids), valid=valid))
    return model.logits(last_valid(out.hidden, valid)), out.state, step


def written(model: Decoder, ids: Tensor, valid: Tensor, eos: int | list[int], sampling: Sampling) -> list[list[int]]:
    logits, state, step = stepper(model, ids, valid)
    return generate(step, logits, state, torch.where(valid, ids, -1), eos, sampling)


def expected(model: LlamaForCausalLM, ids: Tensor, valid: Tensor, eos: int, sampling: Sampling) -> list[list[int]]:
    """Row by row without padding, which older versions count as something said."""
    rows = []
    for row, kept in zip(ids, valid, strict=True):
        found = model.generate(
            row[kept][None],
            do_sample=False,
            max_new_tokens=sampling.max_new,
            min_new_tokens=sampling.min_new,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=eos,
            pad_token_id=PAD,
        )[0, int(kept.sum()) :].tolist()
        rows.append(found[: found.index(eos)] if eos in found else found)
    return rows


@pytest.mark.parametrize("padding", [[0, 0, 0, 0], [0, 3, 6, 1]])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 5.0])
@pytest.mark.parametrize("least", [0, 7])
def test_greedy_text_is_the_same(padding: list[int], penalty: float, least: int) -> None:
    ours, theirs = pair()
    ids, valid = prompt(padding)
    free = written(ours, ids, valid, VOCABULARY - 1, Sampling(max_new=14, repetition_penalty=penalty))
    assert len({tuple(row) for row in free}) == 4
    eos = free[0][4]
    sampling = Sampling(max_new=14, min_new=least, repetition_penalty=penalty)
    found = written(ours, ids, valid, eos, sampling)
    assert found == expected(theirs, ids, valid, eos, sampling)
    assert min(map(len, found)) >= least
    if least == 0:
        assert len(found[0]) <= 4


def test_another_penalty_is_noticed() -> None:
    ours, theirs = pair()
    ids, valid = prompt([0, 0, 0, 0])
    found = written(ours, ids, valid, VOCABULARY - 1, Sampling(max_new=14, repetition_penalty=1.3))
    assert found != expected(theirs, ids, valid, VOCABULARY - 1, Sampling(max_new=14, repetition_penalty=1.1))


def logits() -> Tensor:
    return torch.randn(400, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 3


def drawn(scores: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]


def same_draws(sampling: Sampling, used: Tensor, wanted: Tensor) -> bool:
    """Equal draws of 400 different rows from one seed."""
    first, second = (torch.Generator().manual_seed(6) for _ in range(2))
    return torch.equal(choose(logits(), used, sampling, None, first), drawn(wanted, second))


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty(penalty: float) -> None:
    said = torch.randint(0, VOCABULARY, (400, 12), generator=torch.Generator().manual_seed(7))
    used = torch.zeros(400, VOCABULARY, dtype=torch.bool).scatter_(1, said, True)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(said, logits())
    sampling = Sampling(temperature=1.0, repetition_penalty=penalty)
    assert same_draws(sampling, used, wanted)
    assert not same_draws(sampling, torch.zeros_like(used), wanted)
    assert torch.equal(choose(logits(), used, Sampling(repetition_penalty=penalty)), wanted.argmax(1))


@pytest.mark.parametrize("top_k", [1, 5, 49, 50])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_top_k_then_top_p(top_k: int, top_p: float, temperature: float) -> None:
    ids, used = torch.zeros(400, 1, dtype=torch.long), torch.zeros(400, VOCABULARY, dtype=torch.bool)
    wanted = TopPLogitsWarper(top_p)(ids, TopKLogitsWarper(top_k)(ids, logits() / temperature))
    assert same_draws(Sampling(temperature=temperature, top_k=top_k, top_p=top_p), used, wanted)
