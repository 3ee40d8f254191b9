"""GGUF files of the Llama family (SmolLM2 among them): weights for our `Decoder`, and the tokenizer they carry.

A file holds everything: sizes and vocabulary as metadata, weights plain or quantised (then dequantised by the `gguf`
package). Its query and key rows stand in the order of interleaved rotary pairs; ours, as `transformers`', in halves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner
from torch import Tensor

from vlm.data.text import Tokenizer
from vlm.model.language import Decoder, llama
from vlm.model.weights.files import load_strict
from vlm.model.weights.table import Row, Table

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


class Sizes(NamedTuple):
    """What the metadata says about a Llama; the arguments of `vlm.model.language.llama`."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    theta: float
    eps: float
    tied: bool
    head_dim: int


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> Pretrained:
    """The language model and tokenizer of a GGUF file, weights in `dtype`.

    Needs the `gguf` package. Errors: no GGUF file, another family than Llama, scaled rotary positions, an unknown
    pre-tokenizer, tensors that are missing or left over.
    """
    fields, tensors = _read(path, dtype)
    sizes = _sizes(path, fields, tied="output.weight" not in tensors)
    tokenizer = _tokenizer(path, fields)
    ours = gguf_to_ours(tensors, sizes.heads, sizes.kv_heads, sizes.tied)
    with torch.device("meta"):
        language = llama(**sizes._asdict())
    load_strict(language, ours, str(path))
    return Pretrained(language, tokenizer)


def gguf_table(tied: bool) -> Table:
    """Names of GGUF's Llama for ours, the rows of queries and keys already in our order."""
    frame = [Row("token_embd.weight", "embedding.weight"), Row("output_norm.weight", "stack.norm.weight")]
    head = [] if tied else [Row("output.weight", "head.weight")]
    blocks = [Row(f"{THEIRS}.{theirs}.weight", f"{OURS}.{ours}.weight") for theirs, ours in _BLOCK.items()]
    return Table("gguf llama", (*frame, *head, *blocks))


def gguf_to_ours(theirs: Mapping[str, Tensor], heads: int, kv_heads: int, tied: bool) -> dict[str, Tensor]:
    """Our tensors from those of a file. Errors: a tensor that the table does not know."""
    return gguf_table(tied).to_ours(
        {name: _reorder(name, x, heads, kv_heads, halves=True) for name, x in theirs.items()}
    )


def gguf_to_theirs(ours: Mapping[str, Tensor], heads: int, kv_heads: int, tied: bool) -> dict[str, Tensor]:
    """Tensors as a file holds them from ours. Errors: a tensor of ours that the table does not know."""
    theirs = gguf_table(tied).to_theirs(ours)
    return {name: _reorder(name, x, heads, kv_heads, halves=False) for name, x in theirs.items()}


def _reorder(name: str, x: Tensor, heads: int, kv_heads: int, halves: bool) -> Tensor:
    """Rows of a query or key projection, within each head: pairs (0, 1), (2, 3), … to halves, or back."""
    count = heads if name.endswith("attn_q.weight") else kv_heads if name.endswith("attn_k.weight") else 0
    if not count:
        return x
    inner = (-1, 2) if halves else (2, -1)
    rows: Tensor = x.unflatten(0, (count, -1)).unflatten(1, inner).transpose(1, 2).flatten(0, 2)
    return rows.contiguous()


def _read(path: Path, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors; one tensor at a time is dequantised, so that little more than the result is held."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise ValueError(f"{path}: reading GGUF needs the gguf package: pip install 'vlm[gguf]'") from None
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error})") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        try:
            plain = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ValueError(f"{path}: {tensor.name} is quantised as {kind}, which gguf cannot undo") from None
        tensors[tensor.name] = torch.tensor(plain, dtype=dtype)
    return fields, tensors


def _sizes(path: Path, fields: Mapping[str, Any], tied: bool) -> Sizes:
    family = fields.get("general.architecture")
    if family != "llama":
        raise ValueError(f"{path}: a GGUF file of the family '{family}'; only llama is read")
    if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{path}: rotary positions scaled by '{scaling}' are not read; take a file without scaling")
    try:
        dim, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
        width = fields.get("llama.attention.key_length", dim // heads)
        sizes = Sizes(
            vocabulary=len(fields["tokenizer.ggml.tokens"]),
            dim=dim,
            layers=fields["llama.block_count"],
            heads=heads,
            kv_heads=fields.get("llama.attention.head_count_kv", heads),
            hidden=fields["llama.feed_forward_length"],
            theta=fields.get("llama.rope.freq_base", 10_000.0),
            eps=fields["llama.attention.layer_norm_rms_epsilon"],
            tied=tied,
            head_dim=width,
        )
    except KeyError as error:
        raise ValueError(f"{path}: its metadata lack {error}") from None
    if (turned := fields.get("llama.rope.dimension_count", width)) != width:
        raise ValueError(f"{path}: only {turned} of {width} dimensions of a head are rotary, which is not read")
    return sizes


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
