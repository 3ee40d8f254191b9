"""Control tokens of a published vocabulary: what its own files say, and else the usual names."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from vlm.data.vocabulary import beside, declared_names

# Tried in this order; "<|endoftext|>" before "<|im_start|>", because base models of that family start with the former.
_BOS = ("<bos>", "<s>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<start_of_text>", "<|endoftext|>")
_EOS = ("<eos>", "</s>", "[SEP]", "<|end_of_text|>", "<end_of_text>", "<|endoftext|>", "<|im_end|>")
_PAD = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
_DEC = ("<dec>", "[DEC]")


class Control(NamedTuple):
    """Ids by role; `ends`: all at which a text that is being written ends, eos first."""

    bos: int | None
    eos: int
    pad: int
    dec: int
    ends: tuple[int, ...]


class _Inside(NamedTuple):
    """What a tokenizer.json says itself: its template's first and last token, further ones it names, its padding."""

    template: bool
    first: str | None
    last: str | None
    further: tuple[str, ...]
    pad: str | None


def find_control(inner: tokenizers.Tokenizer, file: Path) -> Control:
    """Control tokens of a vocabulary that `file` held.

    eos and pad: from tokenizer_config.json or special_tokens_map.json beside it, the template and the padding inside
    it, the usual names. bos is what stands before every text: as `add_bos_token`, the template, or (in files of
    transformers that have neither) nobody says; usual names only where no such files are. `ends`: from
    generation_config.json or config.json, which also decide about eos. ValueError: no eos, no bos where one is asked.
    """
    said, inside = declared_names(file), _inside(json.loads(inner.to_str()))
    written = _generation_ends(inner, file)

    def find(role: str, *names: str | None) -> int | None:
        return _first(inner, (said.get(role), *names))

    bos = _bos(inner, file, said, inside)
    eos = find("eos", inside.last, *(() if written else _EOS))
    if written and eos not in written:
        eos = written[0]
    if eos is None:
        raise ValueError(_lacks(file, "eos", _EOS))
    further = [i for name in inside.further if (i := inner.token_to_id(name)) is not None]
    ends = tuple(dict.fromkeys([eos, *(written or further)]))
    pad, dec = find("pad", inside.pad, *_PAD), find("dec", *_DEC)
    start = eos if bos is None else bos
    return Control(bos, eos, eos if pad is None else pad, start if dec is None else dec, ends)


def _bos(inner: tokenizers.Tokenizer, file: Path, said: dict[str, str | None], inside: _Inside) -> int | None:
    config = beside(file, "tokenizer_config.json")
    asked = config.get("add_bos_token")
    if asked is False or (asked is None and (inside.template or config.get("tokenizer_class"))):
        name = inside.first if asked is None else None
        return None if name is None else inner.token_to_id(name)
    if asked is None and "bos" in said and said["bos"] is None:
        return None
    bos = _first(inner, (said.get("bos"), inside.first, *_BOS))
    if bos is None:
        raise ValueError(_lacks(file, "bos", _BOS))
    return bos


def _first(inner: tokenizers.Tokenizer, names: Iterable[str | None]) -> int | None:
    """The id of the first of the names that the vocabulary has."""
    return next((i for name in names if name is not None and (i := inner.token_to_id(name)) is not None), None)


def _lacks(file: Path, word: str, names: tuple[str, ...]) -> str:
    remedy = f'put a tokenizer_config.json with "{word}_token" beside it'
    return f"{file}: no {word} token (none of {', '.join(names)}); {remedy}"


def _generation_ends(inner: tokenizers.Tokenizer, file: Path) -> list[int]:
    """Where the published model stops writing; empty: nobody says. ValueError: ids that the vocabulary lacks."""
    for name in ("generation_config.json", "config.json"):
        given = beside(file, name).get("eos_token_id")
        ends = [given] if isinstance(given, int) else list(given or ())
        if unknown := [i for i in ends if inner.id_to_token(i) is None]:
            raise ValueError(f"{file.with_name(name)}: eos_token_id={given}: {file.name} has no tokens {unknown}")
        if ends:
            return ends
    return []


def _inside(spec: dict[str, Any]) -> _Inside:
    pad = spec["padding"]["pad_token"] if spec.get("padding") else None
    processor = spec.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        match part.get("type"):
            case "TemplateProcessing":
                single = [piece.get("SpecialToken", {}).get("id") for piece in part["single"]]  # None: the text
                pair = [piece.get("SpecialToken", {}).get("id") for piece in part["pair"]]
                further = tuple(name for name in part["special_tokens"] if name not in (*single, *pair))
                return _Inside(True, single[0], single[-1], further, pad)
            case "BertProcessing" | "RobertaProcessing":
                return _Inside(True, part["cls"][0], part["sep"][0], (), pad)
    return _Inside(False, None, None, (), pad)
