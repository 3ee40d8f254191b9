"""Language backbones: a causal decoder over the common stack (Llama's by default).

Letters: B batch, S sequence, T text tokens, D width, V vocabulary, K chosen positions.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.nn.attention import Attention
from vlm.nn.block import Block, Output, PreNorm, Stack
from vlm.nn.ffn import GatedMlp
from vlm.nn.rotary import Rotary
from vlm.nn.state import State
from vlm.nn.tokens import Tokens


@runtime_checkable
class Language(Protocol):
    """What a language model offers to the rest; a module of the user's own fits without registering anything."""

    dim: int

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings of token ids."""
        ...

    def __call__(self, tokens: Tokens, state: State | None = None) -> Output:
        """Hidden states of tokens that follow those in `state`."""
        ...

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits of hidden states."""
        ...


class Decoder(nn.Module):
    """Embedding, stack and vocabulary head, tied or not."""

    def __init__(self, vocabulary: int, stack: Stack, dim: int, tied: bool = True) -> None:
        """`stack`: blocks with their final norm; `tied`: the head is the transposed embedding."""
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(vocabulary, dim)
        self.stack = stack
        self.head = None if tied else nn.Linear(dim, vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Llama's initialisation: normal with deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings of token ids; a negative id (an image's placeholder) gives any row, to be overwritten."""
        out: Tensor = self.embedding(ids.clamp_min(0))
        return out

    def forward(self, tokens: Tokens, state: State | None = None) -> Output:
        """Hidden states after the final norm."""
        out: Output = self.stack(tokens, None, state)
        return out

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return nn.functional.linear(hidden, weight)


def llama(
    vocabulary: int,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    hidden: int | None = None,
    theta: float = 10_000.0,
    eps: float = 1e-5,
    tied: bool = True,
    dropout: float = 0.0,
) -> Decoder:
    """A Llama-like decoder: RMSNorm, rotary positions, grouped key/value heads, SwiGLU (arXiv 2302.13971).

    `hidden`: width inside the FFN; unless given, 8/3 dim rounded up to a multiple of 32, as Llama does.
    """
    width = -(-8 * dim // (3 * 32)) * 32 if hidden is None else hidden

    def norm() -> nn.Module:
        return nn.RMSNorm(dim, eps=eps)

    blocks = [
        Block(
            Attention(dim, heads, kv_heads),
            GatedMlp(dim, width),
            PreNorm(norm(), dropout),
            PreNorm(norm(), dropout),
        )
        for _ in range(layers)
    ]
    return Decoder(vocabulary, Stack(blocks, norm(), Rotary(dim // heads, theta)), dim, tied)


def splice(
    embedded: Float[Tensor, "B S D"], ids: Int[Tensor, "B S"], image: Float[Tensor, "B Q D"], image_id: int
) -> Float[Tensor, "B S D"]:
    """Puts each row's image tokens where its ids hold the placeholder, in order.

    Every row must hold as many placeholders as there are image tokens.
    """
    slots = ids == image_id
    found: list[int] = slots.sum(1).tolist()
    if found != [image.shape[1]] * len(image):
        tokens = f"{len(image)} images of {image.shape[1]} tokens each"
        raise ValueError(f"image placeholders in the rows of the text: {found}, for {tokens}")
    return embedded.masked_scatter(slots[..., None], image.to(embedded.dtype))
