"""CoCa (Yu et al. 2022, arXiv 2205.01917) as open_clip publishes it: contrastive towers whose text side also captions.

Letters: B images, N image tokens, M texts, T text tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from vlm.data.batch import Text
from vlm.model.connector import AttentionPool
from vlm.model.heads import ContrastiveHead
from vlm.model.vlm import ImageEncoder, Seen, VisionLanguageModel
from vlm.nn.attention import Attention, CrossAttention, ImageKeyValue
from vlm.nn.block import Block, Output, PreNorm, Stack
from vlm.nn.context import Context
from vlm.nn.ffn import Mlp
from vlm.nn.state import KeyValue, LayerState, State
from vlm.nn.tokens import Tokens, count_positions


@dataclass(frozen=True)
class Looked:
    """An image as a mixer's memory: text that goes on from it changes nothing of it."""

    image: ImageKeyValue

    def reorder(self, index: Int[Tensor, "R"]) -> "Looked":
        """Rows picked by index, with repeats."""
        return Looked(self.image.select(index))

    def crop(self, drop: int) -> "Looked":
        """Itself: it holds no tokens of the text."""
        return self

    def disposable(self) -> "Looked":
        """Itself."""
        return self


class LookAt(nn.Module):
    """Cross-attention in the place of a mixer: what it remembers is the image, before the first word and for ever."""

    def __init__(self, dim: int, image_dim: int, heads: int, image_norm: nn.Module) -> None:
        """`image_norm`: what the image's tokens pass first."""
        super().__init__()
        self.attention, self.image_norm = CrossAttention(dim, image_dim, heads), image_norm

    def look(self, image: Float[Tensor, "B N C"]) -> Looked:
        """The memory to begin with."""
        return Looked(self.attention.project(self.image_norm(image)))

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, past: LayerState | None
    ) -> tuple[Float[Tensor, "B S D"], LayerState]:
        """Every token looks at the whole image."""
        assert isinstance(past, Looked)
        out: Tensor = self.attention(x, past.image)
        return out, past


@dataclass(frozen=True)
class _ClassAtEnd(Tokens):
    """Words and a class token behind them, which sees itself only where it is valid (other tokens always do)."""

    def mask(self, past: Bool[Tensor, "B P"] | None = None) -> Bool[Tensor, "B 1 S T"]:
        """As of `Tokens`, but for the last token's view of itself."""
        seen = super().mask(past).clone()
        seen[:, 0, -1, -1] = self.valid[:, -1]
        return seen


class CaptionDecoder(nn.Module):
    """Two causal halves: one reads words alone, the other looks at the image after every block and writes the caption.

    A class token at the end of the first half is the text's feature.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        max_tokens: int,
        text: Stack,
        decoder: Stack,
        norm: nn.Module,
        pad: int = 0,
    ) -> None:
        """`text`, `decoder`: the halves, the first without a norm at its end; `norm`: the class token's."""
        super().__init__()
        self.dim, self.max_tokens, self.pad = dim, max_tokens, pad
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.empty(max_tokens + 1, dim))  # the last one is the class token's
        self.class_token = nn.Parameter(torch.empty(dim))
        self.text, self.decoder, self.norm = text, decoder, norm
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's initialisation of the embeddings; the linear layers keep torch's."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for parameter in (self.position, self.class_token):
            nn.init.normal_(parameter, std=0.01)

    def read(self, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"]) -> Float[Tensor, "M D"]:
        """The feature of each text, padded on the right.

        Published weights were trained with a padding mask that is shifted by one (open_clip's correct_cls_mask=False):
        a text's first token of padding is seen, and the class token sees itself only if there is no padding at all. The
        rest of the padding, up to `max_tokens`, is seen by nobody and left out.
        """
        if ids.shape[1] < self.max_tokens:
            ids, valid = pad(ids, (0, 1)), pad(valid, (0, 1))
        self._refuse_beyond(ids.shape[1])
        words = self.embedding(ids.masked_fill(~valid, self.pad)) + self.position[: ids.shape[1]]
        last = (self.class_token + self.position[-1]).expand(len(ids), 1, -1)
        seen = pad(valid, (1, 0), value=True)
        tokens = Tokens.of(torch.cat([words, last], 1), causal=True, valid=seen)
        hidden: Tensor = self.text(_ClassAtEnd(**tokens.__dict__)).hidden
        out: Tensor = self.norm(hidden[:, -1])
        return out

    def look(self, image: Float[Tensor, "B N D"]) -> State:
        """Images as a past that captions can continue."""
        mixers = [block.mixer for block in (*self.text.blocks, *self.decoder.blocks)]
        looked = {i: mixer.look(image) for i, mixer in enumerate(mixers) if isinstance(mixer, LookAt)}
        like = next(iter(looked.values())).image.key
        layers = [looked[i] if i in looked else _nothing(mixer, like) for i, mixer in enumerate(mixers)]
        start = torch.zeros(len(image), dtype=torch.long, device=image.device)
        return State(tuple(layers), torch.ones(len(image), 0, dtype=torch.bool, device=image.device), start, full=True)

    def write(self, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"] | None, state: State) -> Output:
        """Hidden states of words that follow those in `state`; `valid`: None if there is no padding."""
        shown = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        position = count_positions(shown) + state.position[:, None]
        self._refuse_beyond(int(position.max()) + 1)
        tokens = Tokens.of(self.embedding(ids) + self.position[position], causal=True, valid=valid, position=position)
        half = len(self.text.blocks)
        words = self.text(tokens, None, replace(state, layers=state.layers[:half]))
        out = self.decoder(replace(tokens, x=words.hidden), None, replace(state, layers=state.layers[half:]))
        return Output(out.hidden, replace(out.state, layers=words.state.layers + out.state.layers))

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits."""
        out: Tensor = self.head(hidden)
        return out

    def _refuse_beyond(self, length: int) -> None:
        if length > self.max_tokens:
            raise ValueError(f"this CoCa reads and writes {self.max_tokens} tokens, not {length}: shorten the text")


def _nothing(mixer: Attention, like: Tensor) -> KeyValue:
    """Keys and values of no tokens."""
    empty = like.new_empty(len(like), mixer.kv_heads, 0, mixer.head_dim)
    return KeyValue(empty, empty)


def caption_decoder(
    vocabulary: int,
    dim: int,
    max_tokens: int,
    layers: tuple[int, int],
    heads: tuple[int, int],
    hidden: tuple[int, int],
    activation: Callable[[], nn.Module] = nn.GELU,
    pad: int = 0,
) -> CaptionDecoder:
    """Pre-norm halves of so many layers; each of the second is a causal block and then one that looks at the image."""

    def block(mixer: nn.Module, inside: int) -> Block:
        return Block(mixer, Mlp(dim, inside, activation()), PreNorm(nn.LayerNorm(dim)), PreNorm(nn.LayerNorm(dim)))

    def pair() -> list[Block]:
        looks = LookAt(dim, dim, heads[1], nn.LayerNorm(dim))
        return [block(Attention(dim, heads[1], bias=True), hidden[1]), block(looks, hidden[1])]

    text = Stack([block(Attention(dim, heads[0], bias=True), hidden[0]) for _ in range(layers[0])])
    decoder = Stack([each for _ in range(layers[1]) for each in pair()], norm=nn.LayerNorm(dim))
    return CaptionDecoder(vocabulary, dim, max_tokens, text, decoder, nn.LayerNorm(dim), pad)


class CoCa(VisionLanguageModel):
    """The pool's first query is the image's feature; its others are what captions look at."""

    def __init__(
        self, vision: ImageEncoder, connector: AttentionPool, caption: CaptionDecoder, contrast: ContrastiveHead
    ) -> None:
        """`connector` ends at the width of `caption`."""
        super().__init__(vision, connector, contrast=contrast)
        self.caption = caption

    def connect(self, image: Float[Tensor, "B N C"], instruction: Text | None = None) -> Seen:
        """Runs the pool. ValueError: an instruction, which it does not read."""
        if instruction is not None:
            raise ValueError("CoCa reads no instruction beside the image")
        assert isinstance(self.connector, AttentionPool)
        pooled = self.connector(image)
        return Seen(pooled[:, :1], state=self.caption.look(pooled[:, 1:]))

    def embed_text(self, text: Text) -> Float[Tensor, "M E"]:
        """Unit vectors for contrastive similarity."""
        assert self.contrast is not None
        return self.contrast.embed_text(self.caption.read(text.ids, text.valid))

    def write(self, seen: Seen | None, text: Text) -> Output:
        """Hidden states (M T D) of text m after row m's image. ValueError: text without an image."""
        if seen is None or seen.state is None:
            raise ValueError("CoCa writes about an image, and was given none")
        return self.caption.write(text.ids, None if text.full else text.valid, seen.state)

    def proceed(self, ids: Int[Tensor, "M 1"], state: State) -> tuple[Float[Tensor, "M V"], State]:
        """Logits after one more token of each row."""
        out = self.caption.write(ids, None, state)
        return self.logits(out.hidden[:, -1]), out.state

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits of hidden states from `write`."""
        return self.caption.logits(hidden)
