"""The tokenizer that comes with a published checkpoint, in whichever of its files."""

from collections.abc import Sequence
from pathlib import Path

from vlm.data.text import Tokenizer, load_tokenizer
from vlm.data.vocabulary import FILES
from vlm.model.weights.gguf import open_gguf
from vlm.model.weights.layout import GGUF


def has_tokenizer(path: Path) -> bool:
    """Whether a folder or file has a tokenizer in it."""
    return path.suffix == GGUF if path.is_file() else any((path / name).is_file() for name in FILES)


def published_tokenizer(path: Path, add: Sequence[str] = ()) -> Tokenizer:
    """As of `load_tokenizer`, also from a GGUF file. ValueError: none there, tokens to be added to that of a GGUF."""
    if path.suffix != GGUF:
        return load_tokenizer(path, add)
    if add:
        raise ValueError(f"{path}: the vocabulary of a GGUF file takes no further tokens ({', '.join(add)})")
    return open_gguf(path).tokenizer
