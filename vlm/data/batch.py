"""Samples to one batch: pixels, padded texts, and which text describes which image.

Letters: B images, M texts, T tokens, H height, W width.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.data.encode import caption_encoder
from vlm.data.reply import apart
from vlm.data.shards import Sample
from vlm.data.template import Template
from vlm.data.text import Encoded, Tokenizer, encode_caption
from vlm.nn.tokens import IGNORE


@dataclass(frozen=True)
class Text:
    """Padded token ids: `valid` is False on padding, `labels` is IGNORE where nothing is supervised.

    `full`: known without looking that nothing is padding, which spares attention its mask. `reply`: what an
    encoder-decoder writes after reading this; the supervised tokens are there then.
    """

    ids: Int[Tensor, "M T"]
    valid: Bool[Tensor, "M T"]
    labels: Int[Tensor, "M T"]
    full: bool = False
    reply: "Text | None" = None

    @property
    def written(self) -> "Text":
        """The text whose tokens are predicted: the reply where there is one."""
        return self if self.reply is None else self.reply

    def to(self, device: torch.device | str) -> "Text":
        """The same on another device."""
        ids, valid, labels = (part.to(device, non_blocking=True) for part in (self.ids, self.valid, self.labels))
        return Text(ids, valid, labels, self.full, None if self.reply is None else self.reply.to(device))

    def select(self, index: Int[Tensor, "R"]) -> "Text":
        """Rows picked by index, with repeats."""
        reply = None if self.reply is None else self.reply.select(index)
        return Text(self.ids[index], self.valid[index], self.labels[index], self.full, reply)


@dataclass(frozen=True)
class Batch:
    """B images with M texts drawn from them; a text is positive for all images it describes, not only for its owner.

    Of conversations: B images of all of them, in the order of `shown`; M texts, whose keys `keys` are.
    """

    keys: list[str]  # B
    images: Tensor | None  # B 3 H W: 0..255, uint8 unless a random change made it float; B N C: finished features
    image_ids: list[str]  # B: samples of equal id show the same thing
    owner: Int[Tensor, "M"]  # the image each text was drawn from
    strings: list[str]  # M
    captions: Text
    prompts: Text | None
    positive: Bool[Tensor, "B M"]
    known: list[frozenset[str]] = field(default_factory=list)  # B: every caption of a sample, drawn or not
    normalize: Callable[[Tensor], Tensor] | None = None  # what the encoder takes, from `images`; None: they are it
    shown: Int[Tensor, "K"] | None = None  # the images in the order in which prompts show them; None: `owner`
    instructions: Text | None = None  # K: what a Q-Former reads beside each of these, in its own vocabulary
    places: list[int] = field(default_factory=list)  # B: numbers in the source, of samples that are taken in order

    @staticmethod
    def of_text(text: Text) -> "Batch":
        """Texts without pictures."""
        nothing = torch.zeros(0, len(text.ids), dtype=torch.bool)
        owner = torch.arange(len(text.ids))
        return Batch([], None, [], owner, [], captions=text, prompts=text, positive=nothing)

    @property
    def size(self) -> int:
        """Samples: pictures, or texts where there are none."""
        return len(self.owner) if self.images is None else len(self.images)

    @property
    def pixels(self) -> Tensor:
        """The images of a batch that has them."""
        assert self.images is not None, "a batch of texts alone"
        return self.images

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device, where its pictures become what the encoder takes: bytes are moved sooner."""
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        if images is not None and self.normalize is not None:
            images = self.normalize(images)
        return replace(
            self,
            images=images,
            normalize=None,
            owner=self.owner.to(device, non_blocking=True),
            captions=self.captions.to(device),
            prompts=None if self.prompts is None else self.prompts.to(device),
            positive=self.positive.to(device, non_blocking=True),
            shown=None if self.shown is None else self.shown.to(device, non_blocking=True),
            instructions=None if self.instructions is None else self.instructions.to(device),
        )


def pad(encoded: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> Text:
    """Texts of different length as one rectangle, filled up on `side` (left: for generation); replies likewise."""
    lengths = np.array([len(text.ids) for text in encoded], dtype=np.int64)
    width = int(lengths.max(initial=0))
    place, gaps = np.arange(width), (width - lengths)[:, None]
    valid = place < lengths[:, None] if side == "right" else place >= gaps

    def rows(parts: Iterable[list[int]], fill: int) -> Int[Tensor, "M T"]:
        filled = np.full(valid.shape, fill, dtype=np.int64)
        filled[valid] = np.fromiter(chain.from_iterable(parts), np.int64, int(lengths.sum()))
        return torch.from_numpy(filled)

    ids, labels = rows((text.ids for text in encoded), pad_id), rows((text.labels for text in encoded), IGNORE)
    replies = [text.reply for text in encoded if text.reply is not None]
    assert len(replies) in (0, len(encoded)), "all texts of a batch have a reply, or none"
    reply = pad(replies, pad_id, side) if replies else None
    return Text(ids, torch.from_numpy(valid), labels, bool(valid.all()), reply)


def collate(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    max_tokens: int,
    template: str | Template | None,
    image_tokens: int,
    reply_start: int | None = None,
) -> Batch:
    """One batch of all captions of the samples; prompts only with a `template`. Images must be of one size.

    `reply_start`: the token with which answers begin where they stand apart from the prompts (encoder-decoders).
    ValueError when no token is supervised: such a batch would train nothing and its mean loss is 0 / 0.
    """
    strings = [caption for sample in samples for caption in sample.captions]
    owner = [index for index, sample in enumerate(samples) for _ in sample.captions]
    captions = pad([encode_caption(tokenizer, text, max_tokens) for text in strings], tokenizer.pad)
    prompts = None
    if template is not None:
        encode = caption_encoder(tokenizer, template, image_tokens, max_tokens)
        filled = [encode(text) for text in strings]
        if reply_start is not None:
            filled = [apart(text, reply_start, tokenizer.eos) for text in filled]
        prompts = pad(filled, tokenizer.pad)
    if not (captions.labels != IGNORE).any():
        raise ValueError(
            f"no caption in a batch of {len(samples)} samples: nothing to learn; set captions_per_image >= 1"
        )
    ids, known = [sample.id for sample in samples], [sample.known.union(sample.captions) for sample in samples]
    return Batch(
        keys=[sample.key for sample in samples],
        images=torch.stack([sample.pixels for sample in samples if isinstance(sample.pixels, Tensor)]),
        image_ids=ids,
        owner=torch.tensor(owner),
        strings=strings,
        captions=captions,
        prompts=prompts,
        positive=positives(ids, known, [ids[index] for index in owner], strings),
        known=known,
    )


def positives(
    image_ids: Sequence[Hashable],
    known: Sequence[Collection[Hashable]],
    owners: Sequence[Hashable],
    texts: Sequence[Hashable],
) -> Bool[Tensor, "B M"]:
    """Which text describes which image. `known`: all captions of each image; `owners`: the id of each text's image."""
    numbers: dict[Hashable, int] = {}
    rows, columns = (torch.tensor([numbers.setdefault(x, len(numbers)) for x in ids]) for ids in (image_ids, owners))
    positive = rows[:, None] == columns
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        places[text].append(place)
    pairs = [(row, place) for row, mine in enumerate(known) for text in mine for place in places.get(text, ())]
    if pairs:
        positive[tuple(torch.tensor(pairs).T)] = True
    return positive
