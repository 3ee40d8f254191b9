"""The best of a search once more in order, by how well each matches the words (ITM)."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vlm.data.image import BadSample
from vlm.eval.features import pair_scores
from vlm.search.encoder import BATCH, Encoder
from vlm.search.show import Hit


def rerank(encoder: Encoder, words: str, hits: Sequence[Hit], k: int) -> list[Hit]:
    """The first `k` by ITM's probability plus the contrastive logit, as `vlm evaluate` does; the others behind them.

    Their pictures are read and encoded again. What cannot be read any more stays behind those that can.
    """
    pixels, readable, others = list[torch.Tensor](), list[Hit](), list[Hit]()
    for hit in hits[:k]:
        try:
            with open(hit.path, "rb") as file:
                pixels.append(encoder.transform.read(file.read()))
            readable.append(hit)
        except (BadSample, OSError):
            others.append(hit)
    scored = list[Hit]()
    for first in range(0, len(readable), BATCH):
        scores = _match(encoder, words, torch.stack(pixels[first : first + BATCH]))
        scored += [replace(hit, match=s) for hit, s in zip(readable[first : first + BATCH], scores, strict=True)]
    return [*sorted(scored, key=lambda hit: -(hit.match or 0.0)), *others, *hits[k:]]


@torch.no_grad()
def _match(encoder: Encoder, words: str, pixels: torch.Tensor) -> list[float]:
    text, tokens, model = encoder.text([words]), encoder.tokens(pixels), encoder.ready.model
    seen, same = model.connect(tokens), torch.zeros(len(tokens), dtype=torch.long, device=text.ids.device)
    vectors = model.embed_text(text)[same]
    scores: list[float] = pair_scores(model, seen, text.select(same), model.embed_image(seen), vectors).tolist()
    return scores
