"""GGUF files of the Llama family (SmolLM2 among them): weights for our `Decoder`, and the tokenizer they carry.

A file holds everything: sizes and vocabulary as metadata, weights plain or quantised (then dequantised by the `gguf`
package). Its query and key rows stand in the order of interleaved rotary pairs; ours, as `transformers`', in halves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner
from torch import Tensor

from vlm.data.text import Tokenizer
from vlm.model.language import Decoder, llama
from vlm.model.weights.fill import fill
from vlm.model.weights.hollow import hollow
from vlm.model.weights.rows import Row
from vlm.model.weights.source import Weights
from vlm.model.weights.table import Table

THEIRS, OURS = "blk.{i}", "stack.blocks.{i}"
CONTROL = 3  # the type of control tokens in a GGUF vocabulary
_BLOCK = {
    "attn_q": "mixer.query",
    "attn_k": "mixer.key",
    "attn_v": "mixer.value",
    "attn_output": "mixer.out",
    "attn_norm": "mixer_residual.norm",
    "ffn_norm": "ffn_residual.norm",
    "ffn_gate": "ffn.gate",
    "ffn_up": "ffn.up",
    "ffn_down": "ffn.down",
}


class Pretrained(NamedTuple):
    """A language model with the tokenizer it was trained with."""

    language: Decoder
    tokenizer: Tokenizer


class Gguf(NamedTuple):
    """A GGUF file that was looked at: of its weights only names and shapes are read."""

    values: dict[str, Any]  # what the config.json of such a Llama says
    table: Table
    weights: Weights
    fields: Mapping[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it carries. ValueError: one that is not known."""
        return _tokenizer(self.weights.source, self.fields)


@dataclass(frozen=True)
class InGguf:
    """A tensor that is still in its file, perhaps quantised; query and key rows come in our order."""

    file: Path
    found: Any  # gguf's ReaderTensor, over mapped memory
    heads: int  # 0: its rows are no rotary pairs

    @property
    def like(self) -> Tensor:
        """Its shape, and the type its numbers have when they are plain."""
        shape = [int(size) for size in reversed(self.found.shape.tolist())]
        return torch.empty(shape, dtype=_PLAIN.get(self.found.tensor_type.name, torch.float32), device="meta")

    @property
    def place(self) -> tuple[str, int]:
        """File and position."""
        return str(self.file), int(self.found.data_offset)

    def into(self, out: Tensor, buffer: Tensor) -> None:
        """Dequantises it into a tensor of its shape. ValueError: quantised in a way that gguf cannot undo."""
        from gguf import dequantize

        try:
            plain = torch.tensor(dequantize(self.found.data, self.found.tensor_type))
        except NotImplementedError:
            raise ValueError(
                f"{self.file}: {self.found.name} is quantised as {self.found.tensor_type.name}, which gguf cannot undo"
            ) from None
        out.copy_(_halves(plain, self.heads) if self.heads else plain)


_PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}


def open_gguf(path: Path) -> Gguf:
    """Looks at a GGUF file.

    Needs the `gguf` package. ValueError: no GGUF file, another family than Llama, scaled rotary positions.
    """
    fields, found = _read(path)
    names = {tensor.name for tensor in found}
    values = _values(path, fields, tied="output.weight" not in names)
    heads = {"attn_q": values["num_attention_heads"], "attn_k": values["num_key_value_heads"]}
    stored = {each.name: InGguf(path, each, heads.get(each.name.split(".")[-2], 0)) for each in found}
    return Gguf(values, gguf_table(values["tie_word_embeddings"]), Weights(path, stored), fields)


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> Pretrained:
    """The language model and tokenizer of a GGUF file, weights in `dtype`, read tensor by tensor.

    Errors as of `open_gguf`; an unknown pre-tokenizer, tensors that are missing or left over.
    """
    found = open_gguf(path)
    tokenizer, v = found.tokenizer, found.values
    with hollow():
        language = llama(
            v["vocab_size"],
            v["hidden_size"],
            v["num_hidden_layers"],
            v["num_attention_heads"],
            v["num_key_value_heads"],
            v["intermediate_size"],
            v["rope_theta"],
            v["rms_norm_eps"],
            v["tie_word_embeddings"],
            head_dim=v["head_dim"],
        )
    fill(language, found.table, found.weights, dtype)
    return Pretrained(language, tokenizer)


def gguf_table(tied: bool) -> Table:
    """Names of GGUF's Llama for ours, the rows of queries and keys already in our order."""
    frame = [Row("token_embd.weight", "embedding.weight"), Row("output_norm.weight", "stack.norm.weight")]
    head = [] if tied else [Row("output.weight", "head.weight")]
    blocks = [Row(f"{THEIRS}.{theirs}.weight", f"{OURS}.{ours}.weight") for theirs, ours in _BLOCK.items()]
    return Table("gguf llama", (*frame, *head, *blocks))


def gguf_to_ours(theirs: Mapping[str, Tensor], heads: int, kv_heads: int, tied: bool) -> dict[str, Tensor]:
    """Our tensors from those of a file. Errors: a tensor that the table does not know."""
    return gguf_table(tied).to_ours({name: _turned(name, x, heads, kv_heads, _halves) for name, x in theirs.items()})


def gguf_to_theirs(ours: Mapping[str, Tensor], heads: int, kv_heads: int, tied: bool) -> dict[str, Tensor]:
    """Tensors as a file holds them from ours. Errors: a tensor of ours that the table does not know."""
    theirs = gguf_table(tied).to_theirs(ours)
    return {name: _turned(name, x, heads, kv_heads, _pairs) for name, x in theirs.items()}


def _turned(name: str, x: Tensor, heads: int, kv_heads: int, turn: Callable[[Tensor, int], Tensor]) -> Tensor:
    count = heads if name.endswith("attn_q.weight") else kv_heads if name.endswith("attn_k.weight") else 0
    return turn(x, count) if count else x


def _halves(x: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, within each head: pairs (0, 1), (2, 3), … to halves."""
    return _swapped(x.view(heads, -1, 2, x.shape[1]))


def _pairs(x: Tensor, heads: int) -> Tensor:
    return _swapped(x.view(heads, 2, -1, x.shape[1]))


def _swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 2)


def _read(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Metadata, and the tensors where they lie."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(f"{path}: reading GGUF needs the gguf package: pip install 'vlm[gguf]'") from None
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error})") from None
    return {name: field.contents() for name, field in reader.fields.items()}, list(reader.tensors)


def _values(path: Path, fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The sizes, as transformers' config.json names them."""
    family = fields.get("general.architecture")
    if family != "llama":
        raise ValueError(f"{path}: a GGUF file of the family '{family}'; only llama is read")
    if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{path}: rotary positions scaled by '{scaling}' are not read; take a file without scaling")
    try:
        dim, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
        width = fields.get("llama.attention.key_length", dim // heads)
        values = {
            "model_type": "llama",
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "hidden_size": dim,
            "intermediate_size": fields["llama.feed_forward_length"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
            "head_dim": width,
            "rope_theta": fields.get("llama.rope.freq_base", 10_000.0),
            "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
            "tie_word_embeddings": tied,
        }
    except KeyError as error:
        raise ValueError(f"{path}: its metadata lack {error}") from None
    if (turned := fields.get("llama.rope.dimension_count", width)) != width:
        raise ValueError(f"{path}: only {turned} of {width} dimensions of a head are rotary, which is not read")
    return values


# Pre-tokenizers by the names that GGUF gives them.
def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


_PRE = {"smollm": _smollm, "gpt-2": _gpt2}


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE that the metadata spell out."""
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in _PRE:
        known = ", ".join(_PRE)
        raise ValueError(f"{path}: a tokenizer '{kind}' with pre-tokenizer '{cut}'; read are gpt2 with {known}")
    words, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    inner = Inner(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    inner.pre_tokenizer, inner.decoder = _PRE[cut](), decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [word for word, type_ in zip(words, types, strict=True) if type_ == CONTROL]
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    return Tokenizer(inner, bos, eos, pad=fields.get("tokenizer.ggml.padding_token_id", eos), dec=bos)
