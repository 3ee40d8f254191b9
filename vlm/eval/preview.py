"""`vlm shards preview`: a few samples as the model sees them, token by token and as a contact sheet."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlm import build
from vlm.config import schema
from vlm.data.batch import Batch, Text, collate
from vlm.data.image import BadSample, ImageTransform, decode
from vlm.data.pictures import Pictures
from vlm.data.shards import Sample
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
    source = any_shards(schema.PairData(train=list(shards)) if run is None else run.pairs, shards)
    tokenizer, transform, image_tokens, reply_start = None, None, 0, None
    if run is not None and config is not None:
        tokenizer = read_tokenizer(run, config, shards)
        with torch.device("meta"):  # sizes only: no weights, no memory
            model = build.model(run, tokenizer)
        transform = need(model.vision, "image encoder").transform
        image_tokens, reply_start = model.image_tokens, model.reply_start
    cells, samples = _chosen(source, transform, count)
    for sample in samples[:texts]:
        if run is None or tokenizer is None:
            print(f"{sample.key}: {' | '.join(sample.captions)}")
            continue
        template = run.pairs.prompt if run.model.language is not None else None
        first = Sample(sample.key, sample.id, sample.pixels, sample.captions[:1])
        batch = collate([first], tokenizer, run.pairs.max_tokens, template, image_tokens, reply_start)
        print(as_text(batch, tokenizer))
    draw(cells).save(out)
    print(f"{len(cells)} pictures with their captions: {out}")


def _chosen(source: Pictures, transform: ImageTransform | None, count: int) -> tuple[list[Cell], list[Sample]]:
    """Usable samples, evenly spread; pictures as the transform leaves them, or whole."""
    cells, samples = [], []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist():
        try:
            raw = source.raw(index)
            image = decode(raw.image)
        except BadSample as bad:
            cells.append(Cell(source.key(index), [f"unusable: {bad}"], None))
            continue
        whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = whole if transform is None else transform.pixels(image)
        cells.append(Cell(raw.key, raw.captions, Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())))
        samples.append(Sample(raw.key, raw.id, pixels, raw.captions))
    return cells, samples


def as_text(batch: Batch, tokenizer: Tokenizer) -> str:
    """The first text of a batch, a line for each token: what it says, its id, whether the loss counts it."""
    text = batch.captions if batch.prompts is None else batch.prompts
    replies = [] if text.reply is None else _rows(text.reply, tokenizer)
    rows = [("token", "id", "supervised"), *_rows(text, tokenizer), *replies]
    width = max(len(token) for token, _, _ in rows)
    lines = [f"  {token:<{width}}  {number:>7}  {supervised}" for token, number, supervised in rows]
    return "\n".join([f"{batch.keys[0]}: {batch.strings[0]}", *lines, ""])


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
