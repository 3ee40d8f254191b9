"""Beam search: the likeliest continuations of each row, several at a time, with their scores.

The rules are those of `transformers` 5 (`generate` with `num_beams`), so that both give the same texts.

Letters: B rows, W width, R beams that run (1 at first, then W), S rows of them all, K candidates, N new tokens,
P prompt tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from vlm.model.generate import (
    Dice,
    Step,
    Stop,
    advance,
    end_tokens,
    penalise,
    refuse,
    said,
    until_end,
    without_repeats,
    wrong_lengths,
    wrong_repeats,
)
from vlm.nn.state import State


class Hypothesis(NamedTuple):
    """A finished continuation: its tokens without the end token, and its score."""

    ids: list[int]
    score: float  # log-probability of the tokens and the end token / their number ** length_penalty


@dataclass(frozen=True)
class Beams:
    """Beam search of some width, for the best `returned` continuations.

    `length_penalty`: above 0 favours long texts, below 0 short ones. `early_stopping`: True ends a row when it has
    `width` texts; False when none that runs would beat the worst of them at its present length; "never" when none
    could at any length (exact for penalties up to 0, else at `max_new`).
    """

    width: int
    max_new: int = 30
    min_new: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    returned: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        """Refuses values that no search has, all named."""
        modes = self.early_stopping in (True, False, "never")
        refuse(
            [
                (self.width < 1, f"width={self.width}: at least 1"),
                *wrong_lengths(self.max_new, self.min_new),
                (not math.isfinite(self.length_penalty), f"length_penalty={self.length_penalty}: a finite number"),
                (not modes, f"early_stopping={self.early_stopping!r}: True, False or 'never'"),
                (not 1 <= self.returned <= self.width, f"returned={self.returned}: between 1 and width"),
                *wrong_repeats(self.repetition_penalty, self.no_repeat_ngram),
            ]
        )

    def unroll(
        self,
        step: Step,
        logits: Float[Tensor, "B V"],
        state: State,
        prompt: Int[Tensor, "B P"],
        eos: int | Sequence[int],
        generator: Dice | None = None,
        stop: Stop | None = None,
    ) -> list[list[int]]:
        """As `generate`: the best of `search`; nothing is drawn, so `generator` is not used."""
        return [row[0].ids if row else [] for row in search(step, logits, state, prompt, eos, self, stop)]

    def normalised(self, score: Float[Tensor, "*K"], length: int) -> Float[Tensor, "*K"]:
        """Score of a continuation of `length` tokens, its end token counted."""
        divisor: float = length**self.length_penalty
        return score / divisor


class _Running(NamedTuple):
    """Beams that go on, best first."""

    score: Float[Tensor, "B R"]
    ids: Int[Tensor, "B R N"]
    used: Bool[Tensor, "S V"] | None  # what the repetition penalty acts on


class _Finished(NamedTuple):
    """The best texts so far, best first; a free place has score -inf."""

    score: Float[Tensor, "B W"]
    ids: Int[Tensor, "B W N"]
    open: Bool[Tensor, "B"]  # may better ones still come?


class _Candidates(NamedTuple):
    """The best continuations of a row's beams by one token, best first."""

    score: Float[Tensor, "B K"]
    ids: Int[Tensor, "B K N"]
    source: Int[Tensor, "B K"]  # beam that each continues


@torch.no_grad()
def search(
    step: Step,
    logits: Float[Tensor, "B V"],
    state: State,
    prompt: Int[Tensor, "B P"],
    eos: int | Sequence[int],
    beams: Beams,
    stop: Stop | None = None,
) -> list[list[Hypothesis]]:
    """The best `beams.returned` continuations of each row, best first (fewer where there are no more).

    Arguments as in `generate`; the prompt is in `logits` and `state` once per row, not per beam.
    """
    batch, ends = len(logits), end_tokens(eos, logits.device)
    none = torch.empty(batch, beams.width, 0, dtype=torch.long, device=logits.device)
    used = said(prompt, logits) if beams.repetition_penalty != 1.0 else None
    running = _Running(logits.new_zeros(batch, 1, dtype=torch.float32), none[:, :1], used)
    finished = _Finished(
        torch.full((batch, beams.width), -torch.inf, device=logits.device),
        none,
        torch.ones(batch, dtype=torch.bool, device=logits.device),
    )
    for made in range(1, beams.max_new + 1):
        found = _extend(logits.float(), running, beams, ends, made, prompt)
        ended = _ended(found.ids, ends, made == beams.max_new, stop)
        running, index = _go_on(found, ended, running, beams.width)
        finished = _finish(finished, found, ended, ends, beams, made)
        finished = _close(finished, running.score[:, 0], beams, made)
        if made == beams.max_new or not bool(finished.open.any()):
            break
        if made == 1:
            state = state.branch(beams.width) if beams.width > 1 else state
        # On a GPU the question whether the order changed would cost more than the copy.
        elif index.device.type != "cpu" or not torch.equal(index, torch.arange(len(logits))):
            state = state.move(index, made - 1)
        logits, state = advance(step, running.ids[:, :, -1].reshape(-1, 1), state, own=made > 1)
    return _hypotheses(finished, eos, beams.returned)


def _extend(
    logits: Tensor, running: _Running, beams: Beams, ends: Tensor, made: int, prompt: Int[Tensor, "B P"]
) -> _Candidates:
    """The best continuations by one token. Only each beam's best go into the comparison, not beams x vocabulary."""
    batch, beam = running.score.shape
    # So many that `width` are left to go on when all end that may.
    count = beams.width * (1 + len(ends))
    total = logits.logsumexp(1, keepdim=True)
    if running.used is not None:
        logits, total = penalise(logits - total, running.used, beams.repetition_penalty), torch.zeros_like(total)
    if beams.no_repeat_ngram:
        past = torch.cat([prompt.repeat_interleave(beam, 0), running.ids.flatten(0, 1)], 1)
        logits = without_repeats(logits, past, beams.no_repeat_ngram)
    early = made <= beams.min_new  # then end tokens do not count, so there must be others in their place
    score, token = logits.topk(min(count + len(ends) if early else count, logits.shape[1]), dim=1)
    if early:
        score = score.masked_fill((token[..., None] == ends).any(2), -torch.inf)
    each = score.shape[1]
    score, token = (score - total).view(batch, beam, each) + running.score[..., None], token.view(batch, -1)
    missing = max(0, count - beam * each)  # a small vocabulary has not so many at first
    score, place = pad(score.flatten(1), (0, missing), value=-torch.inf).topk(count, dim=1)
    source = (place // each).clamp_max(beam - 1)
    last = pad(token, (0, missing)).gather(1, place)
    return _Candidates(score, torch.cat([_pick(running.ids, source), last[..., None]], 2), source)


def _pick(x: Int[Tensor, "B R N"], index: Int[Tensor, "B K"]) -> Int[Tensor, "B K N"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _ended(ids: Tensor, ends: Tensor, last: bool, stop: Stop | None) -> Bool[Tensor, "B K"]:
    """Candidates that are finished: by an end token, by `stop`, or because there is no more time."""
    ended = (ids[:, :, -1:] == ends).any(2) | last
    if stop is not None:
        ended = ended | torch.tensor([[stop(row) for row in rows] for rows in ids.tolist()], device=ids.device)
    return ended


def _go_on(found: _Candidates, ended: Tensor, before: _Running, width: int) -> tuple[_Running, Int[Tensor, "S"]]:
    """The best that have not ended, and which row of the batch each of them continues."""
    score, place = found.score.masked_fill(ended, -torch.inf).topk(width, dim=1)
    batch, beam = before.score.shape
    first = torch.arange(batch, device=place.device)[:, None] * beam
    index = (first + found.source.gather(1, place)).flatten()
    ids = _pick(found.ids, place)
    used = None if before.used is None else before.used[index].scatter_(1, ids[:, :, -1].reshape(-1, 1), True)
    return _Running(score, ids, used), index


def _finish(before: _Finished, found: _Candidates, ended: Tensor, ends: Tensor, beams: Beams, made: int) -> _Finished:
    """The best of those that were finished and those that ended now."""
    # Only the best `width` candidates may end: the others are there to go on in their place.
    may = ended & before.open[:, None] & (torch.arange(ended.shape[1], device=ended.device) < beams.width)
    score = beams.normalised(found.score, made).masked_fill(~may, -torch.inf)
    score, place = torch.cat([before.score, score], 1).topk(beams.width, dim=1)
    longer = torch.cat([before.ids, ends[0].expand(*before.score.shape, 1)], 2)
    return _Finished(score, _pick(torch.cat([longer, found.ids], 1), place), before.open)


def _close(finished: _Finished, best: Float[Tensor, "B"], beams: Beams, made: int) -> _Finished:
    """Closes rows whose running beams, the best of which is given, are no longer expected to matter."""
    worst = finished.score[:, -1]
    if beams.early_stopping is True:
        return finished._replace(open=finished.open & worst.isneginf() & ~best.isneginf())
    late = beams.early_stopping == "never" and beams.length_penalty > 0
    hope = beams.normalised(best, beams.max_new if late else made)
    return finished._replace(open=finished.open & (hope > worst))


def _hypotheses(finished: _Finished, eos: int | Sequence[int], returned: int) -> list[list[Hypothesis]]:
    rows = [until_end(ids[:returned], eos) for ids in finished.ids]
    scores: list[list[float]] = finished.score[:, :returned].tolist()
    return [
        [Hypothesis(ids, score) for ids, score in zip(*row, strict=True) if score > -math.inf]
        for row in zip(rows, scores, strict=True)
    ]
