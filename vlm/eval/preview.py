"""`vlm shards preview`: what a model would learn from a few samples, token by token, and a sheet of the pictures."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlm import build
from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.config.load import load
from vlm.data.image import BadSample, decode
from vlm.data.pictures import Pictures
from vlm.data.shards import RawSample, Shards
from vlm.data.text import Encoded, Tokenizer, encode_caption, encode_prompt, load_tokenizer
from vlm.nn.tokens import IGNORE, IMAGE_ID
from vlm.restore import TOKENIZER

CELL, MARGIN, LINE = 224, 12, 16  # pixels
LINES = 4  # of a caption under its picture


def preview(specs: Sequence[str], config: Path | None, count: int, out: Path | None, every: int = 1) -> str:
    """Text for people about `count` samples, `every`-th ones; writes their pictures with captions to `out`.

    `config`: a config file or the folder of a run: how its model would see the captions. Errors: as of a run's start.
    """
    run, tokenizer = None, None
    if config is not None:
        folder = config if config.is_dir() else None
        run = load(schema.Run, config if folder is None else folder / CONFIG)
        tokenizer = None if folder is None else load_tokenizer(folder / TOKENIZER)
    source: Pictures = Shards(list(specs)) if run is None else build.shards(run.pairs, list(specs))
    chosen = range(0, min(len(source), count * every), every)
    samples = [sample for index in chosen if (sample := _raw(source, index)) is not None]
    if not samples:
        raise ValueError(f"{source.files[0]}: none of the first {len(chosen)} samples is usable")
    if run is not None and tokenizer is None:
        tokenizer = build.tokenizer(run.tokenizer, source.captions())
    if out is not None:
        sheet([(sample.image, sample.captions[0]) for sample in samples]).save(out)
    parts = [_about(sample, run, tokenizer) for sample in samples]
    return "\n\n".join(parts + ([] if out is None else [f"pictures with captions: {out}"]))


def _raw(source: Pictures, index: int) -> RawSample | None:
    try:
        raw = source.raw(index)
        decode(raw.image)
        return raw
    except BadSample:
        return None


def _about(sample: RawSample, run: schema.Run | None, tokenizer: Tokenizer | None) -> str:
    title = [f"{sample.key}" + ("" if sample.id == sample.key else f"  (id {sample.id})")]
    if run is None or tokenizer is None:
        return "\n".join(title + [f"  {caption}" for caption in sample.captions])
    data, lines = run.pairs, list(title)
    for caption in sample.captions[: data.captions_per_image]:
        encoded = encode_caption(tokenizer, caption, data.max_tokens)
        if run.model.language is not None:
            encoded = encode_prompt(tokenizer, data.prompt, caption, image_tokens(run, tokenizer), data.max_tokens)
        lines += [f"  {caption}", *rows(encoded, tokenizer)]
    return "\n".join(lines)


def image_tokens(run: schema.Run, tokenizer: Tokenizer) -> int:
    """Placeholders of one picture in the language model's text, found without weights."""
    vision = run.model.vision
    bare = None if vision is None else vision.model_copy(update={"weights": None})
    shapes = run.model_copy(update={"model": run.model.model_copy(update={"vision": bare})})
    with torch.device("meta"):
        return build.model(shapes, tokenizer).image_tokens


def rows(encoded: Encoded, tokenizer: Tokenizer) -> list[str]:
    """A line for each token: its text, its id, and whether its prediction is learned; placeholders as one line."""
    found = [f"  {'token':24} {'id':>8}  supervised"]
    images = sum(token == IMAGE_ID for token in encoded.ids)
    for place, (token, label) in enumerate(zip(encoded.ids, encoded.labels, strict=True)):
        if token == IMAGE_ID:
            if encoded.ids[place - 1] != IMAGE_ID:
                found.append(f"  {f'<image> x {images}':24} {'':>8}  -")
            continue
        text = tokenizer.inner.id_to_token(token) or ""
        found.append(f"  {text[:24]:24} {token:>8}  {'-' if label == IGNORE else 'yes'}")
    return found


def sheet(pictures: Sequence[tuple[bytes, str]], columns: int = 4) -> Image.Image:
    """Pictures in rows, each with its caption below it."""
    columns = min(columns, len(pictures))
    step = CELL + MARGIN, CELL + MARGIN + LINES * LINE + MARGIN
    height = -(-len(pictures) // columns) * step[1] + MARGIN
    page = Image.new("RGB", (columns * step[0] + MARGIN, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    wide = CELL // max(1, int(font.getlength("n")))
    for place, (data, caption) in enumerate(pictures):
        left, top = MARGIN + place % columns * step[0], MARGIN + place // columns * step[1]
        picture = ImageOps.contain(decode(data), (CELL, CELL))
        page.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        draw.rectangle((left - 1, top - 1, left + CELL, top + CELL), outline="#cccccc")
        lines = textwrap.wrap(caption, wide, max_lines=LINES, placeholder=" …")
        draw.multiline_text((left, top + CELL + 4), "\n".join(lines), fill="#222222", font=font, spacing=2)
    return page
