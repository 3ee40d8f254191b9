"""Where the queries of a Q-Former look: the weights of its cross-attentions, and pictures with them drawn over.

Letters: B images, N image tokens, C image width, H heads, Q queries, S and T rows and columns of the tokens' grid.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vlm import build_data
from vlm.data.image import BadSample, ImageTransform, as_pixels
from vlm.data.pictures import Pictures
from vlm.eval.report import Entry, Match, Matches
from vlm.eval.thumbs import encode
from vlm.model.qformer import QFormer
from vlm.model.vlm import need
from vlm.nn.attention import CrossAttention, ImageKeyValue, split_heads
from vlm.nn.backend import fast_float32
from vlm.restore import Ready

PREFIXES = (0, 1, 5)  # tokens before the grid: none, a class token, a class token and four registers
SIDE = 112  # pixels of a picture drawn over
EVERY = "all queries"
PICTURES, SHOWN = 4, 7  # pictures, and queries of each


def attention(qformer: QFormer, image: Float[Tensor, "B N C"]) -> list[Float[Tensor, "B H Q N"]]:
    """Softmax(q k) of each cross-attention, first to last, when the queries look at these tokens without a text.

    The fast path makes no such weights: here they are made anew from what its cross-attentions are given.
    """
    found: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Tensor, ImageKeyValue]) -> None:
        assert isinstance(module, CrossAttention)
        found.append(_weights(module, *given))

    with _watched(qformer, note), torch.no_grad():
        qformer.query(qformer.look(image), len(image))
    return found


def _weights(module: CrossAttention, x: Float[Tensor, "B Q D"], image: ImageKeyValue) -> Float[Tensor, "B H Q N"]:
    query = split_heads(module.query(x), module.heads)
    scale = 1 / math.sqrt(query.shape[-1]) if module.scale is None else module.scale
    scores = (query @ image.key.transpose(2, 3)).float() * scale
    if image.seen is not None:
        scores = scores.masked_fill(~image.seen, -torch.inf)
    return scores.softmax(-1)


@contextmanager
def _watched(qformer: QFormer, note: Callable[[nn.Module, tuple[Tensor, ImageKeyValue]], None]) -> Iterator[None]:
    crosses = [module for module in qformer.stack.modules() if isinstance(module, CrossAttention)]
    handles = [cross.register_forward_pre_hook(note) for cross in crosses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def grid(tokens: int, size: tuple[int, int]) -> tuple[int, int, int] | None:
    """Tokens before the grid, its rows and columns, for an image of `size` (height, width); None: there is no grid."""
    for before in PREFIXES:
        rows = round(math.sqrt(max(0, tokens - before) * size[0] / size[1]))
        columns = round(rows * size[1] / size[0])
        if rows and rows * columns == tokens - before:
            return before, rows, columns
    return None


def attention_section(trained: Ready, source: Pictures) -> list[Matches]:
    """The last cross-attention over a few pictures, evenly spaced; nothing without a Q-Former or a grid of tokens."""
    model, encoder = trained.model, trained.model.vision
    if not isinstance(model.connector, QFormer) or encoder is None:
        return []
    transform, cells = encoder.transform, grid(encoder.tokens, encoder.transform.size)
    if cells is None or build_data.transform(trained.vision, model, source) is not transform:  # features, no pictures
        return []
    shown = _pictures(source, transform)
    if not shown:
        return []
    device = next(model.parameters()).device
    pixels = torch.stack([picture for _, picture in shown])
    with fast_float32(), torch.no_grad():
        tokens = need(encoder, "image encoder")(transform.normalize(pixels).to(device))
        weights = attention(model.connector, tokens)
    before, rows, columns = cells
    maps = weights[-1].mean(1)[:, :, before:].unflatten(2, (rows, columns)).cpu()
    chosen = _keenest(maps)
    named = [(f"query {query + 1}", query) for query in chosen]
    found = [
        Match(Entry(caption, encode(_image(picture))), _overlays(caption, picture, maps[i], named))
        for i, (caption, picture) in enumerate(shown)
    ]
    some = f"the {len(chosen)} of {maps.shape[1]} queries whose attention is most concentrated" if named else ""
    note = (
        f"Cross-attention {len(weights)} of {len(weights)}, mean over its heads, {rows} × {columns} image tokens; the "
        f"brighter, the more. First the mean of all queries, then {some}. It says where queries read, not why."
    )
    return [Matches("Where the Q-Former's queries look", found, note)]


def _pictures(source: Pictures, transform: ImageTransform) -> list[tuple[str, UInt8[Tensor, "3 h w"]]]:
    """Caption and pixels as the model sees them."""
    found = []
    for index in torch.linspace(0, len(source) - 1, min(PICTURES, len(source))).round().long().tolist():
        try:
            sample = source.raw(index)
            found.append((sample.captions[0] if sample.captions else sample.key, transform.read(sample.image)))
        except BadSample:
            continue
    return found


def _keenest(maps: Float[Tensor, "B Q S T"]) -> list[int]:
    """Queries of the lowest entropy, in their order."""
    share = maps.flatten(2) / maps.flatten(2).sum(2, keepdim=True)
    entropy = torch.special.entr(share).sum(2).mean(0)
    return sorted(entropy.argsort()[:SHOWN].tolist())


def _overlays(
    caption: str, picture: UInt8[Tensor, "3 h w"], maps: Float[Tensor, "Q S T"], named: list[tuple[str, int]]
) -> list[Entry]:
    def drawn(name: str, weights: Tensor) -> Entry:
        where = f"where {name} look: {caption}" if name == EVERY else f"where {name} looks: {caption}"
        return Entry(name, encode(overlay(picture, weights)), alt=where)

    return [drawn(EVERY, maps.mean(0)), *(drawn(name, maps[query]) for name, query in named)]


def overlay(picture: UInt8[Tensor, "3 h w"], weights: Float[Tensor, "S T"]) -> Image.Image:
    """The picture, dark where nothing looks and warm where most does; the highest weight is full light."""
    image = _image(picture)
    height, width = image.height, image.width
    light = functional.interpolate(weights[None, None], (height, width), mode="bicubic", align_corners=False)[0]
    light = (light / light.max()).clamp(0, 1)
    base = as_pixels(image.convert("L").convert("RGB")) / 255
    warm = torch.tensor([1.0, 0.62, 0.12]).view(3, 1, 1)
    mixed = base * (0.2 + 0.35 * light) + 0.45 * light * warm * (0.5 + 0.5 * base)
    return _image((255 * mixed.clamp(0, 1)).round().to(torch.uint8))


def _image(picture: UInt8[Tensor, "3 h w"]) -> Image.Image:
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    scale = SIDE / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
