"""SentencePiece's model files (tokenizer.model, spiece.model) as a `tokenizers.Tokenizer`, without that library.

The files are protocol buffers: numbered fields, of which few matter here. The numbers are those of
sentencepiece_model.proto (Kudo and Richardson 2018, arXiv 1808.06226). Ids are SentencePiece's own, also where
transformers' differ (a text that begins with a space, in version 5). Known difference: a rule of the normaliser's
table that ends within a grapheme (a hard space before a joiner) is applied to all of it, as in `tokenizers`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type


class Kind(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its place in the file is its id."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class Model:
    """What decides which ids a text gets."""

    pieces: tuple[Piece, ...]
    bpe: bool
    spells: bool  # what no piece covers is spelt in bytes
    start: int | None
    end: int | None
    charsmap: bytes  # the normaliser's compiled table; empty: none
    prefix: bool  # a space is put before the text
    tidy: bool  # spaces at the ends and repeated ones are removed


def read_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a model file: BPE or unigram, its start token in front, or its end token behind if it has none.

    ValueError: a file that is no SentencePiece model, or of a kind that is not known here.
    """
    try:
        model = _model(path.read_bytes())
    except (ValueError, struct.error, IndexError) as error:
        raise ValueError(f"{path}: not a SentencePiece model that vlm can read ({error})") from None
    return _tokenizer(model)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a message: integers, or bytes (strings, messages, floats)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case other:
                raise ValueError(f"wire type {other}")
        if at + size > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of 64 bits with its sign, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            value &= 2**64 - 1
            return (value - 2**64 if value >> 63 else value), at
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


def _message(data: bytes) -> dict[int, int | bytes]:
    return dict(_fields(data))


def _model(data: bytes) -> Model:
    pieces, trainer, normalizer = list[Piece](), dict[int, int | bytes](), dict[int, int | bytes]()
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        match number:
            case 1:
                pieces.append(_piece(_message(value)))
            case 2:
                trainer = _message(value)
            case 3:
                normalizer = _message(value)
    kind = trainer.get(3, _UNIGRAM)
    if not pieces or kind not in (_UNIGRAM, _BPE):
        raise ValueError("it has no pieces" if not pieces else f"model_type={kind!r}, neither unigram nor BPE")
    if strange := {piece.kind.name.lower() for piece in pieces} & {"user_defined", "unused"}:
        raise ValueError(f"it has {' and '.join(sorted(strange))} pieces; give the model's tokenizer.json")
    start, end = (_identity(trainer.get(number, usual)) for number, usual in ((41, 1), (42, 2)))
    charsmap = normalizer.get(2, b"")
    if not isinstance(charsmap, bytes) or max(start or 0, end or 0) >= len(pieces):
        raise ValueError("its parts do not belong together")
    return Model(
        tuple(pieces),
        kind == _BPE,
        bool(trainer.get(35, 0)),
        start,
        end,
        charsmap,
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def _piece(fields: dict[int, int | bytes]) -> Piece:
    text, score, kind = fields.get(1), fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece without a text")
    return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], Kind(kind))


def _identity(value: int | bytes) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _tokenizer(model: Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(_merging(model) if model.bpe else _likeliest(model))
    inner.normalizer = _normalizer(model)
    if not model.bpe:
        whole = any(_SPACE in piece.text[1:] for piece in model.pieces if piece.kind == Kind.NORMAL)
        inner.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=not whole)
    strip = [decoders.Strip(" ", 1, 0)] if model.prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for piece in model.pieces:
        if piece.kind in (Kind.CONTROL, Kind.UNKNOWN):
            inner.add_special_tokens([AddedToken(piece.text, special=True, normalized=False)])
    names = [(model.pieces[i].text, i) for i in (model.start, model.end) if i is not None]
    if model.start is not None:
        inner.post_processor = processors.TemplateProcessing(single=[names[0][0], "$A"], special_tokens=names[:1])
    elif model.end is not None:
        inner.post_processor = processors.TemplateProcessing(single=["$A", names[0][0]], special_tokens=names[:1])
    return inner


def _normalizer(model: Model) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.tidy:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", _SPACE))
    if model.tidy:
        steps.append(normalizers.Replace(Regex(_SPACE + r"+\z"), ""))
    return normalizers.Sequence([*steps, normalizers.Prepend(_SPACE)] if model.prefix else steps)


def _likeliest(model: Model) -> models.Model:
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.kind == Kind.UNKNOWN), None)
    return models.Unigram([(piece.text, piece.score) for piece in model.pieces], unknown, model.spells)


def _merging(model: Model) -> models.Model:
    """BPE's merges, which the file does not list: all pairs of pieces that make a piece, the best piece first."""
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    # Control tokens are pieces too, and no text may merge into them.
    plain = {piece.text: piece.score for piece in model.pieces if piece.kind == Kind.NORMAL}
    found: list[tuple[float, int, str, str]] = []
    for text, score in plain.items():
        for cut in range(1, len(text)):
            if text[:cut] in plain and text[cut:] in plain:
                found.append((-score, ids[text], text[:cut], text[cut:]))
    found.sort(key=lambda merge: merge[:2])
    unknown = next((piece.text for piece in model.pieces if piece.kind == Kind.UNKNOWN), None)
    merges = [(left, right) for _, _, left, right in found]
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.spells)
