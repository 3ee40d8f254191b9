"""BLIP-2's Q-Former, heads and projection as Hugging Face and LAVIS name them, for ours."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.model.weights.rows import Row, linear
from vlm.model.weights.table import Table, system


class Names(NamedTuple):
    """How a layout spells the parts of its Q-Former."""

    blocks: str
    attention: str  # inside "attention." and "crossattention."
    norm: str  # of the embeddings
    words: str


HUGGING_FACE = Names("qformer.encoder.layer.{i}", "attention", "qformer.layernorm", "embeddings")
INSTRUCTBLIP = HUGGING_FACE._replace(norm="qformer.embeddings.layernorm", words="qformer.embeddings")
LAVIS = Names("Qformer.bert.encoder.layer.{i}", "self", "Qformer.bert.embeddings.LayerNorm", "Qformer.bert.embeddings")


class Unbatched:
    """Published with a leading axis of one."""

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Without it. ValueError for several rows."""
        if theirs[0].shape[0] != 1:
            raise ValueError(f"a tensor of shape {tuple(theirs[0].shape)} was to have one row")
        return (theirs[0][0],)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """With it."""
        return (ours[0][None],)


class Temperature:
    """A temperature τ (a scalar), of which we learn log 1/τ."""

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """log 1/τ. ValueError where τ is not positive."""
        if not theirs[0].is_meta and not bool(theirs[0] > 0):
            raise ValueError(f"a temperature of {theirs[0].item():g}: it must be above 0")
        return (-theirs[0].double().log().to(theirs[0].dtype).reshape(1),)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """τ, equal but for rounding to what was read."""
        return ((-ours[0].double()).exp().to(ours[0].dtype).reshape(()),)


@dataclass(frozen=True)
class Beside:
    """A tensor as it is, and one of ours (one axis) that no file has, with what it is after reading one."""

    value: tuple[float, ...]

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Both."""
        return theirs[0], torch.tensor(self.value)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """The one that is published, whatever has become of the other."""
        return (ours[0],)


class Shared:
    """One tensor under several published names."""

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """The first. ValueError where the others differ from it."""
        if not all(other.is_meta or torch.equal(theirs[0], other) for other in theirs[1:]):
            raise ValueError("tensors that should be one and the same (the embedding and the head tied to it) differ")
        return (theirs[0],)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Copies, because a file may not hold views of one storage."""
        return tuple(ours[0].clone() for _ in range(count))


def blip2_table(vision: Table, language: Table, names: Names = HUGGING_FACE) -> Table:
    """A `Blip2ForConditionalGeneration`, or with names of INSTRUCTBLIP an `InstructBlipForConditionalGeneration`.

    `vision` and `language`: the tables of these parts alone.
    """
    rest = projection_table("language_projection"), language.under("language_model.", "language.")
    return system("BLIP-2", *_front(vision, names), *rest)


def retrieval_table(vision: Table) -> Table:
    """A `Blip2ForImageTextRetrieval`: the heads of stage 1 but that for words.

    Its scores are cosines, which is our contrastive head at a temperature of 1.
    """
    scaled = Row("vision_projection.weight", ("contrast.image.weight", "contrast.log_scale"), Beside((0.0,)))
    heads = [Row("vision_projection.bias", "contrast.image.bias"), *linear("text_projection", "contrast.text")]
    table = Table("heads", (scaled, *heads, *linear("itm_head", "match.classify")))
    return system("BLIP-2 retrieval", *_front(vision, HUGGING_FACE), table)


def _front(vision: Table, names: Names) -> tuple[Table, ...]:
    norm = Table("image norm", tuple(linear("vision_model.post_layernorm", "connector.image_norm")))
    return vision.under("vision_model.", "vision."), qformer_table(names).under("", "connector."), norm


def lavis_qformer_table(names: Iterable[str]) -> Table:
    """LAVIS' Q-Former with its words and the norm before it; `names`: those of the file.

    The head for words is tied to the embedding, and a file may hold the two, and its bias, under a name more.
    """
    words, cls = f"{LAVIS.words}.word_embeddings.weight", "Qformer.cls.predictions"
    more = [name for name in (f"{cls}.decoder.weight", f"{cls}.decoder.bias") if name in set(names)]
    qformer = qformer_table(LAVIS)
    rows = [row for row in qformer.rows if not (isinstance(row, Row) and row.theirs == words)]
    rows += [
        Row((words, *(name for name in more if name.endswith("weight"))), "text.embedding.weight", Shared()),
        Row((f"{cls}.bias", *(name for name in more if name.endswith("bias"))), "text.bias", Shared()),
        *linear(f"{cls}.transform.dense", "text.transform.0"),
        *linear(f"{cls}.transform.LayerNorm", "text.transform.2"),
        *linear("ln_vision", "image_norm"),
    ]
    return Table("Q-Former of LAVIS", tuple(rows), qformer.ignored).under("", "connector.")


def lavis_heads_table() -> Table:
    """The heads of stage 1 as LAVIS keeps them; that for words belongs to the Q-Former."""
    heads = [("vision_proj", "contrast.image"), ("text_proj", "contrast.text"), ("itm_head", "match.classify")]
    rows = [row for a, b in heads for row in linear(a, b)]
    return Table("BLIP-2 heads of LAVIS", (*rows, Row("temp", "contrast.log_scale", Temperature())))


def projection_table(name: str) -> Table:
    """The layer before the language model; `name`: its own in the file."""
    return Table(name, tuple(linear(name, "connector.out")))


def qformer_table(names: Names = HUGGING_FACE) -> Table:
    """The Q-Former of any layout, with "query_tokens" (1 Q D); its words where it has some, its heads apart."""
    theirs, ours = names.blocks, "stack.blocks.{i}"
    routes = [("intermediate", "output", "text"), ("intermediate_query", "output_query", "query")]
    rows = [
        *_attention(f"{theirs}.attention", names.attention, f"{ours}.mixer"),
        *linear(f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer_residual.norm"),
        *_attention(f"{theirs}.crossattention", names.attention, f"{ours}.cross.attention"),
        *linear(f"{theirs}.crossattention.output.LayerNorm", f"{ours}.cross.residual.norm"),
        *linear(names.norm, "embed_norm"),
        Row("query_tokens", "queries", Unbatched()),
        Row(f"{names.words}.word_embeddings.weight", "text.embedding.weight"),
        Row(f"{names.words}.position_embeddings.weight", "text.position.weight"),
    ]
    for up, down, route in routes:
        rows += linear(f"{theirs}.{up}.dense", f"{ours}.ffn.routes.{route}.up")
        rows += linear(f"{theirs}.{down}.dense", f"{ours}.ffn.routes.{route}.down")
        rows += linear(f"{theirs}.{down}.LayerNorm", f"{ours}.ffn_residual.norm.routes.{route}")
    return Table("BLIP-2 Q-Former", tuple(rows), ignored=(re.escape(f"{names.words}.position_ids"),))


def _attention(theirs: str, inner: str, ours: str) -> list[Row]:
    parts = [*((f"{inner}.{name}", name) for name in ("query", "key", "value")), ("output.dense", "out")]
    return [row for a, b in parts for row in linear(f"{theirs}.{a}", f"{ours}.{b}")]
