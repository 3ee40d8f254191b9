"""Documents tokenized once into one flat file of ids, and batches of equal blocks cut out of it.

What step s trains on is a function of (seed, s) and of nothing else.
Letters: M blocks of a batch, T tokens of a block.
"""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vlm.data.batch import Text
from vlm.data.plan import Order, blocks
from vlm.data.text import Tokenizer
from vlm.nn.tokens import IGNORE

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**20  # tokenized at once: enough for every core, little memory
_FORMAT = b"vlm packed ids 1"  # another number whenever the same documents would give other bytes

log = logging.getLogger(__name__)
Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class _Facts:
    """What the small JSON beside the ids says: their number and type, and hashes of all that they were made from."""

    tokens: int
    documents: int
    dtype: str
    text: str
    tokenizer: str


def pack(documents: Iterable[str], tokenizer: Tokenizer, path: Path) -> Ids:
    """Ids of all documents in one flat file `path`, mapped into memory; `path`.json beside it says how it was made.

    Each document is bos, ids, eos as for Llama; where both are one token (GPT-2) it stands once, at the end. Two bytes
    an id, or four where the vocabulary is above 65,536. A file of the same documents and tokenizer is used as it is:
    to know that, the documents are read and hashed, not tokenized. Nothing half-written ever has the name `path`.
    ValueError: no document, an iterator (it cannot be read again), more than 2**32 entries in the vocabulary.
    """
    if isinstance(documents, str | Iterator):
        raise ValueError(f"documents of type {type(documents).__name__}: give Documents(…) or a list of strings")
    dtype, mark = _dtype(tokenizer.size), _mark(tokenizer)
    if path.exists():
        if not (stale := _stale(path, documents, mark)):
            return open_ids(path)
        log.warning("%s: %s; packing again", path, stale)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(documents, tokenizer, dtype, mark, path)
    return open_ids(path)


def open_ids(path: Path) -> Ids:
    """The ids that `pack` wrote, mapped into memory: only what is used is read. ValueError when they are not whole."""
    facts = _read_facts(path)
    return np.memmap(path, dtype=np.dtype(facts.dtype).newbyteorder("<"), mode="r", shape=(facts.tokens,))


class PackedLoader:
    """Batches of blocks of `length` neighbouring tokens; a block may span documents.

    The label of a token is its own id (the model shifts); the first of a block has nothing before it: IGNORE.
    The last tokens, too few for a block, are never used. `steps_per_epoch`: steps until every block was seen once.
    ValueError: fewer tokens than one block, a number out of range.
    """

    def __init__(self, ids: Ids, length: int, batch_size: int, seed: int = 0) -> None:
        """`ids`: one flat array, as from `pack`; a memory map is never read as a whole."""
        for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed}: must be from 0 to 2**63 - 1")
        self.blocks = len(ids) // length
        if not self.blocks:
            raise ValueError(f"length={length}: the text has only {len(ids)} tokens, not one block; make it smaller")
        self.ids, self.length, self.batch_size, self.seed = ids, length, batch_size, seed
        self.steps_per_epoch = -(-self.blocks // batch_size)
        self._order = Order(blocks(self.blocks), self.blocks, seed)

    def train(self, numbers: Iterable[int]) -> Iterator[Text]:
        """Batches by their numbers in a stream without end.

        Every epoch goes through all blocks in a new order; a batch may hold the end of one and the start of the next.
        """
        for step in numbers:
            places = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield self._batch(map(self._order, places))

    def once(self, rank: int = 0, ranks: int = 1) -> Iterator[Text]:
        """Every block once, in the order of the text; the last batch may have fewer. `rank`, `ranks`: see `Loader`."""
        for first in range(rank * self.batch_size, self.blocks, ranks * self.batch_size):
            yield self._batch(range(first, min(first + self.batch_size, self.blocks)))

    def _batch(self, blocks: Iterable[int]) -> Text:
        rows = [self.ids[block * self.length : (block + 1) * self.length] for block in blocks]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        labels = ids.clone()
        labels[:, 0] = IGNORE
        return Text(ids, torch.ones_like(ids, dtype=torch.bool), labels, full=True)


def _dtype(size: int) -> np.dtype[Any]:
    if size > 2**32:
        raise ValueError(f"a vocabulary of {size} entries: packed ids have 32 bits, so 2**32 entries at most")
    return np.dtype("<u2" if size <= 2**16 else "<u4")


def _mark(tokenizer: Tokenizer) -> str:
    """Hash of all that decides which ids a text gets."""
    spec = json.loads(tokenizer.inner.to_str())
    for unused in ("post_processor", "padding", "truncation"):  # saving a tokenizer changes them
        del spec[unused]
    control = [tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.dec]
    return hashlib.sha256(_FORMAT + json.dumps([spec, control], sort_keys=True).encode()).hexdigest()


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int], None]]:
    """On a terminal, a line that counts the documents it is told of."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda count: bar.update(task, description=f"{title}: {count:,} documents")


def _batches(documents: Iterable[str], add: Callable[[bytes], None]) -> Iterator[list[str]]:
    """Documents by the handful, `add`ed to a hash as they pass."""
    texts, room = list[str](), BATCH_CHARACTERS
    for text in documents:
        data = text.encode("utf-8", "replace")
        add(len(data).to_bytes(8, "little"))  # else two documents would be as good as one
        add(data)
        texts.append(text)
        room -= len(text)
        if room <= 0 or len(texts) == BATCH_DOCUMENTS:
            yield texts
            texts, room = [], BATCH_CHARACTERS
    if texts:
        yield texts


def _stale(path: Path, documents: Iterable[str], mark: str) -> str:
    """Why a packed file cannot be used; empty when it can."""
    try:
        facts = _read_facts(path)
    except ValueError:
        return "not whole"
    if facts.tokenizer != mark:
        return "made with another tokenizer"
    digest, count = hashlib.sha256(), 0
    with _bar(f"comparing with {path.name}") as tell:
        for texts in _batches(documents, digest.update):
            tell(count := count + len(texts))
    return "" if facts.text == digest.hexdigest() else "made from other documents"


def _write(documents: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype[Any], mark: str, path: Path) -> None:
    digest, tokens, count = hashlib.sha256(), 0, 0
    start = [] if tokenizer.bos == tokenizer.eos else tokenizer.start
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as handle, _bar(f"packing {path.name}") as tell:
            for texts in _batches(documents, digest.update):
                parts = [(*start, *ids, tokenizer.eos) for ids in tokenizer.encode_batch(texts)]
                ids = np.fromiter(itertools.chain.from_iterable(parts), dtype)
                handle.write(ids.tobytes())
                tokens, count = tokens + len(ids), count + len(texts)
                tell(count)
        if not count:
            raise ValueError(f"{path}: no document to pack")
        facts = _Facts(tokens, count, dtype.name, digest.hexdigest(), mark)
        _beside(path).unlink(missing_ok=True)  # first: else new ids could stand beside old facts
        draft.replace(path)
        draft.write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
        draft.replace(_beside(path))
    finally:
        draft.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_facts(path: Path) -> _Facts:
    try:
        facts = _Facts(**json.loads(_beside(path).read_text(encoding="utf-8")))
        whole = path.stat().st_size == facts.tokens * {"uint16": 2, "uint32": 4}[facts.dtype]
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}; make it with `pack`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{_beside(path)}: does not describe packed ids ({error}); pack again") from None
    if not whole:
        raise ValueError(f"{path}: its size is not that of {facts.tokens} ids of {facts.dtype}; pack again")
    return facts
