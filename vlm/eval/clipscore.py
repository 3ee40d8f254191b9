"""CLIPScore and RefCLIPScore of captions with any model that has a contrastive head.

Hessel et al. 2021 (arXiv 2104.08718): 2.5 times the cosine of picture and "A photo depicts " + caption, 0 where it is
negative; with references the harmonic mean of that and the largest cosine of caption and reference. Published figures
are those of CLIP ViT-B/32.

Letters: N pictures, Q vectors per image, E their width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.data.batch import pad
from vlm.data.image import BadSample, decode
from vlm.data.text import encode_caption
from vlm.model.vlm import need
from vlm.nn.backend import fast_float32
from vlm.restore import Ready

PREFIX = "A photo depicts "
WEIGHT = 2.5


@dataclass(frozen=True)
class ClipScores:
    """Of each caption; `reference`: RefCLIPScore."""

    clip: Float[Tensor, "N"]
    reference: Float[Tensor, "N"]


def clip_scores(
    ready: Ready,
    pictures: Iterable[tuple[str, bytes]],
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> ClipScores:
    """Scores of captions of encoded pictures (name and bytes), which are read one batch at a time.

    Where a model gives several vectors per image, the nearest counts. ValueError: a model without a contrastive head, a
    picture that cannot be read, more or fewer pictures than captions, vectors that are not finite.
    """
    if ready.model.contrast is None:
        raise ValueError(f"{ready.name} has no contrastive head (itc), which CLIPScore needs")
    waiting, clip, reference = iter(pictures), list[Tensor](), list[Tensor]()
    with torch.no_grad(), fast_float32():
        for start in range(0, len(captions), ready.batch_size):
            said = captions[start : start + ready.batch_size]
            shown = list(islice(waiting, len(said)))
            if len(shown) < len(said):
                raise ValueError(f"{start + len(shown)} pictures for {len(captions)} captions")
            images = _images(ready, shown)
            texts = _texts(ready, said)
            cosine = torch.einsum("nqe,ne->nq", images, texts).amax(1)
            nearest = _nearest(ready, texts, references[start : start + len(said)])
            clip.append(WEIGHT * cosine.clamp(min=0))
            reference.append(harmonic_mean(clip[-1], nearest))
    return ClipScores(torch.cat(clip).cpu(), torch.cat(reference).cpu())


def harmonic_mean(first: Float[Tensor, "N"], second: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Of numbers from 0 on; 0 where one of them is."""
    return torch.where((first > 0) & (second > 0), 2 * first * second / (first + second), 0.0)


def _images(ready: Ready, pictures: Sequence[tuple[str, bytes]]) -> Float[Tensor, "N Q E"]:
    transform = need(ready.model.vision, "image encoder").transform
    pixels = []
    for name, picture in pictures:
        try:
            pixels.append(transform(decode(picture)))
        except BadSample as bad:
            raise ValueError(f"{name}: {bad}") from None
    device = next(ready.model.parameters()).device
    vectors = ready.model.embed_image(ready.model.see(torch.stack(pixels).to(device)))
    return _finite(ready, vectors, "image", [name for name, _ in pictures])


def _texts(ready: Ready, texts: Sequence[str]) -> Float[Tensor, "N E"]:
    longest = ready.data.max_tokens
    encoded = [encode_caption(ready.tokenizer, PREFIX + text.strip(), longest) for text in texts]
    device = next(ready.model.parameters()).device
    vectors = ready.model.embed_text(pad(encoded, ready.tokenizer.pad).to(device))
    return _finite(ready, vectors, "text", texts)


def _nearest(ready: Ready, texts: Float[Tensor, "N E"], references: Sequence[Sequence[str]]) -> Float[Tensor, "N"]:
    """The largest cosine of each text with one of its references, not below 0."""
    found = _texts(ready, [text for group in references for text in group])
    sizes = [len(group) for group in references]
    nearest = [(own @ text).amax() for own, text in zip(found.split(sizes), texts, strict=True)]
    return torch.stack(nearest).clamp(min=0)


def _finite(ready: Ready, vectors: Float[Tensor, "N *Q E"], kind: str, of: Sequence[str]) -> Float[Tensor, "N *Q E"]:
    if bad := (~vectors.flatten(1).isfinite().all(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"{ready.name} gives {kind} vectors that are not finite (NaN or infinite), of {of[bad[0]]!r:.80} first: "
            "nothing can be scored by them"
        )
    return vectors
