"""Decoding: greedy and sampled continuation of a batch, token by token or whole, for any model that offers `proceed`.

Letters: B rows, P prompt tokens, L tokens so far, F forbidden tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.nn.backend import default_for_few
from vlm.nn.state import State

Step = Callable[[Tensor, State], tuple[Tensor, State]]
Dice = torch.Generator | Sequence[torch.Generator]  # of all rows; or one of each, whose words then depend on no others
Stop = Callable[[list[int]], bool]  # asked about all new tokens of a row after each of them; True: the row ends here


@runtime_checkable
class Decoding(Protocol):
    """A way to continue a batch: `Sampling`, `Beams`, or one of the user's own."""

    @property
    def max_new(self) -> int:
        """Tokens of the longest continuation."""
        ...

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
        """As `generate`."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy. `no_repeat_ngram`: no so many in a row twice; 0: any."""

    max_new: int = 30
    min_new: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        """Refuses values that no decoding has, all named."""
        refuse(
            [
                *wrong_lengths(self.max_new, self.min_new),
                (not self.temperature >= 0, f"temperature={self.temperature}: 0 (greedy) or more"),
                (self.top_k is not None and self.top_k < 1, f"top_k={self.top_k}: at least 1"),
                (self.top_p is not None and not 0 < self.top_p <= 1, f"top_p={self.top_p}: above 0, at most 1"),
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
        """As `generate`."""
        columns = list(stream(step, logits, state, prompt, eos, self, generator, stop))
        return until_end(torch.stack(columns, 1), eos)


def wrong_lengths(max_new: int, min_new: int) -> list[tuple[bool, str]]:
    """What may be wrong with the number of new tokens, for `refuse`."""
    return [
        (max_new < 1, f"max_new={max_new}: at least 1"),
        (not 0 <= min_new <= max_new, f"min_new={min_new}: between 0 and max_new"),
    ]


def wrong_repeats(penalty: float, ngram: int) -> list[tuple[bool, str]]:
    """What may be wrong with the rules on repeated tokens, for `refuse`."""
    return [
        (not penalty > 0, f"repetition_penalty={penalty}: above 0"),
        (ngram < 0, f"no_repeat_ngram={ngram}: 0 (off) or more"),
    ]


def refuse(checks: Sequence[tuple[bool, str]]) -> None:
    """One ValueError with the messages of all checks that are True."""
    if wrong := [message for bad, message in checks if bad]:
        raise ValueError("; ".join(wrong))


def generate(
    step: Step,
    logits: Float[Tensor, "B V"],
    state: State,
    prompt: Int[Tensor, "B P"],
    eos: int | Sequence[int],
    decoding: Decoding,
    generator: Dice | None = None,
    stop: Stop | None = None,
) -> list[list[int]]:
    """New tokens of each row, up to and without its end token (any of `eos`); the best where several were found.

    `logits` and `state` are those after the prompt; `step` takes one token per row (B 1) and gives the next.
    `prompt` counts for the rules on repeated tokens only; negative ids in it (image placeholders, padding) do not.
    `stop` ends a row after the tokens that it says True to; these are kept. ValueError: logits that are no numbers.
    """
    if logits.isnan().any():
        raise ValueError("the model gives no numbers (NaN): its weights are damaged, or too large for their dtype")
    return decoding.unroll(step, logits, state, prompt, eos, generator, stop)


def stream(
    step: Step,
    logits: Float[Tensor, "B V"],
    state: State,
    prompt: Int[Tensor, "B P"],
    eos: int | Sequence[int],
    sampling: Sampling,
    generator: Dice | None = None,
    stop: Stop | None = None,
) -> Iterator[Int[Tensor, "B"]]:
    """Tokens as they are made, one per row; a row that has ended repeats the (first) end token.

    Arguments as in `generate`. Nothing is computed before it is asked for, nor after all rows have ended.
    """
    ends = end_tokens(eos, logits.device)
    used = said(prompt, logits) if sampling.repetition_penalty != 1.0 else None
    past = prompt
    running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    rows: list[list[int]] = [[] for _ in logits]
    chosen: Tensor
    for made in range(sampling.max_new):
        # Not a decorator: gradients are off here, but not in the caller's code between two tokens.
        with torch.no_grad():
            if made:
                logits, state = advance(step, chosen[:, None], state, own=made > 1)
            scores = without_repeats(logits.float(), past, sampling.no_repeat_ngram)
            chosen = choose(scores, used, sampling, ends if made < sampling.min_new else None, generator)
            chosen = torch.where(running, chosen, ends[0])
            running = running & (chosen[:, None] != ends).all(1)
            if stop is not None:
                running = _ask(stop, rows, chosen, running)
            if used is not None:
                used.scatter_(1, chosen[:, None], True)
            if sampling.no_repeat_ngram:
                past = torch.cat([past, chosen[:, None]], 1)
        yield chosen
        if not bool(running.any()):
            return


def advance(step: Step, ids: Int[Tensor, "B 1"], state: State, own: bool) -> tuple[Float[Tensor, "B V"], State]:
    """One step of a loop that keeps the newest state alone; `own`: made by that loop, so that it may be overwritten."""
    with default_for_few(len(ids)):
        return step(ids, state.disposable() if own else state)


def _ask(stop: Stop, rows: list[list[int]], chosen: Tensor, running: Tensor) -> Tensor:
    """Rows that still run after their new token, which is appended to their list."""
    goes_on: list[bool] = running.tolist()
    for row, token in enumerate(chosen.tolist()):
        if goes_on[row]:
            rows[row].append(token)
            goes_on[row] = not stop(rows[row])
    return torch.tensor(goes_on, device=chosen.device)


def end_tokens(eos: int | Sequence[int], device: torch.device) -> Int[Tensor, "E"]:
    """One id or several, as a tensor. ValueError for none."""
    ends = [eos] if isinstance(eos, int) else list(eos)
    if not ends:
        raise ValueError("eos=[]: at least one end token; to write on after it, raise min_new")
    return torch.tensor(ends, device=device)


def until_end(tokens: Int[Tensor, "B N"], eos: int | Sequence[int]) -> list[list[int]]:
    """Rows up to and without their first end token."""
    ends = {eos} if isinstance(eos, int) else set(eos)
    rows: list[list[int]] = tokens.tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def said(prompt: Int[Tensor, "B P"], logits: Float[Tensor, "B V"]) -> Bool[Tensor, "B V"]:
    """Marks each row's prompt tokens in the vocabulary; negative ids mark nothing."""
    # Counted, not set: a negative id would take back what a real id 0 in the same row had marked.
    return torch.zeros_like(logits, dtype=torch.long).scatter_add_(1, prompt.clamp_min(0), (prompt >= 0).long()) > 0


def penalise(scores: Float[Tensor, "B V"], used: Bool[Tensor, "B V"], penalty: float) -> Float[Tensor, "B V"]:
    """Scores with those of used tokens moved away from being chosen (arXiv 1909.05858, section 4.1)."""
    return torch.where(used, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def without_repeats(logits: Float[Tensor, "B V"], past: Int[Tensor, "B L"], size: int) -> Float[Tensor, "B V"]:
    """Logits of -inf where a token would complete `size` tokens that stand together in a row's past; 0: as they are."""
    if not 0 < size <= past.shape[1]:
        return logits
    windows = past.unfold(1, size, 1)
    again = (windows[:, :, :-1] == past[:, None, past.shape[1] - size + 1 :]).all(2) & (windows >= 0).all(2)
    # Counted, not set: a window that does not match must not take back what another forbids.
    counts = torch.zeros_like(logits, dtype=torch.long)
    return logits.masked_fill(counts.scatter_add_(1, windows[:, :, -1].clamp_min(0), again.long()) > 0, -torch.inf)


def choose(
    logits: Float[Tensor, "B V"],
    used: Bool[Tensor, "B V"] | None,
    sampling: Sampling,
    forbidden: Int[Tensor, "F"] | None = None,
    generator: Dice | None = None,
) -> Int[Tensor, "B"]:
    """The next token of each row; `used` marks tokens that the repetition penalty acts on."""
    if used is not None and sampling.repetition_penalty != 1.0:
        logits = penalise(logits, used, sampling.repetition_penalty)
    if forbidden is not None:
        logits = logits.index_fill(1, forbidden, -torch.inf)
    if sampling.temperature == 0:
        return logits.argmax(1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None:
        logits = _nucleus(logits, sampling.top_p)
    probability = logits.softmax(1)
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(probability, 1, generator=generator)[:, 0]
    return _drawn_apart(probability, generator)


def _drawn_apart(probability: Float[Tensor, "B V"], dice: Sequence[torch.Generator]) -> Int[Tensor, "B"]:
    """A token of each row by its own generator: where its random number falls in the row's summed probabilities."""
    numbers = torch.stack([torch.rand(1, generator=die, dtype=torch.double, device=die.device) for die in dice])
    edges = probability.double().cumsum(1)
    # A token without probability ends where the one before it does, so that no number falls on it.
    return torch.searchsorted(edges, numbers.to(edges.device) * edges[:, -1:], right=True)[:, 0]


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    ranked, order = logits.sort(dim=1, descending=True)
    probability = ranked.softmax(1)
    # A token stays if what is more likely than it does not reach top_p yet: the first one always does.
    outside = probability.cumsum(1) - probability >= top_p
    return logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
