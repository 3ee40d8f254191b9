"""`vlm caption`: a trained model describes pictures, or answers a question about each."""

import json as jsonlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlm.config.schema import ChatData
from vlm.data.image import BadSample, decode
from vlm.model.beam import Beams
from vlm.model.fast import prepare_for_decoding
from vlm.model.generate import Decoding, Sampling
from vlm.model.transcribe import one_line
from vlm.model.vlm import need
from vlm.nn.backend import best_device
from vlm.ready import open_model
from vlm.restore import Ready, captions

BATCH = 32  # pictures captioned together
ANSWER = 256  # tokens of the longest answer, unless told otherwise
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def caption(
    model: str,
    images: Sequence[str],
    json: bool = False,
    max_new: int | None = None,
    min_new: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    question: str | None = None,
    parts: Mapping[str, str] | None = None,
) -> None:
    """Prints a caption for each picture; what cannot be read is named on stderr and makes the exit code 1.

    `model`, `parts`: as of `open_model`. `max_new`: tokens of the longest caption, as long as those that the model was
    trained on unless given, of answers at most ANSWER; the rest as in `Sampling`. `question`: what is answered about
    each.
    """
    Sampling(max_new or max(1, min_new), min_new, temperature, top_k, top_p, repetition_penalty)  # wrong values, early
    paths = list(find_images(images))
    trained = open_model(model, best_device(), parts)
    data = trained.data
    if not trained.writes:
        raise ValueError(f"{model} was trained without lm, so it cannot write captions")
    if question is not None and not isinstance(data, ChatData):
        raise ValueError(f"--question: {model} was trained on captions ({data.kind}), not to answer questions")
    decoding: Decoding
    if trained.usage is not None and (max_new, min_new, temperature, top_k, top_p, repetition_penalty) == _UNSAID:
        decoding = trained.usage.captions if question is None else trained.usage.answers
    else:
        usual = min(data.max_tokens, ANSWER) if isinstance(data, ChatData) else data.max_tokens
        longest = usual if max_new is None else max_new
        decoding = Sampling(longest, min_new, temperature, top_k, top_p, repetition_penalty)
    if best_device().type == "cpu":
        width = decoding.width if isinstance(decoding, Beams) else 1
        prepare_for_decoding(trained.model, min(BATCH, len(paths)) * width)
    generator = torch.Generator(best_device()).manual_seed(seed)
    bad = 0
    for start in range(0, len(paths), BATCH):
        readable, pixels = _read(trained, paths[start : start + BATCH])
        bad += len(paths[start : start + BATCH]) - len(readable)
        said = captions(trained, torch.stack(pixels), decoding, generator, question) if pixels else []
        for path, text in zip(readable, said, strict=True):
            record = jsonlib.dumps({"image": str(path), "caption": text}, ensure_ascii=False)
            print(record if json else f"{path}\t{one_line(text)}", flush=True)
    if bad:
        print(f"vlm: {bad} of {len(paths)} pictures could not be read", file=sys.stderr)
        raise SystemExit(1)


_UNSAID = (None, 0, 0.0, None, None, 1.0)  # how a published model writes is then its authors' way


def _read(trained: Ready, paths: Sequence[Path]) -> tuple[list[Path], list[Tensor]]:
    readable, pixels = [], []
    transform = need(trained.model.vision, "image encoder").transform
    for path in paths:
        try:
            pixels.append(transform(decode(path.read_bytes())))
            readable.append(path)
        except (BadSample, OSError) as error:
            print(f"vlm: {path}: {error}", file=sys.stderr)
    return readable, pixels


def find_images(names: Iterable[str]) -> Iterator[Path]:
    """Files as named, the pictures of folders in order, and for `-` what standard input lists."""
    for name in names:
        if name == "-":
            yield from (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
            continue
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not found:
                raise ValueError(f"{path}: no picture in this folder ({', '.join(sorted(SUFFIXES))})")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path}: no such file or folder")
