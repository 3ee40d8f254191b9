"""A tokenizer as the files that transformers opens: tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from vlm.data.text import Tokenizer

IMAGE = "<image>"


def image_token(tokenizer: Tokenizer) -> int:
    """The id of the token that stands where an image is: its own, or the next that is free."""
    own = tokenizer.inner.token_to_id(IMAGE)
    return tokenizer.size if own is None else int(own)


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    ends: bool,
    image: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes both files; `load_tokenizer` reads an equal tokenizer from them.

    `ends`: whether eos follows a text that is encoded; bos goes before it, where there is one.
    `image`: with a token for images. `extra`: more of tokenizer_config.json.
    """
    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    if image:
        inner.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    names = {i: str(inner.id_to_token(i)) for i in (*tokenizer.start, tokenizer.eos, tokenizer.pad)}
    after = [tokenizer.eos] if ends else []
    inner.post_processor = _around([(names[i], i) for i in tokenizer.start], [(names[i], i) for i in after])
    inner.no_padding()
    (folder / "tokenizer.json").write_text(inner.to_str(pretty=True), encoding="utf-8")  # its own errors say less
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if tokenizer.bos is None else names[tokenizer.bos],
        "eos_token": names[tokenizer.eos],
        "pad_token": names[tokenizer.pad],
        "clean_up_tokenization_spaces": False,
        **(extra or {}),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _around(before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]) -> Any:
    first, last = [name for name, _ in before], [name for name, _ in after]
    pair = [*first, "$A", *last, "$B:1", *(f"{name}:1" for name in last)]
    return processors.TemplateProcessing(
        single=[*first, "$A", *last], pair=pair, special_tokens=list(dict.fromkeys([*before, *after]))
    )
