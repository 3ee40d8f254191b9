"""Encoder-decoder language models: one stack reads image and prompt both ways, the other writes the answer.

T5 and Flan-T5 (Raffel et al. 2020, arXiv 1910.10683; Chung et al. 2022, arXiv 2210.11416) as settings of it.
Letters: B batch, S sequence, T text tokens, D width, V vocabulary, K chosen positions.
"""

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.nn.attention import Attention, CrossAttention
from vlm.nn.block import Block, Cross, ImageMemory, Output, PreNorm, Stack
from vlm.nn.ffn import Mlp
from vlm.nn.norm import RMSNorm
from vlm.nn.relative import Bucket, RelativeBias, backwards, both_ways
from vlm.nn.state import State
from vlm.nn.tokens import Route, Tokens


class EncoderDecoder(nn.Module):
    """A `Language` that reads before it writes; embeddings are shared, the vocabulary head tied to them or not."""

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        encoder: Stack,
        decoder: Stack,
        tied: bool = True,
        scale: float = 1.0,
        start: int = 0,
    ) -> None:
        """`decoder`: blocks with cross-attention to the states of `encoder`. `scale`: of the states before the head.

        `start`: the token that every answer begins with (T5: the padding token).
        """
        super().__init__()
        self.dim, self.vocabulary, self.scale, self.start = dim, vocabulary, scale, start
        self.embedding = nn.Embedding(vocabulary, dim)
        self.encoder, self.decoder = encoder, decoder
        self.head: nn.Module | None = None if tied else nn.Linear(dim, vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's initialisation: outputs of unit variance, and queries so small that scores need no scaling.

        Only the untied head is smaller than published, so that training starts at chance.
        """
        nn.init.normal_(self.embedding.weight)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, RelativeBias):
                nn.init.normal_(module.table.weight, std=self.dim**-0.5)
        for module in self.modules():
            if isinstance(module, Attention | CrossAttention):
                module.query.weight.data.mul_((module.query.out_features / module.heads) ** -0.5)

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings of token ids; a negative id (an image's placeholder) gives any row, to be overwritten."""
        out: Tensor = self.embedding(ids.clamp_min(0))
        return out

    def read(self, tokens: Tokens) -> ImageMemory:
        """What the decoder sees of tokens that may all look at each other (not causal): made once for each prompt."""
        hidden = self.encoder(tokens).hidden
        return self.decoder.look(hidden, None if tokens.full else tokens.valid)

    def forward(self, tokens: Tokens, state: State | None = None, memory: ImageMemory | None = None) -> Output:
        """Hidden states of the answer's tokens, after the final norm.

        The first call takes the `memory` that `read` gave, later ones find it in the state. ValueError: neither.
        """
        known = memory if memory is not None or state is None else state.beside
        if not isinstance(known, ImageMemory):
            raise ValueError("an encoder-decoder writes about what it has read: pass the memory that `read` gives")
        out: Output = self.decoder(tokens, known, state)
        return out._replace(state=replace(out.state, beside=known))

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits."""
        scaled = hidden if self.scale == 1.0 else hidden * self.scale
        if self.head is None:
            return nn.functional.linear(scaled, self.embedding.weight)
        out: Tensor = self.head(scaled)
        return out


def t5(
    vocabulary: int,
    dim: int,
    layers: int,
    heads: int,
    head_dim: int | None = None,
    hidden: int | None = None,
    *,
    decoder_layers: int | None = None,
    ffn: Callable[[], nn.Module] | None = None,
    buckets: int = 32,
    longest: int = 128,
    eps: float = 1e-6,
    tied: bool = True,
    dropout: float = 0.0,
    start: int = 0,
) -> EncoderDecoder:
    """T5: RMSNorm before the branches, no bias anywhere, unscaled scores, relative positions shared by all blocks.

    `hidden`: width inside the FFN, 4 dim unless given. `ffn`: makes a block's in place of T5 1.0's ReLU; T5 1.1 and
    Flan-T5: `lambda: GatedMlp(dim, hidden, nn.GELU("tanh"))` and `tied=False`; in LAVIS' BLIP-2 with exact `nn.GELU()`.
    A tied head reads states divided by sqrt(dim). `buckets`, `longest`: as of `RelativeBias`.
    """
    width = 4 * dim if hidden is None else hidden

    def residual() -> PreNorm:
        return PreNorm(RMSNorm(dim, eps=eps), dropout)

    def block(cross: bool) -> Block:
        looks = CrossAttention(dim, dim, heads, bias=False, head_dim=head_dim, scale=1.0) if cross else None
        return Block(
            Attention(dim, heads, head_dim=head_dim, scale=1.0),
            Mlp(dim, width, nn.ReLU(), bias=False) if ffn is None else ffn(),
            residual(),
            residual(),
            None if looks is None else Cross(looks, residual(), Route.TEXT),
        )

    def stack(count: int, bucket: Bucket, cross: bool) -> Stack:
        relative = RelativeBias(heads, bucket, buckets, longest)
        return Stack([block(cross) for _ in range(count)], RMSNorm(dim, eps=eps), relative=relative)

    encoder = stack(layers, both_ways, cross=False)
    decoder = stack(layers if decoder_layers is None else decoder_layers, backwards, cross=True)
    return EncoderDecoder(vocabulary, dim, encoder, decoder, tied, dim**-0.5 if tied else 1.0, start)
