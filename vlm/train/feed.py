"""Where a run's batches come from: pictures with captions, or packed text. Both look alike to the loop."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from typing_extensions import assert_never

from vlm import build_data
from vlm.config import schema
from vlm.data.batch import Batch, Text
from vlm.data.documents import Documents
from vlm.data.loader import Loader
from vlm.data.mixture import Mixture
from vlm.data.pack import PackedLoader, pack
from vlm.data.pictures import Pictures
from vlm.data.sources import Source
from vlm.data.text import Tokenizer
from vlm.model.vlm import VisionLanguageModel
from vlm.train.log import note
from vlm.train.validate import Once

PACKED = "packed"  # ids of the texts, in the run's folder


@runtime_checkable
class Feed(Protocol):
    """The data of a run; nothing is read before it is needed."""

    texts: int  # of a batch

    def captions(self) -> Iterable[str]:
        """All texts, for a tokenizer to be learned from."""
        ...

    def open(self, model: VisionLanguageModel, tokenizer: Tokenizer, folder: Path) -> tuple["Train", Once | None]:
        """Training batches by number, and the validation data once."""
        ...

    def left_out(self) -> Counter[str]:
        """Unusable samples that were known when the data was opened, by reason."""
        ...

    def bad(self) -> Counter[str]:
        """Unusable samples that this process has met since, by reason."""
        ...


Train = Callable[[Iterable[int]], Iterator[Batch]]  # batches by their numbers in the stream


def feed(run: schema.Run) -> Feed:
    """What the settings name as data."""
    match run.data:
        case schema.PairData() | schema.ChatData():
            return PictureFeed(run, run.data)
        case schema.TextData():
            return TextFeed(run, run.data)
        case _:
            assert_never(run.data)


class PictureFeed:
    """Shards of pictures with captions or of conversations, or another source of them."""

    def __init__(self, run: schema.Run, data: schema.PairData | schema.ChatData) -> None:
        """Errors: names that lead to no shard or source."""
        self._run, self._data = run, data
        self._shards = _opened(data, data.train)
        if isinstance(self._shards, Mixture):
            train = run.train
            note(self._shards.table(train.steps * train.accumulate * train.batch_size, train.seed))
        self._loader: Loader | None = None
        self.texts = run.train.batch_size * (data.captions_per_image if isinstance(data, schema.PairData) else 1)

    def captions(self) -> Iterable[str]:
        """All captions, or what is said in all conversations."""
        return self._shards.captions()

    def open(self, model: VisionLanguageModel, tokenizer: Tokenizer, folder: Path) -> tuple[Train, Once | None]:
        """Augmented batches for training; the validation data as it is."""
        wanted = model.image_tokens, model.reply_start
        transform = build_data.transform(self._run.model.vision, model, self._shards)
        self._loader = build_data.training_loader(self._run, self._shards, transform, tokenizer, *wanted)
        once = None
        if self._data.val is not None:
            val = _opened(self._data, self._data.val)
            seen_as = build_data.transform(self._run.model.vision, model, val)
            size = self._run.train.batch_size
            talks = build_data.talk_form(self._run, tokenizer, *wanted)
            once = build_data.evaluation_loader(self._data, val, seen_as, tokenizer, size, *wanted, talks).once
        return self._loader.train, once

    def left_out(self) -> Counter[str]:
        """By the index of the shards."""
        return self._shards.bad

    def bad(self) -> Counter[str]:
        """By the loader."""
        return Counter() if self._loader is None else self._loader.bad


def _opened(data: schema.PairData | schema.ChatData, spec: build_data.Spec) -> Pictures:
    """The pictures, with a word on how a source that is no shard was understood."""
    pictures = build_data.shards(data, spec)
    for source in pictures.sources if isinstance(pictures, Mixture) else [pictures]:
        if isinstance(source, Source):
            note(source.about)
    return pictures


class TextFeed:
    """Documents, packed once into a file of ids in the run's folder."""

    def __init__(self, run: schema.Run, data: schema.TextData) -> None:
        """Errors: names that lead to no documents."""
        self._run, self._data = run, data
        self._documents = self._source(data.train)
        self.texts = run.train.batch_size

    def captions(self) -> Iterable[str]:
        """All documents."""
        return self._documents

    def open(self, model: VisionLanguageModel, tokenizer: Tokenizer, folder: Path) -> tuple[Train, Once | None]:
        """Blocks of equal length, in a new order each epoch; the validation data in its own order."""
        train = self._packed(self._documents, tokenizer, folder / f"{PACKED}-train")
        once = None
        if self._data.val is not None:
            val = self._packed(self._source(self._data.val), tokenizer, folder / f"{PACKED}-val")
            once = partial(_as_batches, val.once)
        return partial(_as_batches, train.train), once

    def left_out(self) -> Counter[str]:
        """Of the training documents."""
        return self._documents.bad

    def bad(self) -> Counter[str]:
        """None: packed ids can all be used."""
        return Counter()

    def _source(self, spec: str | list[str]) -> Documents:
        return Documents(spec, self._data.field, self._data.max_bad_fraction)

    def _packed(self, documents: Documents, tokenizer: Tokenizer, path: Path) -> PackedLoader:
        ids = pack(documents, tokenizer, path)
        return PackedLoader(ids, self._data.length, self._run.train.batch_size, self._run.train.seed)


def _as_batches(texts: Callable[..., Iterator[Text]], *wanted: Any) -> Iterator[Batch]:
    return map(Batch.of_text, texts(*wanted))


def begun(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches with the first one made: most of what can be wrong with data shows before a run exists."""
    return chain([next(batches)], batches)
