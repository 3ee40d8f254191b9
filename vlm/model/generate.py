"""Decoding: greedy and sampled continuation of a batch, for any model that offers `proceed`.

Letters: B rows, P prompt tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.nn.state import State

Step = Callable[[Tensor, State], tuple[Tensor, State]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    max_new: int = 30
    min_new: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values that no decoding has, all named."""
        wrong = [
            message
            for bad, message in [
                (self.max_new < 1, f"max_new={self.max_new}: at least 1"),
                (not 0 <= self.min_new <= self.max_new, f"min_new={self.min_new}: between 0 and max_new"),
                (not self.temperature >= 0, f"temperature={self.temperature}: 0 (greedy) or more"),
                (self.top_k is not None and self.top_k < 1, f"top_k={self.top_k}: at least 1"),
                (self.top_p is not None and not 0 < self.top_p <= 1, f"top_p={self.top_p}: above 0, at most 1"),
                (not self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty}: above 0"),
            ]
            if bad
        ]
        if wrong:
            raise ValueError("; ".join(wrong))


@torch.no_grad()
def generate(
    step: Step,
    logits: Float[Tensor, "B V"],
    state: State,
    prompt: Int[Tensor, "B P"],
    eos: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """New tokens of each row, up to and without its end token.

    `logits` and `state` are those after the prompt; `step` takes one token per row (B 1) and gives the next.
    `prompt` counts for the repetition penalty only; negative ids in it (image placeholders, padding) do not.
    """
    # Counted, not set: a negative id would take back what a real id 0 in the same row had marked.
    used = torch.zeros_like(logits, dtype=torch.long).scatter_add_(1, prompt.clamp_min(0), (prompt >= 0).long()) > 0
    running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    columns: list[Tensor] = []
    for made in range(sampling.max_new):
        chosen = choose(logits.float(), used, sampling, eos if made < sampling.min_new else None, generator)
        chosen = torch.where(running, chosen, eos)
        columns.append(chosen)
        running = running & (chosen != eos)
        if made + 1 == sampling.max_new or not bool(running.any()):
            break
        used.scatter_(1, chosen[:, None], True)
        logits, state = step(chosen[:, None], state)
    rows: list[list[int]] = torch.stack(columns, 1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def choose(
    logits: Float[Tensor, "B V"],
    used: Bool[Tensor, "B V"],
    sampling: Sampling,
    forbidden: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B"]:
    """The next token of each row; `used` marks tokens that the repetition penalty (arXiv 1909.05858) acts on."""
    if sampling.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(used, penalised, logits)
    if forbidden is not None:
        logits = logits.clone()
        logits[:, forbidden] = -torch.inf
    if sampling.temperature == 0:
        return logits.argmax(1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None:
        logits = _nucleus(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    ranked, order = logits.sort(dim=1, descending=True)
    probability = ranked.softmax(1)
    # A token stays if what is more likely than it does not reach top_p yet: the first one always does.
    outside = probability.cumsum(1) - probability >= top_p
    return logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
