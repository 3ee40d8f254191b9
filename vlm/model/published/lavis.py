"""BLIP-2, InstructBLIP and MiniGPT-4 from their authors' own files, which hold parts of a system and no settings.

LAVIS saves what was trained: a Q-Former with its heads (stage 1) or its projection (stage 2). The image encoder
(`eva_vit_g.pth`) and the language model (a folder of Hugging Face) lie elsewhere; MiniGPT-4 saves its projection alone.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.language import Language
from vlm.model.published.language import language_part
from vlm.model.published.part import Part
from vlm.model.published.vit import blip2_vit
from vlm.model.qformer import QFormer, TextBranch, bert_transform
from vlm.model.vision import ImageEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.blip2 import lavis_heads_table, lavis_qformer_table, projection_table
from vlm.model.weights.table import Table, system

Weights = Mapping[str, Tensor]  # of a file; only names and shapes are looked at
WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
TEXT = (  # what a Q-Former has for words
    r"Qformer\.cls\..*",
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\..*",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
)
BLOCKS = 39  # of EVA-CLIP's 40: BLIP-2 leaves the last one out
HEAD, EVA_HEAD = 64, 88  # width of an attention's head in BERT and in ViT-g, which no file says
CONTENTS = {  # what a file may hold, by its names
    "vision": re.compile(r"visual_encoder\..*|cls_token|pos_embed|patch_embed\..*|blocks\..*|(fc_)?norm\..*|head\..*"),
    "qformer": re.compile(r"query_tokens|ln_vision\..*|Qformer\..*"),
    "heads": re.compile(r"(vision_proj|text_proj|itm_head)\..*|temp"),
    "projection": re.compile(r"(opt|t5|llm|llama)_proj\..*"),
}


class Assembled(NamedTuple):
    """A system whose parts lie in several files, and the table of each: "main", and the parts given beside it."""

    module: VisionLanguageModel
    tables: Mapping[str, Table]

    @property
    def table(self) -> Table:
        """Of all files as one, a tensor's name in it being that of its file before a slash: "vision/cls_token"."""
        return system("LAVIS", *(table.under(f"{name}/", "") for name, table in self.tables.items()))


def together(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several files as `Assembled.table` names them."""
    return {f"{file}/{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}


def contents(names: Iterable[str]) -> set[str]:
    """What a file of LAVIS or MiniGPT-4 holds: "vision", "qformer", "heads" (of stage 1), "projection"."""
    every = list(names)
    return {part for part, pattern in CONTENTS.items() if any(map(pattern.fullmatch, every))}


def needs(main: Weights, where: str) -> dict[str, str]:
    """The parts that have to come from elsewhere than this file, and what they are, in words."""
    held, wanted = contents(main), dict[str, str]()
    if not held & {"qformer", "projection"}:
        raise ValueError(f"{where}: no file of LAVIS or MiniGPT-4; it holds {', '.join(sorted(main)[:4])}, …")
    if "vision" not in held:
        wanted["vision"] = "the image encoder: eva_vit_g.pth"
    if "qformer" not in held:
        wanted["qformer"] = "the Q-Former: a file of BLIP-2, for MiniGPT-4 blip2_pretrained_flant5xxl.pth"
    if "projection" in held:
        width = _Sizes(main, where)(f"{_projection(main)}.weight", 0)
        wanted["language"] = f"the language model, of width {width}: a folder of Hugging Face"
    return wanted


def lavis_language(values: Mapping[str, Any], where: str) -> Part:
    """The language model as LAVIS runs it: Flan-T5 with the exact GELU, whatever its config.json says."""
    return language_part(lavis_language_values(values), where)


def lavis_language_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a language model, changed to what LAVIS runs."""
    exact = {"dense_act_fn": "gelu"} if values.get("model_type") == "t5" else {}
    return {**values, **exact}


def lavis_system(
    where: str,
    main: Weights,
    others: Mapping[str, Weights] | None = None,
    language: Part | None = None,
) -> Assembled:
    """The system of the file `where`, whose tensors are `main`, on the default device.

    `others`: files of the parts that it lacks (`needs`), or that are to be taken in place of its own; what a file holds
    beside what is taken from it is left, what nobody knows is an error of its table. `language`: of `lavis_language`.

    ValueError: parts missing or not wanted, sizes that do not fit each other.
    """
    others = others or {}
    _refuse(where, needs(main, where), {*others, *(() if language is None else ("language",))})
    files = {"main": main, **others}
    source = {part: part if part in others else "main" for part in ("vision", "qformer")}
    eyes, tower = _vision(files[source["vision"]], where)
    apart = "qformer" not in contents(main)  # MiniGPT-4, where it has no words and is frozen
    reader = None if language is None else language.module
    assert reader is None or isinstance(reader, Language)
    bridge = files[source["qformer"]]
    out_dim = _out_dim(main, where, _Sizes(bridge, where)("query_tokens", 2), reader)
    qformer = _qformer(bridge, where, out_dim, apart)
    read = _image_width(_Sizes(bridge, where))
    if read != eyes.dim:
        raise ValueError(f"{where}: the Q-Former reads images of width {read}, the image encoder gives {eyes.dim}")
    heads = "heads" in contents(main)
    width = main["vision_proj.weight"].shape[0] if heads else 0
    model = VisionLanguageModel(
        eyes,
        qformer,
        language=reader,
        contrast=ContrastiveHead(qformer.width, qformer.width, width, bias=True) if heads else None,
        match=MatchingHead(qformer.width) if heads else None,
    )
    tables = {name: _table(file, name, source, tower, apart) for name, file in files.items()}
    if language is not None:
        tables["language"] = language.table.under("", "language.")
    return Assembled(model, tables)


def lavis_qformer(where: str, main: Weights) -> tuple[QFormer, Table]:
    """The Q-Former of a file alone, to stand between parts of one's own; its projection is left behind.

    The table names it `connector`. ValueError: a file without one.
    """
    if "qformer" not in contents(main):
        raise ValueError(f"{where}: holds no Q-Former")
    module = _qformer(main, where, None, apart=False)
    return module, _table(main, "", {"qformer": ""}, Table("no tower", ()), apart=False)


def _refuse(where: str, wanted: Mapping[str, str], given: set[str]) -> None:
    """ValueError: parts that are missing, or that this system does not have."""
    if missing := [f"{name}: {words}" for name, words in wanted.items() if name not in given]:
        raise ValueError(
            f"{where}: holds a part of a system; give the rest of it as parts (--part NAME=SOURCE): "
            + "; ".join(missing)
        )
    known = {"vision", "qformer", *wanted}
    if extra := sorted(given - known):
        raise ValueError(f"{where}: has no use for part {', '.join(extra)}; there are {', '.join(sorted(known))}")


def _projection(main: Weights) -> str | None:
    return next((name.partition(".")[0] for name in main if CONTENTS["projection"].fullmatch(name)), None)


def _out_dim(main: Weights, where: str, width: int, reader: Language | None) -> int | None:
    """Width of the language model; `width`: of the Q-Former."""
    name = _projection(main)
    if name is None or reader is None:
        return None
    size = _Sizes(main, where)
    out, read = size(f"{name}.weight", 0), size(f"{name}.weight", 1)
    if read != width:
        raise ValueError(f"{where}: {name} reads width {read}, the Q-Former writes {width}")
    if out != reader.dim:
        raise ValueError(f"{where}: {name} is for a language model of width {out}, this one has {reader.dim}")
    return out


def _vision(weights: Weights, where: str) -> tuple[ImageEncoder, Table]:
    """The tower, with its table for a whole checkpoint or for a file of its own."""
    prefix = "visual_encoder." if any(name.startswith("visual_encoder.") for name in weights) else ""
    size = _Sizes({name.removeprefix(prefix): value for name, value in weights.items()}, where)
    width, patch = size("pos_embed", 2), size("patch_embed.proj.weight", 3)
    values = {
        "hidden_size": width,
        "intermediate_size": size("blocks.0.mlp.fc1.weight", 0),
        "num_hidden_layers": min(size.count(r"blocks\.(\d+)\."), BLOCKS),
        "num_attention_heads": max(1, width // EVA_HEAD),
        "image_size": patch * math.isqrt(size("pos_embed", 1) - 1),
        "patch_size": patch,
    }
    module, table = blip2_vit(values, where, "lavis")
    assert isinstance(module, ImageEncoder)
    return module, table.under(prefix, "vision.")


def _qformer(weights: Weights, where: str, out_dim: int | None, apart: bool) -> QFormer:
    size, block = _Sizes(weights, where), "Qformer.bert.encoder.layer"
    crosses = size.numbers(rf"{block}\.(\d+)\.crossattention\.")
    width, layers = size("query_tokens", 2), size.count(rf"{block}\.(\d+)\.")
    every = crosses[1] if len(crosses) > 1 else layers
    if crosses != list(range(0, layers, every)):
        raise ValueError(f"{where}: cross-attention in blocks {crosses} of {layers} is no every-k-th block")
    image = _image_width(size)
    text = None
    if not apart and WORDS in weights:
        text = _words(size, width, writes="Qformer.cls.predictions.bias" in weights)
    return QFormer(
        image,
        width,
        layers,
        max(1, width // HEAD),
        queries=size("query_tokens", 1),
        hidden=size(f"{block}.0.intermediate_query.dense.weight", 0),
        cross_every=every,
        text=text,
        image_norm=nn.LayerNorm(image, eps=1e-5),
        out_dim=out_dim,
        dropout=0.0 if apart else 0.1,
    )


def _image_width(size: "_Sizes") -> int:
    return size("Qformer.bert.encoder.layer.0.crossattention.self.key.weight", 1)


def _words(size: "_Sizes", width: int, writes: bool) -> TextBranch:
    positions = size("Qformer.bert.embeddings.position_embeddings.weight", 0)
    if not writes:
        return TextBranch(size(WORDS, 0), width, positions, head="none")
    return TextBranch(size(WORDS, 0), width, positions, bert_transform(width), head="tied")


def _table(weights: Weights, name: str, source: Mapping[str, str], tower: Table, apart: bool) -> Table:
    """Of one file: the rows of what is taken from it; the rest of what it may hold is left."""
    taken = {part for part, file in source.items() if file == name}
    taken |= {"heads", "projection"} if name == "main" else set()
    left = [CONTENTS[part].pattern for part in CONTENTS if part not in taken] + (list(TEXT) if apart else [])
    tables = [Table("left", (), tuple(left))]
    tables += [tower] if "vision" in taken else []
    tables += [lavis_qformer_table(weights)] if "qformer" in taken else []
    if "heads" in taken:
        projection = _projection(weights)
        tables += [lavis_heads_table(), *([] if projection is None else [projection_table(projection)])]
    return system(f"LAVIS ({name})", *tables)


class _Sizes:
    """Sizes of a file's tensors by name."""

    def __init__(self, weights: Weights, where: str) -> None:
        self.weights, self.where = weights, where

    def __call__(self, name: str, axis: int) -> int:
        """ValueError for a tensor that is not there or has not as many axes."""
        tensor = self.weights.get(name)
        if tensor is None or tensor.ndim <= axis:
            raise ValueError(f"{self.where}: cannot tell the sizes of this system, for it lacks a whole '{name}'")
        return tensor.shape[axis]

    def numbers(self, pattern: str) -> list[int]:
        """Of blocks, in order."""
        return sorted({int(found[1]) for name in self.weights if (found := re.match(pattern, name))})

    def count(self, pattern: str) -> int:
        """Of blocks."""
        return len(self.numbers(pattern))
