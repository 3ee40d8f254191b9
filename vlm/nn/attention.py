"""Self-attention with grouped key/value heads, and cross-attention to an image.

Letters: B batch, S sequence, D width, H heads, G key/value heads, K head width, N image tokens, C image width.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vlm.nn.rotary import Angles, rotate
from vlm.nn.route import call
from vlm.nn.state import KeyValue, LayerState
from vlm.nn.tokens import Tokens, Visibility


class Context(NamedTuple):
    """What one forward pass works out once and all its blocks share."""

    tokens: Tokens
    visibility: Visibility
    angles: Angles | None


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
        self, dim: int, heads: int, kv_heads: int | None = None, bias: bool = False, out_bias: bool | None = None
    ) -> None:
        """`bias` is for the query, key and value projections; `out_bias` follows it unless given."""
        super().__init__()
        self.head_dim = head_width(dim, heads)
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={heads}")
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias if out_bias is None else out_bias)

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, past: LayerState | None = None
    ) -> tuple[Float[Tensor, "B S D"], KeyValue]:
        """Output, and the keys and values of everything seen so far."""
        assert past is None or isinstance(past, KeyValue), "this state was made by another kind of mixer"
        tokens = context.tokens
        query = split_heads(call(self.query, x, tokens), self.heads)
        key = split_heads(call(self.key, x, tokens), self.kv_heads)
        value = split_heads(call(self.value, x, tokens), self.kv_heads)
        if context.angles is not None:
            query, key = rotate(query, context.angles), rotate(key, context.angles)
        present = KeyValue(key, value) if past is None else past.extend(key, value)
        y = scaled_dot_product_attention(
            query,
            present.key,
            present.value,
            attn_mask=context.visibility.mask,
            is_causal=context.visibility.is_causal,
            enable_gqa=self.kv_heads != self.heads,
        )
        return call(self.out, merge_heads(y), tokens), present


class CrossAttention(nn.Module):
    """Attention from tokens to an image; the image's keys and values can be made once and used often."""

    def __init__(self, dim: int, image_dim: int, heads: int, bias: bool = True) -> None:
        """`dim`: width of the tokens; `image_dim`: width of the image tokens."""
        super().__init__()
        self.heads = heads
        head_width(dim, heads)
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(image_dim, dim, bias=bias)
        self.value = nn.Linear(image_dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def project(self, image: Float[Tensor, "B N C"]) -> "ImageKeyValue":
        """Keys and values of an image."""
        return ImageKeyValue(split_heads(self.key(image), self.heads), split_heads(self.value(image), self.heads))

    def forward(self, x: Float[Tensor, "B S D"], image: "ImageKeyValue") -> Float[Tensor, "B S D"]:
        """Every token looks at every image token."""
        y = scaled_dot_product_attention(split_heads(self.query(x), self.heads), image.key, image.value)
        out: Tensor = self.out(merge_heads(y))
        return out


class ImageKeyValue(NamedTuple):
    """One cross-attention's view of a batch of images."""

    key: Float[Tensor, "B H N K"]
    value: Float[Tensor, "B H N K"]

    def select(self, index: Int[Tensor, "R"]) -> "ImageKeyValue":
        """Rows picked by index, with repeats."""
        return ImageKeyValue(self.key[index], self.value[index])


def split_heads(x: Float[Tensor, "B S D"], heads: int) -> Float[Tensor, "B H S K"]:
    """B S (H K) to B H S K."""
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H S K"]) -> Float[Tensor, "B S D"]:
    """B H S K to B S (H K)."""
    return x.transpose(1, 2).flatten(2)
