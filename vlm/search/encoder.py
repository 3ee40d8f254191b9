"""The model of an index: pictures and words to vectors, and the proof that it is the model the vectors are of.

Letters: B pictures, Q vectors of each, E their width, S texts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.data.batch import Text, pad
from vlm.data.image import ImageTransform
from vlm.data.text import encode_caption
from vlm.model.vlm import need
from vlm.model.weights.files import fingerprint
from vlm.nn.backend import best_device, fast_float32
from vlm.ready import open_model
from vlm.restore import Ready
from vlm.search.store import Form

BATCH = 32  # pictures encoded together


class Encoder:
    """A model that ranks pictures and texts. JPEGs are decoded at a fraction of their size where that is enough."""

    def __init__(self, name: str, parts: Mapping[str, str] | None = None) -> None:
        """As of `open_model`, whose errors it raises. ValueError: a model without a contrastive head."""
        self.name, self.parts = name, dict(parts or {})
        self.ready: Ready = open_model(name, best_device(), parts)
        self.longest = self.ready.data.max_tokens
        if self.ready.model.contrast is None:
            raise ValueError(f"{name} was trained without itc, so it cannot say how near a picture is to words")

    @cached_property
    def transform(self) -> ImageTransform:
        """What makes pixels of a file."""
        return replace(need(self.ready.model.vision, "image encoder").transform, scaled=True)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What vectors depend on: all weights but those of a language model, and the transform."""
        state = self.ready.model.state_dict()
        names = [name for name in state if not name.startswith("language.")]
        return {"weights": fingerprint(state, names), "transform": repr(self.transform)}

    def about(self) -> dict[str, str]:
        """What an index remembers of it."""
        path = Path(self.name).expanduser()
        name = str(path.resolve()) if path.exists() else self.name
        parts = {
            part: str(Path(given).resolve()) if Path(given).exists() else given for part, given in self.parts.items()
        }
        return {"model": name, "parts": json.dumps(parts), **self.identity}

    def form(self, dtype: str) -> Form:
        """What a picture has, found out with a grey one."""
        (vectors, dim) = self.images(torch.full((1, 3, *self.transform.size), 128, dtype=torch.uint8)).shape[1:]
        return Form(vectors, dim, dtype)

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Float[Tensor, "B N C"]:
        """What the image encoder gives for B 3 H W of 0..255."""
        device = next(self.ready.model.parameters()).device
        with fast_float32():
            return self.ready.model.encode(self.transform.normalize(pixels).to(device))

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Float[Tensor, "B Q E"]:
        """Unit vectors of B 3 H W of 0..255. ValueError where they are not finite."""
        model, tokens = self.ready.model, self.tokens(pixels)
        with fast_float32():
            return self._finite(model.embed_image(model.connect(tokens)).cpu())

    def text(self, words: Sequence[str]) -> Text:
        """Words as the model reads captions."""
        tokenizer = self.ready.tokenizer
        made = pad([encode_caption(tokenizer, text, self.longest) for text in words], tokenizer.pad)
        return made.to(next(self.ready.model.parameters()).device)

    @torch.no_grad()
    def words(self, words: Sequence[str]) -> Float[Tensor, "S 1 E"]:
        """A unit vector for each text. ValueError where it is not finite."""
        with fast_float32():
            return self._finite(self.ready.model.embed_text(self.text(words))[:, None].cpu())

    def _finite(self, vectors: Tensor) -> Tensor:
        if not vectors.isfinite().all():
            raise ValueError(f"{self.name}: its vectors are not finite; nothing can be found by them")
        return vectors


def open_encoder(index: Path, meta: Mapping[str, str], model: str | None = None) -> Encoder:
    """The model of an index; `model`: where it is now. ValueError: it is not found, or not the one it was."""
    try:
        encoder = Encoder(model or meta["model"], json.loads(meta["parts"]))
    except ValueError as error:
        if model is not None:
            raise
        raise ValueError(
            f"{error}\n{index} was made with it; if it is elsewhere now, say where: --model MODEL"
        ) from None
    refuse_other(index, meta, encoder)
    return encoder


def refuse_other(index: Path, meta: Mapping[str, str], encoder: Encoder) -> None:
    """ValueError when vectors of this encoder are not comparable with those of the index."""
    names = {"weights": "other weights", "transform": "another image transform"}
    changed = [words for key, words in names.items() if meta[key] != encoder.identity[key]]
    if changed:
        raise ValueError(
            f"{index}: {encoder.name} has {' and '.join(changed)} than the model it was made with; name that one, or "
            f"encode all pictures again: vlm index {index} --model {encoder.name} --rebuild"
        )
