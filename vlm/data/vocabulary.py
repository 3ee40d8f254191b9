"""Published vocabularies in whichever files they come, as a `tokenizers.Tokenizer`."""

import json
import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from vlm.data.sentencepiece import read_sentencepiece

# What a folder may hold, the first that is there being read; beside them merges.txt and settings in JSON.
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"gpt2": "gpt2", "opt": "gpt2", "qwen2": "qwen2", "qwen2_moe": "qwen2", "qwen3": "qwen2"}


def find_vocabulary(path: Path) -> Path:
    """The file to read: `path` itself, or the first of `FILES` in that folder. ValueError: there is none of them."""
    if not path.is_dir():
        return path
    found = next((path / name for name in FILES if (path / name).exists()), None)
    if found is None:
        raise ValueError(
            f"{path}: no tokenizer in it (none of {', '.join(FILES)}); copy its files from where the model is published"
        )
    return found


def read_vocabulary(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file of `FILES`, with what stands beside it; its template is what transformers would make.

    ValueError: a file that is damaged, missing or of a family that is not known here.
    """
    try:
        return _reader(file)(file)
    except OSError as error:
        remedy = f"give one of {', '.join(FILES)}, or the folder that holds one"
        raise ValueError(f"{error.filename}: {error.strerror}; {remedy}") from None


def beside(file: Path, name: str) -> dict[str, Any]:
    """The table of a JSON file in the same folder; empty where there is none. ValueError: it holds none."""
    other = file.with_name(name)
    if not other.exists():
        return {}
    try:
        found = json.loads(other.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{other}: not readable JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{other}: holds no table of settings")
    return found


def declared_names(file: Path) -> dict[str, str | None]:
    """Control tokens by role (bos, eos, pad, unk, …), from tokenizer_config.json, else special_tokens_map.json.

    None: said to be none.
    """
    found: dict[str, str | None] = {}
    for settings in (beside(file, "special_tokens_map.json"), beside(file, "tokenizer_config.json")):
        for key, token in settings.items():
            if key.endswith("_token") and isinstance(token, str | dict | None):
                found[key.removesuffix("_token")] = _name(token)
    return found


def special_names(file: Path) -> set[str]:
    """All control tokens that the settings beside a vocabulary name."""
    names = set(declared_names(file).values())
    for settings in (beside(file, "special_tokens_map.json"), beside(file, "tokenizer_config.json")):
        names |= {_name(token) for token in settings.get("additional_special_tokens") or ()}
    return {name for name in names if name is not None}


def _name(token: str | dict[str, Any] | None) -> str | None:
    """A token is written as its text, or as a table with that and how it is matched."""
    return token["content"] if isinstance(token, dict) else token


def _reader(file: Path) -> Callable[[Path], tokenizers.Tokenizer]:
    if file.suffix == ".model":
        return _from_sentencepiece
    if file.name == "vocab.json":
        return _from_merges
    return _from_word_pieces if file.suffix == ".txt" else _from_json


def _from_json(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # the library raises bare Exception for whatever is wrong inside the file
        raise ValueError(f"{file}: not a readable tokenizer.json ({error})") from None


def _from_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    inner, config = read_sentencepiece(file), beside(file, "tokenizer_config.json")
    if str(config.get("tokenizer_class")).startswith("Siglip"):
        inner.normalizer = normalizers.Sequence([*_siglip(bool(config.get("do_lower_case", True))), inner.normalizer])
    size, extra = inner.get_vocab_size(), config.get("extra_ids", 0)
    # T5's sentinels count down.
    sentinels = {size + extra - 1 - i: AddedToken(f"<extra_id_{i}>", special=True) for i in range(extra)}
    return _with_added(_add(inner, file, sentinels), file)


def _siglip(lower: bool) -> list[normalizers.Normalizer]:
    """What SigLIP's own tokenizer does to a text before SentencePiece sees it: no punctuation, spaces put right."""
    punctuation = Regex(f"[{re.escape(string.punctuation)}]")
    steps = [normalizers.Replace(punctuation, ""), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return [normalizers.Lowercase(), *steps] if lower else steps


def _from_merges(file: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE of GPT-2 (also OPT) or Qwen2: a vocabulary and, line by line, merges."""
    config = beside(file, "tokenizer_config.json")
    named = str(config.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer").lower()
    family = _BYTE_LEVEL.get(named or str(beside(file, "config.json").get("model_type")))
    if family is None:
        raise ValueError(
            f"{file}: byte-level BPE of which family? tokenizer_config.json beside it has to name a tokenizer_class "
            "among GPT2Tokenizer and Qwen2Tokenizer, or give the model's tokenizer.json"
        )
    lines = file.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if right]
    ids = beside(file, file.name)
    # The library aborts where a merge makes what the vocabulary lacks.
    if lacking := [left + right for left, right in merges if not {left, right, left + right} <= ids.keys()]:
        raise ValueError(f"{file}: does not fit the merges.txt beside it, which makes {lacking[0]!r} of what is there")
    inner = tokenizers.Tokenizer(models.BPE(ids, merges))
    space = bool(config.get("add_prefix_space", False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=family == "gpt2")
    if family == "qwen2":
        inner.normalizer = normalizers.NFC()
        cut = pre_tokenizers.Split(Regex(_QWEN), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    else:
        inner.pre_tokenizer = byte_level
    inner.decoder = decoders.ByteLevel()
    return _with_added(inner, file)


def _from_word_pieces(file: Path) -> tokenizers.Tokenizer:
    """BERT's vocabulary, an entry a line."""
    config = beside(file, "tokenizer_config.json")
    words = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    ids = {word.removesuffix("\r"): i for i, word in enumerate(words)}
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]") if name not in ids]
    if missing:
        raise ValueError(f"{file}: no word-piece vocabulary of BERT: it lacks {', '.join(missing)}")
    inner = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    lower = bool(config.get("do_lower_case", True))
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=lower,
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    special = [(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(single=["[CLS]", "$A", "[SEP]"], special_tokens=special)
    usual = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in ids]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in usual])
    return _with_added(inner, file)


def _with_added(inner: tokenizers.Tokenizer, file: Path) -> tokenizers.Tokenizer:
    """With the tokens that settings beside the vocabulary add to it, and the control tokens that they name."""
    control = special_names(file)
    present = [name for name in sorted(control) if inner.token_to_id(name) is not None]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in present])
    added = {
        int(number): AddedToken(name, special=name in control, normalized=False)
        for name, number in beside(file, "added_tokens.json").items()
    }
    for number, token in beside(file, "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added[int(number)] = AddedToken(token["content"], **flags)
    return _add(inner, file, added)


def _add(inner: tokenizers.Tokenizer, file: Path, added: Mapping[int, AddedToken]) -> tokenizers.Tokenizer:
    """Adds tokens at their ids. ValueError: an id that is taken, or beyond the next free one."""
    for number, token in sorted(added.items()):
        (inner.add_special_tokens if token.special else inner.add_tokens)([token])
        found = inner.token_to_id(token.content)
        if found != number:
            raise ValueError(
                f"{file}: {token.content!r} is to be token {number}, but the vocabulary makes it {found}: "
                "the files beside it are of another tokenizer"
            )
    return inner
