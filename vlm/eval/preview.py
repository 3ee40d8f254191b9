"""`vlm shards preview`: a few samples as the model sees them, token by token and as a contact sheet."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm import build, build_data
from vlm.config import schema
from vlm.data.batch import Batch, Text, collate
from vlm.data.image import BadSample, ImageTransform, decode
from vlm.data.pictures import Pictures
from vlm.data.shards import RawSample, Sample
from vlm.data.talk_batch import collate_talks
from vlm.data.text import Tokenizer
from vlm.eval.doctor import any_shards, read_run, read_tokenizer
from vlm.eval.sheet import Cell, draw
from vlm.model.vlm import need
from vlm.nn.tokens import IGNORE, IMAGE_ID

SUFFIXES = (".png", ".jpg", ".jpeg")


def preview(shards: Sequence[str], config: Path | None, out: Path, count: int = 12, texts: int = 3) -> None:
    """Prints `texts` samples and writes a sheet of `count`, spread evenly over the shards; without a config, captions.

    Errors: `out` is no PNG or JPEG, or its folder is missing; shards without usable samples.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {out}: name a file that ends in {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first")
    run = None if config is None else read_run(config)
    source = any_shards(schema.PairData(train=list(shards)) if run is None else run.pictures, shards)
    transform: ImageTransform | None = None
    show: Callable[[_Shown], str] = _captions
    if run is not None and config is not None:
        tokenizer = read_tokenizer(run, config, shards)
        with torch.device("meta"):  # sizes only: no weights, no memory
            model = build.model(run, tokenizer)
        transform = need(model.vision, "image encoder").transform
        image_tokens, reply_start = model.image_tokens, model.reply_start
        show = partial(_tokens, run, tokenizer, image_tokens, reply_start)
    cells, samples = _chosen(source, transform, count)
    for sample in samples[:texts]:
        print(show(sample))
    draw(cells).save(out)
    print(f"{len(cells)} pictures with their captions: {out}")


@dataclass(frozen=True)
class _Shown:
    """A sample, and its pictures as the transform leaves them."""

    raw: RawSample
    pixels: list[Tensor]


def _captions(shown: _Shown) -> str:
    return f"{shown.raw.key}: {' | '.join(shown.raw.captions)}"


def _tokens(run: schema.Run, tokenizer: Tokenizer, image_tokens: int, reply_start: int | None, shown: _Shown) -> str:
    """The text as the model reads it; of a conversation, also what the Q-Former reads."""
    raw, form = shown.raw, build_data.talk_form(run, tokenizer, image_tokens, reply_start)
    if form is None:
        first = Sample(raw.key, raw.id, shown.pixels[0], raw.captions[:1])
        template, longest = build_data.caption_template(run), run.pictures.max_tokens
        return as_text(collate([first], tokenizer, longest, template, image_tokens, reply_start), tokenizer)
    left = iter(shown.pixels)
    try:
        sample = form.drawn(form.sample(raw, lambda _: next(left)), None)
    except BadSample as bad:
        return f"{raw.key}: unusable: {bad}\n"
    size = (1, 1)  # of the blank picture where there is none
    reader = None if form.reader is None else form.reader.tokenizer
    return as_text(collate_talks([sample], form, size), tokenizer, reader)


def _chosen(source: Pictures, transform: ImageTransform | None, count: int) -> tuple[list[Cell], list[_Shown]]:
    """Usable samples, evenly spread; pictures as the transform leaves them, or whole."""
    cells, samples = [], []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist():
        try:
            raw = source.raw(index)
            images = [decode(image) for image in raw.images]
        except BadSample as bad:
            cells.append(Cell(source.key(index), [f"unusable: {bad}"], None))
            continue
        whole = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        pixels = whole if transform is None else [transform.pixels(image) for image in images]
        for number, picture in enumerate(pixels):
            name = raw.key if len(pixels) == 1 else f"{raw.key} ({number + 1} of {len(pixels)})"
            cells.append(Cell(name, raw.captions, Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())))
        if not pixels:
            cells.append(Cell(raw.key, raw.captions, None))
        samples.append(_Shown(raw, pixels))
    return cells, samples


def as_text(batch: Batch, tokenizer: Tokenizer, reader: Tokenizer | None = None) -> str:
    """The first text of a batch, a line for each token: what it says, its id, whether the loss counts it.

    `reader`: of the instructions that stand beside the pictures; one more line for each.
    """
    text = batch.captions if batch.prompts is None else batch.prompts
    replies = [] if text.reply is None else _rows(text.reply, tokenizer)
    rows = [("token", "id", "supervised"), *_rows(text, tokenizer), *replies]
    width = max(len(token) for token, _, _ in rows)
    lines = [f"  {token:<{width}}  {number:>7}  {supervised}" for token, number, supervised in rows]
    beside = [] if batch.instructions is None or reader is None else batch.instructions.ids.tolist()
    lines += [f"  beside picture {number + 1}: {_said(reader, ids)}" for number, ids in enumerate(beside) if reader]
    return "\n".join([f"{batch.keys[0]}: {batch.strings[0]}", *lines, ""])


def _said(reader: Tokenizer, ids: list[int]) -> str:
    return " ".join(spelt(reader, token) for token in ids)


def _rows(text: Text, tokenizer: Tokenizer) -> Iterator[tuple[str, str, str]]:
    ids, labels = text.ids[0].tolist(), text.labels[0].tolist()
    for (token, supervised), run in groupby(zip(ids, (label != IGNORE for label in labels), strict=True)):
        length = len(list(run))
        name = "<image>" if token == IMAGE_ID else spelt(tokenizer, token)
        times = f" x {length}" if length > 1 and token == IMAGE_ID else ""
        for _ in range(1 if times else length):
            yield name + times, "" if token == IMAGE_ID else str(token), "yes" if supervised else "-"


def spelt(tokenizer: Tokenizer, token: int) -> str:
    """A token for the eye: ␣ is a space; what is not ASCII is decoded, ? where it is part of a character."""
    name = str(tokenizer.inner.id_to_token(token))
    plain = name.replace("Ġ", "␣").replace("▁", "␣").replace("</w>", "␣")
    if plain.replace("␣", "").isascii():
        return plain
    return ("␣" if plain.startswith("␣") else "") + tokenizer.decode([token]).replace("\ufffd", "?")
