"""Tokenizers (any published one, CLIP's, a small one trained on captions) and the labels of captions."""

import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlm.data.control import Control, find_control
from vlm.data.vocabulary import find_vocabulary, read_vocabulary
from vlm.nn.tokens import IGNORE

_LINE_BREAKS = ("\n", "Ċ", "<0x0A>")  # as vocabularies spell one
_REMEMBERED = 1000  # characters of the longest text whose ids are kept: captions come again in every epoch


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with its control ids. No text, whatever it holds, is encoded as a control token."""

    inner: tokenizers.Tokenizer
    bos: int | None  # None: nothing stands before a text (Qwen)
    eos: int
    pad: int
    dec: int  # start of grounded generation, = bos (or eos) where the vocabulary has none of its own
    ends: tuple[int, ...] = ()  # all at which a text that is being written ends, eos first; unless given, eos alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", self.ends or (self.eos,))
        self.inner.no_padding()
        self.inner.no_truncation()
        self.inner.encode_special_tokens = True  # "</s>" in a text is text; pickling loses this setting

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Any, ...]]:
        return Tokenizer, (self.inner, *self.control)  # made anew: see `encode_special_tokens`

    @property
    def control(self) -> Control:
        """The control ids."""
        return Control(self.bos, self.eos, self.pad, self.dec, self.ends)

    @property
    def start(self) -> list[int]:
        """What stands before every text: bos, or nothing."""
        return [] if self.bos is None else [self.bos]

    @cached_property
    def size(self) -> int:
        """Rows an embedding needs: the largest id + 1."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _control(self) -> frozenset[int]:
        special = {i for i, token in self.inner.get_added_tokens_decoder().items() if token.special}
        unknown = getattr(self.inner.model, "unk_token", None)
        for name in [unknown] if unknown else ["<unk>", "[UNK]"]:
            special.discard(self.inner.token_to_id(name))
        named = {*self.start, self.eos, self.pad, self.dec, *self.ends}
        # A line break may end a text (OPT in BLIP-2) and is text all the same.
        return frozenset(special | {i for i in named if self.inner.id_to_token(i) not in _LINE_BREAKS})

    @cached_property
    def own_space(self) -> bool:
        """True when the tokenizer itself puts a space before the first word, so that the caller must not."""
        ids = self.encode("a")
        return bool(ids) and (self.inner.id_to_token(ids[0]) or "").startswith(("Ġ", "▁"))

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no start, no end, and "</s>" in it is spelt out."""
        return list(self._remembered(text) if len(text) <= _REMEMBERED else self._encode(text))

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that goes on in a text: without the space that the tokenizer puts before a first word.

        As if all had been encoded at once, where the vocabulary has no entry that reaches over the seam.
        """
        if not self.own_space:
            return self.encode(text)
        if text.startswith(" "):
            return self.encode(text[1:])
        before = self.encode(seam := ":" if text[:1].isalnum() else "a")
        both = self.encode(seam + text)
        return both[len(before) :] if both[: len(before)] == before else self.encode(text)

    def literal(self, text: str) -> list[str | int]:
        """Words of a template in pieces: control tokens ({bos}, {eos}, "<|im_start|>") as ids, the rest as text.

        A start that the vocabulary does not have is left out.
        """
        return list(self._literals(text))

    @cached_property
    def _literals(self) -> "Callable[[str], tuple[str | int, ...]]":
        return lru_cache(maxsize=2**10)(self._split)  # a template says the same all the time

    def _split(self, text: str) -> tuple[str | int, ...]:
        own: dict[str, int | None] = {"{bos}": self.bos, "{eos}": self.eos, **self._named}
        pieces = self._marks.split(text)
        found = [own[piece] if number % 2 else piece for number, piece in enumerate(pieces)]
        return tuple(piece for piece in found if piece != "" and piece is not None)

    @cached_property
    def _named(self) -> dict[str, int]:
        return {token.content: i for i, token in self.inner.get_added_tokens_decoder().items() if i in self._control}

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        longest_first = sorted(["{bos}", "{eos}", *self._named], key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def _remembered(self) -> "Callable[[str], tuple[int, ...]]":
        return lru_cache(maxsize=2**15)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        clean = text if text.isascii() else text.encode("utf-8", "replace").decode()  # lone surrogates
        ids = self.inner.encode(clean, add_special_tokens=False).ids
        # Unigram and word-level vocabularies can still match the spelling of a control token: such ids are dropped.
        return tuple(i for i in ids if i not in self._control)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """What `encode` gives for each, on all cores and not remembered: for long texts that come once."""
        clean = [text if text.isascii() else text.encode("utf-8", "replace").decode() for text in texts]
        found = self.inner.encode_batch_fast(clean, add_special_tokens=False)
        return [[i for i in encoding.ids if i not in self._control] for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens, image placeholders and IGNORE are skipped, nothing ends it early."""
        kept = [i for i in map(int, ids) if i >= 0 and i not in self._control]
        # The library aborts where a decoder strips what is already empty.
        return self.inner.decode(kept, skip_special_tokens=False) if kept else ""

    def to_text(self) -> str:
        """All of it, for `from_text`: how processes of one run give it to each other."""
        return json.dumps([self.inner.to_str(), *self.control])

    @staticmethod
    def from_text(text: str) -> "Tokenizer":
        """The tokenizer that `to_text` was asked of."""
        inner, bos, eos, pad, dec, ends = json.loads(text)
        return Tokenizer(tokenizers.Tokenizer.from_str(inner), bos, eos, pad, dec, tuple(ends))

    def save(self, path: Path) -> None:
        """Write the file `path` (a tokenizer.json), from which `load_tokenizer` gives an equal tokenizer."""
        copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
        names = {i: str(self.inner.id_to_token(i)) for i in (*self.start, *self.ends, self.pad)}
        # The template and the padding are the places where this format itself says which tokens are control tokens;
        # further ends are among the template's tokens without a place in it.
        tokens = [(names[i], i) for i in dict.fromkeys([*self.start, *self.ends])]
        single = [*(names[i] for i in self.start), "$A", names[self.eos]]
        copy.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
        copy.enable_padding(pad_id=self.pad, pad_token=names[self.pad])
        copy.save(str(path))


def load_tokenizer(path: Path, add: Sequence[str] = ()) -> Tokenizer:
    """Read a published tokenizer: a folder, or one file of `vocabulary.FILES` with what stands beside it.

    Without a pad token eos serves, since padding is never supervised; `find_control` says where the others come from.
    `add`: control tokens that get ids of their own if it has none for them ([DEC] of BLIP-2).
    ValueError when there is no tokenizer, or it has no end token.
    """
    file = find_vocabulary(path)
    inner = read_vocabulary(file)
    inner.add_special_tokens(_specials(*add))
    return Tokenizer(inner, *find_control(inner, file))


def _specials(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def train_bpe(captions: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` entries (case kept, any text encodes); same captions, same tokenizer."""
    names = ["<pad>", "<bos>", "<eos>", "<dec>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab < len(names) + len(alphabet):
        raise ValueError(f"vocab={vocab}: a byte-level vocabulary needs at least {len(names) + len(alphabet)}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    # A space before the first word too, so that a word has one id wherever it stands.
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=_specials(*names),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(captions, trainer)
    pad, bos, eos, dec = (inner.token_to_id(name) for name in names)
    assert (pad, bos, eos, dec) == (0, 1, 2, 3)
    return Tokenizer(inner, bos=1, eos=2, pad=0, dec=3)


def clip_tokenizer() -> Tokenizer:
    """CLIP's lower-cased BPE of 49,408 entries (Radford et al. 2021), from the merges inside the open_clip package.

    Ids equal open_clip's for ordinary text. What differs: no ftfy repair of garbled encodings, full-width letters or
    terminal codes; only the commonest HTML entities; a final Greek sigma lower-cases to σ; "<end_of_text>" in a caption
    is spelt out; and padding is <end_of_text> (open_clip: 0, which is also "!").
    ValueError when open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")  # finds the folder without importing the package (and torch)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("CLIP's vocabulary is in the open_clip package, which is missing: pip install open_clip_torch")
    file = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    letters = _byte_letters()
    words = letters + [letter + "</w>" for letter in letters] + [left + right for left, right in merges]
    inner = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, end_of_word_suffix="</w>")
    )
    inner.add_special_tokens(_specials("<start_of_text>", "<end_of_text>"))
    inner.normalizer = _clip_normalizer()
    pattern = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "removed", invert=True), byte_level])
    spaces = decoders.Replace("</w>", "Ġ")  # "Ġ" is the space in the byte-level alphabet
    inner.decoder = decoders.Sequence([spaces, decoders.ByteLevel(), decoders.Strip(" ", 0, 1)])
    bos, eos = len(words), len(words) + 1
    return Tokenizer(inner, bos=bos, eos=eos, pad=eos, dec=bos)


def _byte_letters() -> list[str]:
    """The 256 characters that stand for bytes, in CLIP's order: printable bytes as themselves, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(i) for i in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _clip_normalizer() -> normalizers.Normalizer:
    entities: dict[str | Regex, str] = {
        "&amp;": "&",
        "&lt;": "<",
        "&gt;": ">",
        "&quot;": '"',
        "&#39;": "'",
        "&nbsp;": " ",
    }
    ligatures: dict[str | Regex, str] = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
    control = r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"
    folded: dict[str | Regex, str] = {
        **entities,
        **ligatures,
        Regex(control): "",
        Regex("[\u02bc\u2018-\u201b]"): "'",
        Regex("[\u201c-\u201f]"): '"',
    }
    steps: list[normalizers.Normalizer] = [normalizers.Replace(old, new) for old, new in folded.items()]
    steps += [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    return normalizers.Sequence(steps)


@dataclass(frozen=True)
class Encoded:
    """Ids with their labels (equal length): the label of a supervised token is its own id, of the others IGNORE.

    `reply`: what an encoder-decoder writes after reading these (`vlm.data.reply`). `images`: how many are shown, the
    first of those that the text has.
    """

    ids: list[int]
    labels: list[int]
    reply: "Encoded | None" = None
    images: int = 0


def encode_caption(tokenizer: Tokenizer, caption: str, max_tokens: int) -> Encoded:
    """bos (if any), caption, eos; all but bos supervised. Too long a caption loses its last words, never eos."""
    room = max_tokens - len(tokenizer.start) - 1
    if room < 1:
        raise ValueError(f"max_tokens={max_tokens}: start, end and one word need at least {max_tokens - room + 1}")
    answer = [*tokenizer.encode(caption)[:room], tokenizer.eos]
    return Encoded([*tokenizer.start, *answer], [IGNORE] * len(tokenizer.start) + answer)
