"""Our beam search is transformers': token by token and score by score at random weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from tests.parity.test_generate import PAD, VOCABULARY, pair, prompt, stepper
from vlm.model.beam import Beams, Hypothesis, search
from vlm.model.generate import Stop
from vlm.model.language import Decoder

BASE = Beams(4, max_new=9, returned=4)


@torch.no_grad()
def written(
    model: Decoder, ids: Tensor, valid: Tensor, eos: list[int], beams: Beams, stop: Stop | None = None
) -> list[list[Hypothesis]]:
    logits, state, step = stepper(model, ids, valid)
    return search(step, logits, state, torch.where(valid, ids, -1), eos, beams, stop)


class Ends(StoppingCriteria):  # type: ignore[misc]
    """Our kind of stop rule as theirs."""

    def __init__(self, stop: Stop, length: int) -> None:
        self.stop, self.length = stop, length

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.tensor([self.stop(row[self.length :].tolist()) for row in input_ids])


def expected(
    model: LlamaForCausalLM, ids: Tensor, valid: Tensor, eos: list[int], beams: Beams, stop: Stop | None = None
) -> list[list[Hypothesis]]:
    out = model.generate(
        ids,
        attention_mask=valid.long(),
        do_sample=False,
        num_beams=beams.width,
        max_new_tokens=beams.max_new,
        min_new_tokens=beams.min_new,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        num_return_sequences=beams.returned,
        repetition_penalty=beams.repetition_penalty,
        eos_token_id=eos,
        pad_token_id=PAD,
        stopping_criteria=None if stop is None else StoppingCriteriaList([Ends(stop, ids.shape[1])]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [row[ids.shape[1] :].tolist() for row in out.sequences]
    cut = [row[: next((i for i, token in enumerate(row) if token in eos), len(row))] for row in rows]
    found = [Hypothesis(row, score) for row, score in zip(cut, out.sequences_scores.tolist(), strict=True)]
    return [found[i : i + beams.returned] for i in range(0, len(found), beams.returned)]


def same(ours: list[list[Hypothesis]], theirs: list[list[Hypothesis]]) -> bool:
    texts = [[h.ids for h in row] for row in ours] == [[h.ids for h in row] for row in theirs]
    pairs = zip([h.score for row in ours for h in row], [h.score for row in theirs for h in row], strict=True)
    return texts and all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)


def early_ends(model: Decoder, ids: Tensor, valid: Tensor, beams: Beams) -> tuple[list[int], list[list[Hypothesis]]]:
    """Tokens that the search says early when nothing ends it, and what it says then."""
    free = written(model, ids, valid, [VOCABULARY - 1], replace(beams, min_new=beams.max_new))
    return [free[0][0].ids[2], free[1][0].ids[4]], free


@pytest.mark.parametrize(("width", "ends"), [(2, 2), (5, 1)])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.5, 2.5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_texts_and_scores_are_the_same(width: int, length_penalty: float, early_stopping: object, ends: int) -> None:
    ours, theirs = pair()
    ids, valid = prompt([0, 3, 6])
    beams = Beams(width, 9, 0, length_penalty, early_stopping, returned=width)  # type: ignore[arg-type]
    eos, free = early_ends(ours, ids, valid, beams)
    found = written(ours, ids, valid, eos[:ends], beams)
    assert same(found, expected(theirs, ids, valid, eos[:ends], beams))
    assert [len(row) for row in found] == [width] * 3
    assert not same(found, free)
    if length_penalty <= 0:
        assert len(found[0][0].ids) <= 4


@pytest.mark.parametrize("returned", [1, 3])
@pytest.mark.parametrize("least", [0, 4, 9])
@pytest.mark.parametrize("penalty", [0.6, 1.4])
def test_with_penalty_and_least_length_row_by_row(returned: int, least: int, penalty: float) -> None:
    """Without padding, which older versions count as something said."""
    ours, theirs = pair()
    ids, valid = prompt([0, 3, 6])
    beams = Beams(4, 9, least, -0.5, returned=returned, repetition_penalty=penalty)
    eos, free = early_ends(ours, ids, valid, beams)
    found = written(ours, ids, valid, eos, beams)
    rows = zip(ids, valid, strict=True)
    wanted = [expected(theirs, row[kept][None], kept[kept][None], eos, beams)[0] for row, kept in rows]
    assert same(found, wanted)
    assert min(len(h.ids) for row in found for h in row) >= least
    assert not same(found, free)


@pytest.mark.parametrize("early_stopping", [True, False])
def test_a_stop_rule_ends_candidates(early_stopping: bool) -> None:
    def stop(row: list[int]) -> bool:
        return len(row) > 2 and (row[-1] + row[-2]) % 5 == 0

    ours, theirs = pair()
    ids, valid = prompt([0, 3, 6])
    beams = replace(BASE, early_stopping=early_stopping)
    found = written(ours, ids, valid, [VOCABULARY - 1], beams, stop)
    assert same(found, expected(theirs, ids, valid, [VOCABULARY - 1], beams, stop))
    assert any(stop(h.ids) and len(h.ids) < 9 for row in found for h in row)


@pytest.mark.parametrize(
    "change", [{"length_penalty": 0.5}, {"width": 5}, {"early_stopping": True}, {"repetition_penalty": 1.05}]
)
def test_another_rule_is_noticed(change: dict[str, object]) -> None:
    ours, theirs = pair()
    ids, valid = prompt([0, 0, 0])
    long = replace(BASE, length_penalty=2.0)
    _, free = early_ends(ours, ids, valid, long)
    eos = sorted(set(free[0][0].ids[2:8]))
    wanted = expected(theirs, ids, valid, eos, long)
    assert same(written(ours, ids, valid, eos, long), wanted)
    assert not same(written(ours, ids, valid, eos, replace(long, **change)), wanted)  # type: ignore[arg-type]


def test_one_beam_is_their_greedy() -> None:
    ours, theirs = pair()
    ids, valid = prompt([0, 3, 6])
    eos, _ = early_ends(ours, ids, valid, Beams(1, max_new=9))
    rows = theirs.generate(ids, attention_mask=valid.long(), max_new_tokens=9, eos_token_id=eos, pad_token_id=PAD)
    found = written(ours, ids, valid, eos, Beams(1, max_new=9))
    assert [row[0].ids for row in found] == [
        row[: next((i for i, token in enumerate(row) if token in [*eos, PAD]), len(row))]
        for row in rows[:, ids.shape[1] :].tolist()
    ]
