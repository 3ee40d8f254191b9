"""What a model writes about pictures: captions of a batch, and answers in conversations, by any way of decoding.

Letters: B images, K images of all conversations, M conversations, P prompt tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.data.batch import pad
from vlm.data.encode import caption_encoder, ends
from vlm.data.reply import apart
from vlm.data.talk import Talk
from vlm.data.talk_batch import TalkForm
from vlm.data.template import Template
from vlm.data.text import Encoded, Tokenizer
from vlm.model.beam import Beams, search
from vlm.model.generate import Decoding, Dice, Sampling, generate, stream
from vlm.model.transcribe import OneLine, StopStrings, Transcript, one_line
from vlm.model.vlm import Seen, VisionLanguageModel, last_valid
from vlm.nn.state import State

Finish = Literal["stop", "length"]  # the model ended it, or it has as many tokens as it may


class Caption(NamedTuple):
    """One of several texts about an image; `score` as in `Hypothesis`, None where it was not searched for.

    `tokens`: what was written, without its beginning and its end token.
    """

    text: str
    score: float | None
    tokens: int
    finish: Finish


def describe(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: Float[Tensor, "B 3 H W"] | Float[Tensor, "B N C"],
    template: str | Template,
    max_tokens: int,
    decoding: Decoding,
    generator: Dice | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """One caption per image, on one line, whatever was drawn: greedy or sampled (`Sampling`), or the best of `Beams`.

    `images`: as of `VisionLanguageModel.encode`. `template` is the run's `data.template`, of which the part before
    {text} is given. `stop`: strings before which a caption ends, beside the template's own. ValueError for more tokens
    than the model was built for.
    """
    rows = describe_several(model, tokenizer, images, template, max_tokens, decoding, generator, stop)
    return [row[0].text for row in rows]


def describe_several(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: Float[Tensor, "B 3 H W"] | Float[Tensor, "B N C"],
    template: str | Template,
    max_tokens: int,
    decoding: Decoding,
    generator: Dice | None = None,
    stop: Sequence[str] = (),
    begun: str = "",
    draws: int = 1,
) -> list[list[Caption]]:
    """Captions of each image: the best `returned` of `Beams`, best first, or `draws` by any other way of decoding.

    `begun`: the first words of every caption. A generator of each row: of the first image's draws, then the second's.
    Further arguments as in `describe`.
    """
    start = _start(model, tokenizer, images, template, max_tokens, decoding, begun)
    end = _end(tokenizer, template, model, stop, begun)
    rows = _several(model, tokenizer, start, end, decoding, generator, draws)
    return [[caption._replace(text=one_line(caption.text)) for caption in row] for row in rows]


def describe_live(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: Float[Tensor, "B 3 H W"],
    template: str | Template,
    max_tokens: int,
    sampling: Sampling,
    generator: Dice | None = None,
    stop: Sequence[str] = (),
) -> Iterator[list[str]]:
    """What can be printed of each caption after each token; the pieces of a row join to what `describe` gives."""
    start, end = (
        _start(model, tokenizer, images, template, max_tokens, sampling),
        _end(tokenizer, template, model, stop),
    )
    lines = [OneLine() for _ in images]
    for pieces in _live(model, tokenizer, start, end, sampling, generator):
        yield [line.push(piece) for line, piece in zip(lines, pieces, strict=True)]


def answer(
    model: VisionLanguageModel,
    form: TalkForm,
    talks: Sequence[Talk],
    images: Float[Tensor, "K 3 H W"] | Float[Tensor, "K N C"] | None,
    decoding: Decoding,
    generator: Dice | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """The answer to the last question of each talk, with its line breaks; the talks may be of any length.

    `form`: as in training (`vlm.build_data.talk_form`). `images`: of all talks in order, as they show them; None: none.
    What is answered does not depend on which talks are answered together. ValueError: other than K images shown, a talk
    that ends with an answer.
    """
    return [row[0].text for row in answer_several(model, form, talks, images, decoding, generator, stop)]


def answer_several(
    model: VisionLanguageModel,
    form: TalkForm,
    talks: Sequence[Talk],
    images: Float[Tensor, "K 3 H W"] | Float[Tensor, "K N C"] | None,
    decoding: Decoding,
    generator: Dice | None = None,
    stop: Sequence[str] = (),
    begun: str = "",
    draws: int = 1,
) -> list[list[Caption]]:
    """Answers to each talk, with their line breaks; arguments as in `answer` and `describe_several`."""
    start = _asked(model, form, talks, images, begun)
    end = _end(form.tokenizer, form.template, model, stop, begun)
    rows = _several(model, form.tokenizer, start, end, decoding, generator, draws)
    return [[caption._replace(text=caption.text.strip()) for caption in row] for row in rows]


def answer_live(
    model: VisionLanguageModel,
    form: TalkForm,
    talks: Sequence[Talk],
    images: Float[Tensor, "K 3 H W"] | Float[Tensor, "K N C"] | None,
    sampling: Sampling,
    generator: Dice | None = None,
    stop: Sequence[str] = (),
) -> Iterator[list[str]]:
    """What can be printed of each answer after each token; but for white space at the ends they join to `answer`'s."""
    start = _asked(model, form, talks, images)
    end = _end(form.tokenizer, form.template, model, stop)
    return _live(model, form.tokenizer, start, end, sampling, generator)


class _Start(NamedTuple):
    """What decoding begins with, in its order of arguments."""

    logits: Float[Tensor, "B V"]
    state: State
    prompt: Int[Tensor, "B P"]

    def times(self, draws: int) -> "_Start":
        """Every row so many times."""
        index = torch.arange(len(self.logits), device=self.logits.device).repeat_interleave(draws)
        return self if draws == 1 else _Start(self.logits[index], self.state.reorder(index), self.prompt[index])


class _End(NamedTuple):
    """What ends a text: any of these tokens, and a rule on what they say; `begun`: tokens of its first words."""

    ids: list[int]
    rule: StopStrings | None
    begun: list[int]

    def text(self, tokenizer: Tokenizer, ids: list[int]) -> str:
        """Of the tokens of a row, up to its end."""
        first = tokenizer.decode(self.begun) if self.begun else ""
        rest = tokenizer.decode(self.begun + ids).removeprefix(first)
        return first + (rest if self.rule is None else self.rule.cut(rest))

    def reason(self, ids: list[int], longest: int) -> Finish:
        """Why a row ended. One that was cut has all its tokens, none an end token, and says no stop string."""
        cut = len(ids) >= longest and (self.rule is None or not self.rule(ids))
        return "length" if cut else "stop"


def _several(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    start: _Start,
    end: _End,
    how: Decoding,
    generator: Dice | None,
    draws: int,
) -> list[list[Caption]]:
    found: list[list[tuple[list[int], float | None]]]
    if isinstance(how, Beams):
        rows = search(model.proceed, *start, end.ids, how, end.rule)
        found = [[(best.ids, best.score) for best in row] or [([], None)] for row in rows]
    else:
        texts = generate(model.proceed, *start.times(draws), end.ids, how, generator, end.rule)
        found = [[(ids, None) for ids in texts[first : first + draws]] for first in range(0, len(texts), draws)]
    return [
        [Caption(end.text(tokenizer, ids), score, len(ids), end.reason(ids, how.max_new)) for ids, score in row]
        for row in found
    ]


@torch.no_grad()
def _start(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: Tensor,
    template: str | Template,
    max_tokens: int,
    how: Decoding,
    begun: str = "",
) -> _Start:
    prompt = _prompt(model, tokenizer, template, max_tokens, begun)
    before = 0 if not begun else len(prompt.ids) - 1
    if model.language is None and before + how.max_new > max_tokens:
        after = f" after the {before} that it begins with" if before else ""
        raise ValueError(f"max_new={how.max_new}{after}: this Q-Former was built for texts of {max_tokens} tokens")
    return _read(model, tokenizer, [prompt] * len(images), model.see(images), images.device)


@torch.no_grad()
def _asked(
    model: VisionLanguageModel, form: TalkForm, talks: Sequence[Talk], images: Tensor | None, begun: str = ""
) -> _Start:
    prompts = [form.start(talk, begun) for talk in talks]
    shown, given = sum(prompt.text.images for prompt in prompts), 0 if images is None else len(images)
    if shown != given:
        raise ValueError(f"{given} images for conversations that show {shown}")
    beside = [one for prompt in prompts for one in prompt.instructions]
    device = next(model.parameters()).device
    seen = None
    if images is not None and shown:
        reads = None if form.reader is None else pad(beside, form.reader.tokenizer.pad).to(device)
        seen = model.see(images, reads)
    return _read(model, form.tokenizer, [prompt.text for prompt in prompts], seen, device)


def _read(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    seen: Seen | None,
    device: torch.device,
) -> _Start:
    text = pad(prompts, tokenizer.pad, side="left").to(device)
    out = model.write(seen, text)
    said = text.written
    logits = model.logits(last_valid(out.hidden, said.valid))
    return _Start(logits, out.state, torch.where(said.valid, said.ids, -1))


def _prompt(
    model: VisionLanguageModel, tokenizer: Tokenizer, template: str | Template, max_tokens: int, begun: str
) -> Encoded:
    if model.language is None:
        ids = [tokenizer.dec, *(tokenizer.encode(begun.strip()) if begun else [])]
        return Encoded(ids, ids)
    prompt = caption_encoder(tokenizer, template, model.image_tokens, max_tokens).begun(begun)
    return prompt if model.reply_start is None else apart(prompt, model.reply_start, tokenizer.eos)


def _end(
    tokenizer: Tokenizer, template: str | Template, model: VisionLanguageModel, stop: Sequence[str], begun: str = ""
) -> _End:
    ids, strings = (list(tokenizer.ends), []) if model.language is None else ends(tokenizer, Template.of(template))
    every = [*strings, *stop]
    first = tokenizer.encode(begun.strip()) if begun else []
    return _End(ids, StopStrings(tokenizer, every) if every else None, first)


def _live(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    start: _Start,
    end: _End,
    sampling: Sampling,
    generator: Dice | None,
) -> Iterator[list[str]]:
    texts = [Transcript(tokenizer, end.rule) for _ in start.logits]
    for chosen in stream(model.proceed, *start, end.ids, sampling, generator, end.rule):
        ids: list[int] = chosen.tolist()
        yield [text.push(token) for text, token in zip(texts, ids, strict=True)]
    yield [text.close() for text in texts]
