"""Self-attention with grouped key/value heads, and cross-attention to an image or to a text.

Letters: B batch, S sequence, D width, H heads, G key/value heads, K head width, N image tokens, C image width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vlm.nn.context import Context
from vlm.nn.layout import project
from vlm.nn.rotary import rotate
from vlm.nn.route import call
from vlm.nn.state import LayerState
from vlm.nn.window import Everything, Window


def head_width(dim: int, heads: int) -> int:
    """Width of a head, or an error that names both numbers."""
    if dim % heads:
        raise ValueError(f"heads={heads} does not divide dim={dim}: choose heads among the divisors of dim")
    return dim // heads


class Attention(nn.Module):
    """Multi-head self-attention; fewer key/value heads than heads make it grouped-query (1: multi-query).

    Sources: Vaswani et al. 2017 (arXiv 1706.03762), Ainslie et al. 2023 (arXiv 2305.13245).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        key_bias: bool | None = None,
        head_dim: int | None = None,
        norm: Callable[[int], nn.Module] | None = None,
        window: int | None = None,
        rotated: bool = True,
        scale: float | None = None,
    ) -> None:
        """`bias`: of the query, key and value projections; `out_bias` and `key_bias` follow it unless given.

        `head_dim`: width of a head, dim / heads unless given. `norm`: of each query and key head before they are
        rotated, made from its width (Qwen3). `window`: how many tokens a query sees, itself included (Mistral).
        `rotated`: False leaves out the stack's rotary positions (some blocks of SmolLM3).
        `scale`: of the scores, 1 / sqrt(head_dim) unless given (T5: 1).
        """
        super().__init__()
        self.head_dim = head_width(dim, heads) if head_dim is None else head_dim
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            remedy = "choose it among the divisors of heads"
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={heads}: {remedy}")
        key_bias, out_bias = (bias if given is None else given for given in (key_bias, out_bias))
        self.query = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.key = nn.Linear(dim, self.kv_heads * self.head_dim, bias=key_bias)
        self.value = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=out_bias)
        self.query_norm, self.key_norm = (None if norm is None else norm(self.head_dim) for _ in range(2))
        self.memory: Everything | Window = Everything() if window is None else Window(window)
        self.rotated = rotated
        self.scale = scale

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, past: LayerState | None = None
    ) -> tuple[Float[Tensor, "B S D"], LayerState]:
        """Output, and what is to be remembered of everything seen so far."""
        tokens = context.tokens
        query, key, value = project(self.readers(), x, tokens)
        query = self._heads(query, self.query_norm, x.dtype)
        key = self._heads(key, self.key_norm, x.dtype)
        value = split_heads(value, self.kv_heads)
        if context.angles is not None and self.rotated:
            query, key = rotate(query, context.angles), rotate(key, context.angles)
        state, key, value, (mask, is_causal), trunk = self.memory(past, key, value, context)
        if trunk is not None:
            y = attend_branches(query, (trunk.key, trunk.value), (key, value), mask, self.scale)
        else:
            y = attend(query, key, value, mask, is_causal, self.scale, grouped=self.kv_heads != self.heads)
        return call(self.out, merge_heads(y), tokens), state

    def readers(self) -> tuple[nn.Module, ...]:
        """The layers that read the same input (`layout.Readers`)."""
        return self.query, self.key, self.value

    def _heads(self, rows: Tensor, norm: nn.Module | None, dtype: torch.dtype) -> Tensor:
        heads = rows.view(*rows.shape[:2], -1, self.head_dim)
        if norm is not None:  # in the type of its gain, which autocast leaves alone as it does the input's
            heads = norm(heads.to(dtype)).to(rows.dtype)
        return heads.transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention from tokens to an image, or to what an encoder made of a text.

    The keys and values of what is looked at can be made once and used often.
    """

    def __init__(
        self,
        dim: int,
        image_dim: int,
        heads: int,
        bias: bool = True,
        head_dim: int | None = None,
        scale: float | None = None,
    ) -> None:
        """`dim`: width of the tokens; `image_dim`: of what they look at; `head_dim` and `scale` as of `Attention`."""
        super().__init__()
        self.heads, self.scale = heads, scale
        inner = heads * (head_width(dim, heads) if head_dim is None else head_dim)
        self.query = nn.Linear(dim, inner, bias=bias)
        self.key = nn.Linear(image_dim, inner, bias=bias)
        self.value = nn.Linear(image_dim, inner, bias=bias)
        self.out = nn.Linear(inner, dim, bias=bias)

    def project(self, image: Float[Tensor, "B N C"], valid: Bool[Tensor, "B N"] | None = None) -> "ImageKeyValue":
        """Keys and values of what is looked at; `valid` is False where it is padding."""
        key, value = split_heads(self.key(image), self.heads), split_heads(self.value(image), self.heads)
        return ImageKeyValue(key, value, None if valid is None else valid[:, None, None])

    def forward(self, x: Float[Tensor, "B S D"], image: "ImageKeyValue") -> Float[Tensor, "B S D"]:
        """Every token looks at all that is not padding."""
        query = split_heads(self.query(x), self.heads)
        y = attend(query, image.key, image.value, image.seen, scale=self.scale)
        out: Tensor = self.out(merge_heads(y))
        return out


class ImageKeyValue(NamedTuple):
    """One cross-attention's view of a batch of images or texts."""

    key: Float[Tensor, "B H N K"]
    value: Float[Tensor, "B H N K"]
    seen: Bool[Tensor, "B 1 1 N"] | None = None  # None: all of it

    def select(self, index: Int[Tensor, "R"]) -> "ImageKeyValue":
        """Rows picked by index, with repeats."""
        return ImageKeyValue(self.key[index], self.value[index], None if self.seen is None else self.seen[index])


def attend(
    query: Float[Tensor, "B H S K"],
    key: Float[Tensor, "B G T K"],
    value: Float[Tensor, "B G T K"],
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> Float[Tensor, "B H S K"]:
    """torch's attention; `mask` as in `Visibility`, `grouped`: fewer key heads than query heads.

    One bf16 query on a CPU is computed in fp32: there the cast of all keys and torch's kernel for fp32 take less than
    half the time of its kernel for bf16.
    """
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.shape[2] == 1 and query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    y = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return y.to(dtype)


def attend_branches(
    query: Float[Tensor, "R H 1 K"],
    trunk: tuple[Float[Tensor, "B G P K"], Float[Tensor, "B G P K"]],
    own: tuple[Float[Tensor, "R G T K"], Float[Tensor, "R G T K"]],
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "R H 1 K"]:
    """`attend` for one query of each branch (`Branched`): the keys of a trunk are read once for all its branches.

    `mask`: over P + T columns. Computed in the trunk's type.
    """
    key, value = trunk
    (batch, groups, past, width), rows, heads = key.shape, len(query), query.shape[1]
    dtype, query = query.dtype, query.to(key.dtype).reshape(rows, groups, -1, width)
    together = query.view(batch, rows // batch, groups, -1, width).transpose(1, 2)  # B G W h K
    shared = (together.flatten(2, 3) @ key.mT).view(batch, groups, rows // batch, -1, past).transpose(1, 2)
    apart = query @ own[0].to(key.dtype).mT
    scores = torch.cat([shared.flatten(0, 1), apart], 3) * (width**-0.5 if scale is None else scale)
    if mask is not None:
        mask = mask.expand(rows, heads, 1, -1).view_as(scores)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(3)
    shared = weights[..., :past].unflatten(0, (batch, -1)).transpose(1, 2)  # B G W h P
    y: Tensor = (
        (shared.flatten(2, 3) @ value).view(batch, groups, rows // batch, -1, width).transpose(1, 2).flatten(0, 1)
    )
    y += weights[..., past:] @ own[1].to(key.dtype)
    return y.reshape(rows, heads, 1, width).to(dtype)


def split_heads(x: Float[Tensor, "B S D"], heads: int) -> Float[Tensor, "B H S K"]:
    """B S (H K) to B H S K."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H S K"]) -> Float[Tensor, "B S D"]:
    """B H S K to B S (H K)."""
    return x.transpose(1, 2).flatten(2)
