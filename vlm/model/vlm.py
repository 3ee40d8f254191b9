"""The vision-language model: an image encoder, a connector, and whichever text side and heads a system has.

Letters: B images, N image tokens, Q connector tokens, M texts, T text tokens, E embedding width, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.data.batch import Text
from vlm.data.image import ImageTransform
from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.language import Language, splice
from vlm.model.qformer import QFormer
from vlm.model.seq2seq import EncoderDecoder
from vlm.model.text import TextTower
from vlm.nn.block import ImageMemory, Output
from vlm.nn.state import State
from vlm.nn.tokens import IMAGE_ID, Tokens, count_positions

M = TypeVar("M")


@dataclass(frozen=True)
class Seen:
    """What a model has of a batch of images after looking once; every objective and every text reuses it."""

    soft: Float[Tensor, "B Q D"]  # the connector's tokens
    memory: ImageMemory | None = None  # the image as a Q-Former's cross-attentions see it
    state: State | None = None  # a Q-Former's queries as a past that text can continue

    def select(self, index: Int[Tensor, "R"]) -> "Seen":
        """Rows picked by index, with repeats: one image against many texts."""
        return Seen(
            self.soft[index],
            None if self.memory is None else self.memory.select(index),
            None if self.state is None else self.state.reorder(index),
        )


@runtime_checkable
class ImageEncoder(Protocol):
    """What is asked of an image encoder; a module of the user's own fits without registering anything."""

    transform: ImageTransform
    dim: int
    tokens: int

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N C"]:
        """Image tokens."""
        ...


@runtime_checkable
class Connector(Protocol):
    """What is asked of a connector."""

    dim: int
    tokens: int

    def __call__(self, image: Float[Tensor, "B N C"]) -> Float[Tensor, "B Q D"]:
        """Tokens for whatever reads the image."""
        ...


class VisionLanguageModel(nn.Module):
    """Any system made of these parts; a part that a system lacks is None, and what needs it says so.

    CLIP: vision, pooling connector, text, contrast. BLIP-2 stage 1: vision, Q-Former, contrast, match.
    BLIP-2 stage 2, LLaVA: vision, connector, language. Pretraining on text: language.
    """

    def __init__(
        self,
        vision: ImageEncoder | None = None,
        connector: Connector | None = None,
        text: TextTower | None = None,
        language: Language | None = None,
        contrast: ContrastiveHead | None = None,
        match: MatchingHead | None = None,
    ) -> None:
        """`vision` maps images to tokens and `connector` those to the width of what reads them.

        Without the two it is a language model on text alone.
        """
        super().__init__()
        self.vision, self.connector = vision, connector
        self.text, self.language = text, language
        self.contrast, self.match = contrast, match

    def see(self, images: Tensor, instruction: Text | None = None) -> Seen:
        """Looks at the images once; as of `encode` and `connect`."""
        return self.connect(self.encode(images), instruction)

    def encode(self, images: Tensor) -> Float[Tensor, "B N C"]:
        """Image tokens of normalised pixels (B 3 H W), or features that the encoder gave before (B N C) as they are."""
        if images.ndim == 3:
            return images.float()
        return need(self.vision, "image encoder")(images)

    def connect(self, image: Float[Tensor, "B N C"], instruction: Text | None = None) -> Seen:
        """Runs the connector on image tokens (from `vision`, or a cache of it).

        `instruction`: what a Q-Former reads while it looks at each image (InstructBLIP), in its own vocabulary.
        """
        if instruction is not None:
            qformer = self._qformer("an instruction beside the image")
            return Seen(qformer.out(qformer.fuse(qformer.look(image), instruction.ids, instruction.valid)))
        if not isinstance(self.connector, QFormer):
            return Seen(need(self.connector, "connector")(image))
        memory = self.connector.look(image)
        queries = self.connector.query(memory, len(image))
        return Seen(self.connector.out(queries.hidden), memory, queries.state)

    def embed_image(self, seen: Seen) -> Float[Tensor, "B Q E"]:
        """Unit vectors for contrastive similarity, one or several per image."""
        return need(self.contrast, "contrastive head").embed_image(seen.soft)

    def embed_text(self, text: Text) -> Float[Tensor, "M E"]:
        """Unit vectors for contrastive similarity."""
        feature: Tensor
        if self.text is not None:
            feature = self.text(text.ids, text.valid)
        else:
            feature = self._qformer("ITC without a text encoder").read(text.ids, text.valid)[:, 0]
        return need(self.contrast, "contrastive head").embed_text(feature)

    def match_logits(self, seen: Seen, text: Text) -> Float[Tensor, "M 2"]:
        """Do row m's image and text m belong together? Two logits: apart, together."""
        qformer = self._qformer("ITM")
        assert seen.memory is not None
        logits: Tensor = need(self.match, "matching head")(qformer.fuse(seen.memory, text.ids, text.valid))
        return logits

    def write(self, seen: Seen | None, text: Text) -> Output:
        """Hidden states (M T D) of text m after row m's image: what `logits` turns into next-token logits.

        `seen` is None for text alone; `proceed` continues from the state. An encoder-decoder reads image and text, and
        the states are those of `text.reply`. ValueError: it has none.
        """
        if isinstance(self.language, EncoderDecoder):
            memory = self.language.read(_spliced(self.language, seen, text, causal=False))
            reply: Output = self.language(_spliced(self.language, None, _reply(text), causal=True), None, memory)
            return reply
        if self.language is not None:
            written: Output = self.language(_spliced(self.language, seen, text, causal=True))
            return written
        qformer = self._qformer("LM without a language model")
        assert seen is not None and seen.state is not None
        start = torch.zeros_like(seen.state.position)
        out = qformer.write(text.ids, text.valid, seen.state, start)
        return out._replace(state=replace(out.state, position=count_positions(text.valid).amax(1) + 1))

    def proceed(self, ids: Int[Tensor, "M 1"], state: State) -> tuple[Float[Tensor, "M V"], State]:
        """Logits after one more token of each row."""
        if self.language is not None:
            tokens = Tokens.of(self.language.embed(ids), causal=True, position=state.position[:, None])
            out = self.language(tokens, state)
        else:
            qformer = self._qformer("LM without a language model")
            if qformer.text is not None and int(state.position.max()) >= qformer.text.max_tokens:
                raise ValueError(f"this Q-Former writes at most {qformer.text.max_tokens} tokens: lower max_new")
            out = qformer.write(ids, torch.ones_like(ids, dtype=torch.bool), state, state.position)
        return self.logits(out.hidden[:, -1]), out.state

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits of hidden states from `write`."""
        if self.language is not None:
            return self.language.logits(hidden)
        return self._qformer("LM without a language model").logits(hidden)

    @property
    def image_tokens(self) -> int:
        """Placeholders that one image takes in the text of the language model; 0 where text follows queries."""
        return 0 if self.language is None or self.connector is None else self.connector.tokens

    @property
    def reply_start(self) -> int | None:
        """The token that begins what an encoder-decoder writes; None where prompt and answer are one text."""
        return self.language.start if isinstance(self.language, EncoderDecoder) else None

    def _qformer(self, purpose: str) -> QFormer:
        if not isinstance(self.connector, QFormer):
            raise ValueError(f"{purpose} needs model.connector.kind=qformer, not {type(self.connector).__name__}")
        return self.connector


def _spliced(language: Language, seen: Seen | None, text: Text, causal: bool) -> Tokens:
    """The text embedded, with its images in it."""
    x = language.embed(text.ids)
    if seen is not None:
        x = splice(x, text.ids, seen.soft, IMAGE_ID)
    return Tokens.of(x, causal=causal, valid=None if text.full else text.valid)


def _reply(text: Text) -> Text:
    if text.reply is None:
        raise ValueError(
            "this language model is an encoder-decoder, which writes its answer apart from the prompt: the text "
            "needs a reply that begins with its start token (collate makes it when told reply_start)"
        )
    return text.reply


def need(module: M | None, name: str) -> M:
    """The module, or an error in words that this model has none."""
    if module is None:
        raise ValueError(f"this model has no {name}: it was built for other objectives")
    return module


def last_valid(hidden: Float[Tensor, "M T D"], valid: Bool[Tensor, "M T"]) -> Float[Tensor, "M D"]:
    """Each row's state at its last valid token, whichever side the padding is on."""
    column = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, column, -1).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
