"""What figures come from, as sums that another machine finds as well: the model's weights, the data, how they meet."""

import hashlib
import json
from dataclasses import asdict, dataclass

from vlm.data.image import BadSample
from vlm.data.loader import Loader
from vlm.data.pictures import Pictures
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import fingerprint

_LANGUAGE = "language."  # writes, and has no part in vectors


@dataclass(frozen=True)
class Origin:
    """All that decides what features are, but for the data."""

    weights: str  # SHA-256 of all parts that look or read
    model: str  # SHA-256 of how they are put together
    transform: str
    tokenizer: str  # SHA-256
    dtype: str  # of the weights
    device: str
    texts: str  # how many tokens and captions, of which tokens are kept
    batch_size: str  # the last bits of a product depend on it

    @property
    def tag(self) -> str:
        """One sum of all."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def others(self, before: dict[str, str]) -> list[str]:
        """In which points an earlier one differs."""
        return [name for name, value in asdict(self).items() if before.get(name) != value]


def origin(model: VisionLanguageModel, loader: Loader, texts: bool = True) -> Origin:
    """Of features that `model` makes of what `loader` gives; `texts`: of its captions too."""
    first = next(model.parameters())
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(_LANGUAGE)}
    built = [f"{name}: {part}" for name, part in model.named_children() if f"{name}." != _LANGUAGE]
    control = f"{loader.tokenizer.control}"
    read = {"max_tokens": loader.max_tokens, "captions": loader.captions_per_image, "embedded": texts}
    return Origin(
        weights=fingerprint(state, list(state)),
        model=_sum("\n".join(built)),
        transform=repr(loader.transform),
        tokenizer=_sum(loader.tokenizer.inner.to_str() + control),
        dtype=str(first.dtype).removeprefix("torch."),
        device=first.device.type,
        texts=json.dumps(read),
        batch_size=str(loader.batch_size),
    )


class DataSum:
    """SHA-256 of the samples up to one, in order: keys, ids, captions, and the bytes of the pictures.

    The same samples give the same sum, wherever their files lie.
    """

    def __init__(self, source: Pictures) -> None:
        self._source, self._sum, self._next = source, hashlib.sha256(), 0

    def upto(self, stop: int) -> str:
        """Of all samples before `stop`, which only grows from call to call. Reads each once, and decodes none."""
        assert stop >= self._next, "samples are gone through once"
        for index in range(self._next, stop):
            self._sum.update(_sample(self._source, index))
        self._next = stop
        return self._sum.hexdigest()


def data_fingerprint(source: Pictures) -> str:
    """Of all samples of a source, by their content."""
    return DataSum(source).upto(len(source))


def _sample(source: Pictures, index: int) -> bytes:
    try:
        raw = source.raw(index)
    except BadSample as bad:
        return json.dumps([source.key(index), bad.reason]).encode() + b"\n"
    pictures = [hashlib.sha256(data).hexdigest() for data in raw.images]
    return json.dumps([raw.key, raw.id, raw.captions, pictures]).encode() + b"\n"


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
