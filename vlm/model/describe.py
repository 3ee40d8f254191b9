"""Captions of a batch of images by any model that can write: a language model behind a connector, or a Q-Former itself.

Letters: B images, P prompt tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.data.batch import pad
from vlm.data.reply import apart
from vlm.data.text import Encoded, Tokenizer, encode_prompt
from vlm.model.beam import Beams, search
from vlm.model.generate import Decoding, Sampling, generate, stream
from vlm.model.transcribe import OneLine, StopStrings, Transcript, one_line
from vlm.model.vlm import VisionLanguageModel, last_valid
from vlm.nn.state import State


class Caption(NamedTuple):
    """One of several captions of an image; `score` as in `Hypothesis`."""

    text: str
    score: float


def describe(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: Float[Tensor, "B 3 H W"] | Float[Tensor, "B N C"],
    template: str,
    max_tokens: int,
    decoding: Decoding,
    generator: torch.Generator | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """One caption per image, on one line, whatever was drawn: greedy or sampled (`Sampling`), or the best of `Beams`.

    `images`: as of `VisionLanguageModel.encode`. `template` is the run's `data.prompt`, of which the part before {text}
    is given. `stop`: strings before which a caption ends. ValueError for more tokens than the model was built for.
    """
    start, rule = _start(model, tokenizer, images, template, max_tokens, decoding), _rule(tokenizer, stop)
    rows = generate(model.proceed, *start, tokenizer.eos, decoding, generator, rule)
    return [_text(tokenizer, rule, row) for row in rows]


def describe_several(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: Float[Tensor, "B 3 H W"],
    template: str,
    max_tokens: int,
    beams: Beams,
    stop: Sequence[str] = (),
) -> list[list[Caption]]:
    """The best `beams.returned` captions of each image, best first; arguments as in `describe`."""
    start, rule = _start(model, tokenizer, images, template, max_tokens, beams), _rule(tokenizer, stop)
    found = search(model.proceed, *start, tokenizer.eos, beams, rule)
    return [[Caption(_text(tokenizer, rule, ids), score) for ids, score in row] for row in found]


def describe_live(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: Float[Tensor, "B 3 H W"],
    template: str,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    stop: Sequence[str] = (),
) -> Iterator[list[str]]:
    """What can be printed of each caption after each token; the pieces of a row join to what `describe` gives."""
    start, rule = _start(model, tokenizer, images, template, max_tokens, sampling), _rule(tokenizer, stop)
    texts, lines = [Transcript(tokenizer, rule) for _ in images], [OneLine() for _ in images]
    for chosen in stream(model.proceed, *start, tokenizer.eos, sampling, generator, rule):
        ids: list[int] = chosen.tolist()
        yield [line.push(text.push(token)) for line, text, token in zip(lines, texts, ids, strict=True)]
    yield [line.push(text.close()) for line, text in zip(lines, texts, strict=True)]


class _Start(NamedTuple):
    """What decoding begins with, in its order of arguments."""

    logits: Float[Tensor, "B V"]
    state: State
    prompt: Int[Tensor, "B P"]


@torch.no_grad()
def _start(
    model: VisionLanguageModel, tokenizer: Tokenizer, images: Tensor, template: str, max_tokens: int, how: Decoding
) -> _Start:
    if model.language is None and how.max_new > max_tokens:
        raise ValueError(f"max_new={how.max_new}: this Q-Former was built for texts of {max_tokens} tokens")
    prompt = _prompt(model, tokenizer, template, max_tokens)
    text = pad([prompt] * len(images), tokenizer.pad, side="left").to(images.device)
    out = model.write(model.see(images), text)
    said = text.written
    logits = model.logits(last_valid(out.hidden, said.valid))
    return _Start(logits, out.state, torch.where(said.valid, said.ids, -1))


def _prompt(model: VisionLanguageModel, tokenizer: Tokenizer, template: str, max_tokens: int) -> Encoded:
    if model.language is None:
        return Encoded([tokenizer.dec], [tokenizer.dec])
    prompt = encode_prompt(tokenizer, template, None, model.image_tokens, max_tokens)
    return prompt if model.reply_start is None else apart(prompt, model.reply_start, tokenizer.eos)


def _rule(tokenizer: Tokenizer, stop: Sequence[str]) -> StopStrings | None:
    return StopStrings(tokenizer, stop) if stop else None


def _text(tokenizer: Tokenizer, rule: StopStrings | None, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    return one_line(text if rule is None else rule.cut(text))
