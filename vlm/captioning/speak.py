"""A model with everything that `vlm caption` decides for it: device, precision, way of decoding, size of batches."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from vlm.captioning.wishes import Words
from vlm.captions import longest_text, usual_decoding, written
from vlm.config.schema import ChatData
from vlm.data.image import ImageTransform
from vlm.model.beam import Beams
from vlm.model.describe import Caption
from vlm.model.fast import prepare_for_decoding
from vlm.model.generate import Decoding, Dice, Sampling
from vlm.model.vision import ImageEncoder
from vlm.model.vlm import VisionLanguageModel, need
from vlm.nn.attention import Attention
from vlm.nn.backend import best_device, bfloat16_is_fast
from vlm.restore import Ready

MOST = 32  # pictures captioned together
LARGE = 100_000_000  # parameters from which on bf16 is chosen; smaller models lose more by rounding than they gain
_TEXT, _ALIVE, _LOGITS = 128, 24, 6  # tokens of a prompt; values alive of each image token; copies of the logits


class Speaker:
    """Captions, or answers, for batches of pictures."""

    def __init__(self, ready: Ready, words: Words, size: int | None = None) -> None:
        """`size`: pictures in a batch, as many as fit into memory unless given. ValueError: it cannot do that."""
        data = ready.data  # of a model that knows text alone there is none, which it says
        if not ready.writes:
            raise ValueError(f"{ready.name} was trained without lm, so it cannot write captions")
        if words.ask is not None and not isinstance(data, ChatData):
            raise ValueError(f"--ask: {ready.name} was trained on captions ({data.kind}), not to answer questions")
        self.ready, self.words, self.how = ready, words, decoding(ready, words)
        first = next(ready.model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.size = size or fitting(ready, self.how, self.device, self.dtype)
        self._prepared = False

    @property
    def transform(self) -> ImageTransform:
        """What makes pixels of pictures."""
        return need(self.ready.model.vision, "image encoder").transform

    def __call__(self, names: Sequence[str], pixels: Sequence[UInt8[Tensor, "3 H W"]]) -> list[list[Caption]]:
        """What is said of each picture, in any number of batches: `size` becomes smaller where one does not fit.

        OSError: not even one fits.
        """
        if not self._prepared and self.device.type == "cpu":
            prepare_for_decoding(self.ready.model, len(names) * (self.how.width if isinstance(self.how, Beams) else 1))
        self._prepared = True
        try:
            return self._say(names, pixels)
        except (MemoryError, RuntimeError) as error:
            if not _no_memory(error):
                raise
            if len(names) == 1:
                raise OSError(
                    f"not enough memory for a single picture ({error}): take fewer --beams, --dtype bfloat16 or"
                    " another --device"
                ) from None
        self.size = half = -(-len(names) // 2)
        return self(names[:half], pixels[:half]) + self(names[half:], pixels[half:])

    def _say(self, names: Sequence[str], pixels: Sequence[Tensor]) -> list[list[Caption]]:
        images = self.transform.normalize(torch.stack(list(pixels)).to(self.device)).to(self.dtype)
        words = self.words
        return written(self.ready, images, self.how, self._dice(names), words.ask, words.prompt, words.captions)

    def _dice(self, names: Sequence[str]) -> Dice | None:
        """Of each picture by its name: what is drawn depends neither on its place nor on what is drawn beside it."""
        if not (isinstance(self.how, Sampling) and self.how.temperature):
            return None
        seeds = [_seed(self.words.seed, draw, name) for name in names for draw in range(self.words.captions)]
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def decoding(ready: Ready, words: Words) -> Decoding:
    """How a model writes: as its authors have it where nothing is said about it. ValueError: not so many captions."""
    usage, count = ready.usage, words.captions
    how: Beams | Sampling
    if usage is not None and words.own:
        how = replace(usage.captions if words.ask is None else usage.answers, no_repeat_ngram=words.no_repeat_ngram)
        if isinstance(how, Beams):
            if count > how.width:
                raise ValueError(f"--num-captions {count}: {ready.name} writes with {how.width} beams; raise --beams")
            return replace(how, returned=count)
    else:
        usual = longest_text(ready) if usage is None else usual_decoding(ready, words.ask is not None).max_new
        if ready.model.language is None and words.prompt:  # a Q-Former's limit counts the words that are given too
            usual = max(1, usual - len(ready.tokenizer.encode(words.prompt.strip())))
        longest = usual if words.max_new is None else words.max_new
        if words.min_new > longest:
            raise ValueError(
                f"--min-new {words.min_new}: {ready.name} writes at most {longest} tokens; raise --max-new"
            )
        lengths, repeats = (longest, words.min_new), (words.repetition_penalty, words.no_repeat_ngram)
        if words.beams is not None:
            penalty = 1.0 if words.length_penalty is None else words.length_penalty
            return Beams(words.beams, *lengths, penalty, False, count, *repeats)
        how = Sampling(*lengths, words.temperature, words.top_k, words.top_p, *repeats)
    if count > 1 and not how.temperature:
        raise ValueError(
            f"--num-captions {count}: there is one likeliest caption; draw (--temperature) or give --beams"
        )
    return how


def chosen_device(name: str | None) -> torch.device:
    """By its name, or the best there is. ValueError: there is none of that name."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def set_precision(model: VisionLanguageModel, dtype: str) -> None:
    """Weights, and so all products, in `dtype`; "auto": fp32 becomes bf16 in a large model where that is fast."""
    first = next(model.parameters())
    wanted = first.dtype if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and first.dtype == torch.float32 and bfloat16_is_fast(first.device):
        large = sum(parameter.numel() for parameter in model.parameters()) >= LARGE
        wanted = torch.bfloat16 if large else first.dtype
    if dtype == "auto" and wanted == first.dtype:
        return  # parts of a run may be of different types, as it was trained
    model.to(wanted)
    if isinstance(model.vision, ImageEncoder) and model.vision.dtype is not None:
        model.vision.dtype = wanted


def fitting(ready: Ready, how: Decoding, device: torch.device, dtype: torch.dtype) -> int:
    """Pictures that can be captioned together in half of the free memory, by a rough count of what each needs."""
    model, size = ready.model, dtype.itemsize
    width = how.width if isinstance(how, Beams) else 1
    tokens = model.image_tokens + _TEXT + how.max_new
    kept = sum(2 * part.kv_heads * part.head_dim for part in model.modules() if isinstance(part, Attention))
    eye = need(model.vision, "image encoder")
    seen = eye.tokens * eye.dim * size * _ALIVE + 3 * 8 * eye.transform.size[0] * eye.transform.size[1]
    each = width * (tokens * kept * size + ready.tokenizer.size * 4 * _LOGITS) + seen
    return max(1, min(MOST, free_memory(device) // 2 // each))


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _no_memory(error: MemoryError | RuntimeError) -> bool:
    """torch has a class for a full GPU; on a CPU it says so in words."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in said


def _seed(seed: int, draw: int, name: str) -> int:
    text = f"{seed}\0{draw}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
