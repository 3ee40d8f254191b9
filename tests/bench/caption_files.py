"""`vlm caption` on photos of 12 megapixels beside a loop over transformers' `generate`, one picture at a time.

A small BLIP-2 of random weights in a published folder, opened by both with its processor; greedy captions of 20 tokens.
The photos are generated: the spectrum of real ones (amplitude 1/f), 4000 x 3000, JPEG. CPU time at one thread; what is
no work of the model (reading, decoding, resizing, output) is told apart, in pictures a second of one core.
    python -m tests.bench.caption_files [--pictures 200] [--round 20] [--photos FOLDER]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor, OPTConfig
from transformers.utils import logging

from tests.folders import merges
from tests.parity.noise import noise
from vlm.captioning import run
from vlm.captioning.speak import Speaker
from vlm.captioning.wishes import Words, Work
from vlm.captions import written
from vlm.data.image import ImageTransform
from vlm.model.generate import Sampling
from vlm.ready import open_model
from vlm.restore import Ready

NEW, SIDE, WIDE, HIGH, FIELDS = 20, 224, 4000, 3000, 2
WORDS = Words(max_new=NEW)


def fields(count: int) -> Iterator[np.ndarray]:
    """Noise whose amplitude falls as 1/f, mostly grey, with the range of a photo."""
    y, x = np.fft.fftfreq(HIGH)[:, None], np.fft.rfftfreq(WIDE)[None]
    fall = (1 / np.maximum(np.hypot(y, x), 1 / WIDE)).astype(np.float32)
    maker = np.random.default_rng(0)
    for _ in range(count):
        planes = []
        for share in (1.0, 0.25, 0.25):
            drawn = np.fft.irfft2(np.fft.rfft2(maker.standard_normal((HIGH, WIDE), np.float32)) * fall, (HIGH, WIDE))
            planes.append(share * drawn / drawn.std())
        grey, red, blue = planes
        rgb = np.stack([grey + red, grey - 0.5 * (red + blue), grey + blue], 2)
        yield np.clip(rgb * 45 + 120, 0, 255).astype(np.uint8)


def photos(folder: Path, count: int) -> list[Path]:
    """No two alike: each a shifted, perhaps turned field."""
    maker, found = np.random.default_rng(1), list[Path]()
    for field in fields(FIELDS):
        for _ in range(-(-count // FIELDS)):
            moved = np.roll(field, maker.integers(0, 3000, 2), (0, 1))[
                :: maker.choice([1, -1]), :: maker.choice([1, -1])
            ]
            found.append(folder / f"{len(found):04d}.jpg")
            Image.fromarray(np.ascontiguousarray(moved)).save(found[-1], quality=90)
    return found[:count]


def published(folder: Path) -> Path:
    """BLIP-2 of 34M parameters: a ViT of 6 layers, a Q-Former of 6, OPT of 6."""
    torch.manual_seed(0)
    tokenizer = merges(folder)
    size, heads = len(tokenizer), {"num_attention_heads": 6, "num_hidden_layers": 6}
    eos = tokenizer.convert_tokens_to_ids("Ċ")  # as published: a line's end
    eyes = {"hidden_size": 384, "intermediate_size": 1536, "image_size": SIDE, "patch_size": 16, **heads}
    qformer = {"hidden_size": 384, "intermediate_size": 1536, "encoder_hidden_size": 384, "vocab_size": 60, **heads}
    text = OPTConfig(
        vocab_size=size, hidden_size=384, ffn_dim=1536, word_embed_proj_dim=384, max_position_embeddings=128,
        bos_token_id=2, pad_token_id=1, eos_token_id=eos, **heads,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=eyes, qformer_config={**qformer, "cross_attention_frequency": 2}, text_config=text.to_dict(),
        num_query_tokens=32, image_token_id=size - 1,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config).eval()
    noise(model, scale=0.06)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    pixels = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    pixels.save_pretrained(folder)
    return folder


class Theirs:
    """The loop that people write."""

    def __init__(self, folder: Path) -> None:
        self.model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
        tokenizer = merges(folder)
        self.processor = Blip2Processor(BlipImageProcessor.from_pretrained(folder), tokenizer, num_query_tokens=32)

    def pixels(self, path: Path) -> dict[str, torch.Tensor]:
        """A picture and the prompt as the model takes them."""
        given = self.processor(images=Image.open(path), text="a photo of", return_tensors="pt")
        given.pop("token_type_ids", None)
        return dict(given)

    @torch.no_grad()
    def __call__(self, paths: Sequence[Path]) -> list[str]:
        found = []
        for path in paths:
            given = self.pixels(path)
            ids = self.model.generate(**given, do_sample=False, max_new_tokens=NEW)[0]
            new = ids[given["input_ids"].shape[1] :]
            found.append(" ".join(self.processor.tokenizer.decode(new, skip_special_tokens=True).split()))
        return found


def levels(transform: ImageTransform, paths: Sequence[Path], seen: torch.Tensor) -> None:
    """How much the pixels differ, in levels of 255, from those of full-size decoding."""
    full = torch.stack([transform.read(path.read_bytes()) for path in paths]).float()
    scaled = torch.stack([replace(transform, scaled=run.SPARE).read(path.read_bytes()) for path in paths])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    for name, other in (("scaled decoding", scaled), ("transformers", (seen * std + mean) * 255)):
        gap = (other - full).abs()
        print(f"pixels of {name}: {gap.mean():.2f} levels from full-size decoding on average, {gap.max():.0f} at most")


def alike(theirs: Theirs, ready: Ready, paths: Sequence[Path]) -> None:
    """Whether both write the same about the same pixels, and how the pixels differ."""
    seen = torch.cat([theirs.pixels(path)["pixel_values"] for path in paths])
    # Theirs is told to leave control tokens out, of which <unk> is one to them.
    said = [" ".join(row[0].text.replace("<unk>", "").split()) for row in written(ready, seen, Sampling(NEW))]
    same = sum(a == b for a, b in zip(said, theirs(paths), strict=True))
    print(f"of the same pixels {same} of {len(paths)} captions are the same")
    levels(ready.model.vision.transform, paths, seen)


@contextmanager
def timed_model() -> Iterator[list[float]]:
    """CPU seconds of the thread that runs the model, while it does."""
    spent: list[float] = []
    original = Speaker.__call__

    def measured(self: Speaker, names: Sequence[str], pixels: Sequence[torch.Tensor]) -> list:
        begin = time.thread_time()
        try:
            return original(self, names, pixels)
        finally:
            spent.append(time.thread_time() - begin)

    Speaker.__call__ = measured
    yield spent
    Speaker.__call__ = original


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--round", type=int, default=20, help="pictures of a turn")
    parser.add_argument("--photos", type=Path, help="keeps them there, and takes those that are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place, timed_model() as spent:
        kept = given.photos or Path(place, "photos")
        kept.mkdir(exist_ok=True)
        there = sorted(kept.glob("*.jpg"))[: given.pictures]
        paths = there if len(there) == given.pictures else photos(kept, given.pictures)
        megabytes = statistics.mean(path.stat().st_size for path in paths) / 1e6
        folder = published(Path(place) / "model")
        theirs, ready = Theirs(folder), open_model(str(folder))
        run.open_model = lambda *_: ready  # loading is no part of what is timed
        size = sum(parameter.numel() for parameter in ready.model.parameters()) / 1e6
        print(f"{len(paths)} JPEGs of {WIDE} x {HIGH}, {megabytes:.1f} MB; BLIP-2 of {size:.0f}M, {NEW} tokens, fp32")

        alike(theirs, ready, paths[:3])

        ours = Work(format="jsonl", output=Path(place) / "captions.jsonl", overwrite=True)
        run.caption("model", [str(path) for path in paths[:4]], WORDS, ours)  # warm
        seconds: dict[str, list[float]] = {"transformers": [], "ours": [], "model": []}
        for first in range(0, len(paths), given.round):
            part = paths[first : first + given.round]
            spent.clear()
            begin = time.process_time()
            run.caption("model", [str(path) for path in part], WORDS, ours)
            seconds["ours"].append(time.process_time() - begin)
            seconds["model"].append(sum(spent))
            begin = time.process_time()
            theirs(part)
            seconds["transformers"].append(time.process_time() - begin)
        ratio = statistics.median(t / o for t, o in zip(seconds["transformers"], seconds["ours"], strict=True))
        ours_each, model_each, their_each = (sum(seconds[k]) / len(paths) for k in ("ours", "model", "transformers"))
        print(f"transformers, one at a time: {1 / their_each:.2f} pictures a second of CPU time")
        print(f"vlm caption: {1 / ours_each:.2f}; ratio {ratio:.2f} (median of {len(seconds['ours'])} turns)")
        print(f"  without the model: {1 / (ours_each - model_each):.1f} pictures a second of one core")


if __name__ == "__main__":
    main()
