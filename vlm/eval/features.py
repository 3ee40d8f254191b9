"""What a model makes of a data set, computed once: contrastive vectors, and what ITM re-ranking needs.

It comes in parts of some hundred samples, which a folder keeps: a later run goes on from those that are there.

Letters: N images, M texts, Q vectors per image, E their width, T text tokens, P pairs.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vlm.data.batch import Batch, Text
from vlm.data.loader import Loader
from vlm.eval.feature_files import FeatureFolder, Part, opened
from vlm.eval.origin import DataSum, Origin, origin
from vlm.eval.rows import Rows, Stacked, Strings
from vlm.loss.contrastive import inverse_temperature
from vlm.model.vlm import Seen, VisionLanguageModel, need
from vlm.nn.backend import fast_float32

PAIR_BYTES = 2**29  # of keys and values that pairs of an image and a text have at a time
PART = 512  # samples, about: what a killed run loses at most, and what is in memory with its image tokens


@dataclass(frozen=True)
class Features:
    """All images and texts of a data set, in its order; ids say which belong together. Vectors are fp32.

    `tokens`: of each image, as the vision encoder gives them, in its dtype (N' C each); None: were not asked for.
    """

    image: Float[Tensor, "N Q E"]
    text: Float[Tensor, "M E"]  # M is 0 where only images were asked for
    image_ids: Int[Tensor, "N"]
    text_ids: Int[Tensor, "M"]
    owner: Int[Tensor, "_"]  # of each string, the image it stands beside
    places: Int[Tensor, "N"]  # of the images in their source, to show them
    names: Sequence[str]  # N: keys of the images
    strings: Sequence[str]  # the texts
    tokens: Stacked | None
    words: Rows  # of each text, its ids
    pad: int
    made_of: Mapping[str, str]  # origin, and the sum of the data: what metrics.json tells

    def select(self, images: Int[Tensor, "n"]) -> "Features":
        """Some of the images with all texts that stand beside them, in their order here. `images`: ascending."""
        chosen = torch.zeros(len(self.names), dtype=torch.bool)
        chosen[images.cpu()] = True
        kept = chosen[self.owner.cpu()].nonzero().flatten()
        number = chosen.cumsum(0) - 1
        here, texts = images.to(self.image.device), kept[: len(self.text)].to(self.image.device)
        return replace(
            self,
            image=self.image[here],
            text=self.text[texts],
            image_ids=self.image_ids[here],
            text_ids=self.text_ids[texts],
            owner=number[self.owner.cpu()[kept]].to(self.owner.device),
            places=self.places[here],
            names=[self.names[row] for row in images.tolist()],
            strings=[self.strings[row] for row in kept.tolist()],
            tokens=None if self.tokens is None else self.tokens.select(images),
            words=Rows.of((self.words[row] for row in texts.tolist()), torch.int64),
        )


@torch.no_grad()
def extract(
    model: VisionLanguageModel, loader: Loader, keep_tokens: bool, *, folder: Path | None = None, texts: bool = True
) -> Features:
    """One pass over the data, in fp32; `keep_tokens`: also what `match_pairs` needs; `texts`: of captions too.

    `folder` keeps all parts: what is there of the same model and the same data is taken as it is, so a killed run goes
    on where it stopped and ends in the same bytes. Without one, tokens stay in memory.

    ValueError: no usable sample; features that are not finite; a folder that holds something else. OSError: disk full.
    """
    made = origin(model, loader, texts)
    place: AbstractContextManager[FeatureFolder | None] = nullcontext() if folder is None else opened(folder, made)
    with place as kept:
        parts = list(_parts(_Maker(model, loader, keep_tokens, texts), kept))
    return _joined(parts, loader, made, next(model.parameters()).device)


def _parts(maker: "_Maker", kept: FeatureFolder | None) -> Iterator[Part]:
    loader, data = maker.loader, DataSum(maker.loader.shards)
    steps = max(1, PART // loader.batch_size)
    starts = range(0, loader.steps_per_epoch, steps)
    console = Console(stderr=True)
    shown = track(starts, "features", console=console, disable=not console.is_terminal, transient=True)
    for number, start in enumerate(shown):
        stop = min(start + steps, loader.steps_per_epoch)
        samples = min(stop * loader.batch_size, len(loader.shards))
        total = data.upto(samples)
        found = None if kept is None else kept.find(number, total, maker.keep_tokens)
        if found is not None:
            loader.seen += found.seen
            loader.bad += found.bad
        else:
            found = maker(range(start, stop), total)
            found = found if kept is None else kept.add(number, found, len(loader.shards) - samples)
        yield found
    if kept is not None:
        kept.drop_after(len(starts))


class _Maker:
    """Makes parts."""

    def __init__(self, model: VisionLanguageModel, loader: Loader, keep_tokens: bool, texts: bool) -> None:
        self.model, self.loader, self.keep_tokens, self.texts = model, loader, keep_tokens, texts
        self.device = next(model.parameters()).device

    def __call__(self, steps: range, data: str) -> Part:
        seen, bad = self.loader.seen, self.loader.bad.copy()
        made: dict[str, list[Tensor]] = defaultdict(list)
        names, strings, words = list[str](), list[str](), list[Tensor]()
        with fast_float32():
            for batch in self.loader.part(steps):
                for name, value in self._of(batch.to(self.device)).items():
                    made[name].append(value.cpu())
                made["owner"].append(batch.owner + len(names))
                names += batch.keys
                strings += batch.strings
                if self.texts:
                    words += [row[valid] for row, valid in zip(batch.captions.ids, batch.captions.valid, strict=True)]
        tensors = {name: torch.cat(values) for name, values in made.items()}
        tokens = tensors.pop("tokens", None)
        packed = {"names": Strings.of(names).rows, "strings": Strings.of(strings).rows}
        for name, rows in (packed | {"words": Rows.of(words, torch.int64)}).items():
            tensors |= {name: rows.flat, f"{name}_ends": rows.ends}
        return Part(tensors, tokens, data, self.loader.seen - seen, self.loader.bad - bad)

    def _of(self, batch: Batch) -> dict[str, Tensor]:
        visual = self.model.encode(batch.pixels)
        found = {"image": self.model.embed_image(self.model.connect(visual)).float()}
        if self.texts:
            found["text"] = self.model.embed_text(batch.captions).float()
        for kind, vectors in found.items():
            _refuse_infinite(vectors, kind, batch)
        digests = [_digest(name) for name in batch.image_ids]
        found |= {"ids": torch.tensor(digests), "places": torch.tensor(batch.places)}
        return found | ({"tokens": visual} if self.keep_tokens else {})


def _refuse_infinite(vectors: Tensor, kind: str, batch: Batch) -> None:
    bad = (~vectors.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        row = bad[0]
        what = f"picture {batch.keys[row]!r}" if kind == "image" else f"caption {batch.strings[row]!r:.80}"
        raise ValueError(
            f"the model gives {kind} vectors that are not finite (NaN or infinite), of {what} first: nothing can be "
            "ranked by them"
        )


def _digest(name: str) -> int:
    """63 bits of an id: a table of all ids would grow with the data."""
    return int.from_bytes(_hash(name), "little") >> 1


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()


def _joined(parts: Sequence[Part], loader: Loader, made: Origin, device: torch.device) -> Features:
    full = [part for part in parts if "image" in part.tensors]
    if not full:
        raise ValueError(f"{loader.shards.files[0]}: no sample is usable: {dict(loader.bad)}")

    def joined(name: str) -> Tensor:
        return torch.cat([part.tensors[name] for part in full])

    def rows(name: str) -> Rows:
        return Rows.joined([Rows(part.tensors[name], part.tensors[f"{name}_ends"]) for part in full])

    image = joined("image")
    text = joined("text") if "text" in full[0].tensors else image.new_zeros(0, image.shape[2])
    starts = np.cumsum([0, *(len(part.tensors["image"]) for part in full)])
    owner = torch.cat([part.tensors["owner"] + int(at) for part, at in zip(full, starts, strict=False)])
    ids = _numbered(joined("ids"))
    tokens = [part.tokens for part in full if part.tokens is not None]
    return Features(
        image=image.to(device),
        text=text.to(device),
        image_ids=ids.to(device),
        text_ids=ids[owner[: len(text)]].to(device),
        owner=owner.to(device),
        places=joined("places").to(device),
        names=Strings(rows("names")),
        strings=Strings(rows("strings")),
        tokens=Stacked(tokens) if tokens else None,
        words=rows("words"),
        pad=loader.tokenizer.pad,
        made_of=asdict(made) | {"data": parts[-1].data},
    )


def _numbered(digests: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    """0, 1, … in the order in which they come first."""
    _, first, inverse = np.unique(digests.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(first.argsort().argsort()[inverse])


@torch.no_grad()
def match_pairs(
    model: VisionLanguageModel, features: Features, image: Int[Tensor, "P"], text: Int[Tensor, "P"]
) -> Float[Tensor, "P"]:
    """As `pair_scores`, of images and texts by their number; each image is projected once."""
    tokens = need(features.tokens, "image tokens: extract with keep_tokens")
    different, row = image.unique(return_inverse=True)
    device = features.image.device
    with fast_float32():
        seen = replace(model.connect(tokens.take(different).to(device)), state=None)
        asked = _padded([features.words[i] for i in text.tolist()], features.pad, device)
        vectors = features.text[text]
        scores = [
            pair_scores(model, seen.select(row[part]), asked.select(part), features.image[image[part]], vectors[part])
            for part in torch.arange(len(row), device=device).split(_pairs_together(seen, len(different)))
        ]
        return torch.cat(scores)


def _pairs_together(seen: Seen, images: int) -> int:
    """How many pairs may each have a copy of their image's keys and values (10 MB in BLIP-2)."""
    blocks = () if seen.memory is None else seen.memory.blocks
    copied = sum(block.key.nbytes + block.value.nbytes for block in blocks if block is not None)
    return max(1, PAIR_BYTES * images // max(1, copied))


def pair_scores(
    model: VisionLanguageModel, seen: Seen, text: Text, image: Float[Tensor, "P Q E"], vectors: Float[Tensor, "P E"]
) -> Float[Tensor, "P"]:
    """ITM probability of each pair plus its contrastive logit, from what was seen and the vectors of both.

    Bounded like this, ITM decides where ITC sees little difference. Adding its log-odds instead was 1.8 points worse at
    R@1 in three of four trial runs (0.2 better in one) on a drawing style held out of training, where ITM is too sure.
    """
    logits = model.match_logits(seen, text)
    cosine = torch.einsum("pqe,pe->pq", image, vectors).amax(1)
    contrast = need(model.contrast, "contrastive head")
    return logits.float().softmax(1)[:, 1] + cosine * inverse_temperature(contrast.log_scale)


def _padded(rows: Sequence[Tensor], pad: int, device: torch.device) -> Text:
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    valid = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return Text(ids, valid, torch.full_like(ids, -100))
