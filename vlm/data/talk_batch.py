"""Conversations to a batch: pictures flat, in the order in which the texts show them.

Letters: K pictures of all conversations, M conversations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlm.data.batch import Batch, pad
from vlm.data.encode import encode_conversation, encode_instruction, encode_question, instructions
from vlm.data.image import BadSample
from vlm.data.reply import apart
from vlm.data.shards import Prompt, RawSample, Sample
from vlm.data.talk import Talk, ask
from vlm.data.template import Template
from vlm.data.text import Encoded, Tokenizer

_UNCUT = 2**40


@dataclass(frozen=True)
class Reader:
    """How a Q-Former reads the question beside the picture (InstructBLIP): in its own vocabulary, the last words."""

    tokenizer: Tokenizer
    max_tokens: int

    def __call__(self, talk: Talk) -> tuple[Encoded, ...]:
        """Of each picture of a talk."""
        return tuple(encode_instruction(self.tokenizer, text, self.max_tokens) for text in instructions(talk))

    @property
    def blank(self) -> Encoded:
        """A question without words."""
        return encode_instruction(self.tokenizer, "", self.max_tokens)


@dataclass(frozen=True)
class TalkForm:
    """How conversations become text: see `encode_conversation`.

    `turns`: at most so many answers of each. `system`: in place of the template's, of those that have none themselves.
    `questions`: what is asked about a picture that has captions; one is drawn for each sample.
    """

    tokenizer: Tokenizer
    template: Template
    image_tokens: int
    max_tokens: int
    turns: int | None = None
    system: str | None = None
    questions: tuple[str, ...] = ()
    reader: Reader | None = None
    reply_start: int | None = None  # of an encoder-decoder, which reads all but the last answer

    def __post_init__(self) -> None:
        """ValueError: a question that leaves no room for an answer."""
        for question in self.questions:
            try:
                self.prompt(ask(question, 1, "a"))
            except BadSample as bad:
                raise ValueError(f"data.questions: {question!r}: {bad}; raise data.max_tokens") from None

    def prompt(self, talk: Talk) -> Prompt:
        """For training: with its answers. BadSample: no room for any."""
        whole = self._prepared(talk)
        text = encode_conversation(self.tokenizer, self.template, whole, self.image_tokens, self.max_tokens)
        text = self._apart(text)
        return Prompt(text, () if self.reader is None else self.reader(whole)[: text.images])

    def start(self, talk: Talk, begun: str = "") -> Prompt:
        """For an answer to the last question, to which there is none yet but its first words, if any."""
        whole = self._prepared(talk, answers=False)
        text = self._apart(encode_question(self.tokenizer, self.template, whole, self.image_tokens, begun))
        return Prompt(text, () if self.reader is None else self.reader(whole))

    def cuts(self, talk: Talk) -> bool:
        """Whether an answer loses words in training. BadSample: all of them do."""
        form = replace(self, reply_start=None)  # answers stand in the text, also those of an encoder-decoder
        return len(form.prompt(talk).text.ids) < len(replace(form, max_tokens=_UNCUT).prompt(talk).text.ids)

    def sample(self, raw: RawSample, read: Callable[[bytes], Tensor]) -> Sample:
        """With the pictures that its text shows; without a prompt where a question is yet to be drawn. BadSample."""
        if raw.talk is not None:
            prompt = self.prompt(raw.talk)
            pictures = [read(image) for image in raw.images[: prompt.text.images]]
            return Sample(raw.key, raw.id, pictures, raw.talk.answers, prompt=prompt)
        if not self.questions:
            raise BadSample("no conversation", "only captions; data.questions says what they answer")
        return Sample(raw.key, raw.id, [read(raw.image)], raw.captions)

    def drawn(self, sample: Sample, random: np.random.Generator | None) -> Sample:
        """A caption as the answer to a question, both drawn; the first of each without `random`."""
        if sample.prompt is not None:
            return sample
        caption, question = (
            choices[0 if random is None else int(random.integers(len(choices)))]
            for choices in (sample.captions, self.questions)
        )
        return replace(sample, captions=[caption], prompt=self.prompt(ask(question, 1, caption)))

    def _apart(self, text: Encoded) -> Encoded:
        return text if self.reply_start is None else apart(text, self.reply_start, self.tokenizer.eos)

    def _prepared(self, talk: Talk, answers: bool = True) -> Talk:
        if talk.system is None and self.system is not None:
            talk = replace(talk, system=self.system)
        if not self.template.shows_images and talk.images:
            raise BadSample("no place for a picture", "the template has none")
        return talk if self.turns is None or not answers else talk.first(self.turns)


def collate_talks(samples: Sequence[Sample], form: TalkForm, size: tuple[int, int]) -> Batch:
    """One batch of the samples' prompts. `size`: height and width of the pictures.

    A batch that shows none still holds one, blank: so all parts of the model take part in every pass, which processes
    that exchange gradients rely on.
    """
    prompts = [sample.prompt for sample in samples if sample.prompt is not None]
    assert len(prompts) == len(samples), "a question was not drawn"
    pictures = [picture for sample in samples for picture in sample.pixels]
    ids = [sample.id for sample in samples for _ in sample.pixels]
    text = pad([prompt.text for prompt in prompts], form.tokenizer.pad)
    beside = [one for prompt in prompts for one in prompt.instructions]
    if form.reader is not None and not pictures:
        beside = [form.reader.blank]
    images = torch.stack(pictures) if pictures else torch.zeros(1, 3, *size, dtype=torch.uint8)
    return Batch(
        keys=[sample.key for sample in samples],
        images=images,
        image_ids=ids or [""],
        owner=torch.arange(len(samples)),
        strings=[" | ".join(sample.captions) for sample in samples],
        captions=text,
        prompts=text,
        positive=torch.zeros(len(images), len(samples), dtype=torch.bool),
        shown=torch.arange(len(pictures)),
        instructions=None if form.reader is None else pad(beside, form.reader.tokenizer.pad),
    )
