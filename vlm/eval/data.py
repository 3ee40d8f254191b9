"""What `vlm evaluate` measures on: any source of pictures, a standard benchmark, or a folder of CLIP_benchmark's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm import build_data
from vlm.config import schema
from vlm.data.loader import Loader
from vlm.data.pictures import Pictures
from vlm.data.sources import Source, open_pictures
from vlm.eval.benchmark import IMAGES, LABEL, Benchmark, find_benchmark
from vlm.eval.features import Features
from vlm.eval.protocol import Protocol, find_protocol
from vlm.restore import Ready


@dataclass(frozen=True)
class EvaluationData:
    """A source, and what is known of it. `labels`: where classes stand in it; None: it has captions."""

    source: Pictures
    settings: schema.PairData
    protocol: Protocol | None = None
    benchmark: Benchmark | None = None
    labels: str | None = None

    @property
    def about(self) -> str:
        """What was recognised, in words."""
        if self.benchmark is not None:
            kind = "classes" if self.benchmark.classes else "captions"
            return f"{self.benchmark.folder}: CLIP_benchmark's layout, split {self.benchmark.split}, with {kind}"
        return self.source.about if isinstance(self.source, Source) else ""

    def loader(self, ready: Ready) -> Loader:
        """Every sample once, as the model takes it, with the captions that count."""
        transform = build_data.transform(ready.vision, ready.model, self.source)
        captions = 0 if self.protocol is None else self.protocol.first
        tokens, size = ready.tokenizer, ready.batch_size
        return build_data.evaluation_loader(self.settings, self.source, transform, tokens, size, captions=captions)


def open_evaluation_data(
    names: Sequence[str],
    given: schema.Data,
    protocol: str | None = None,
    caption: str | None = None,
    labels: str | None = None,
    images: Path | None = None,
) -> EvaluationData:
    """Opens what `names` are. `given`: settings of the model's data, whose captions and ids are taken unless said
    otherwise; captions are read also for a model that was trained on conversations.

    `protocol`: a name of `PROTOCOLS`; its data may be Karpathy's JSON, a folder with it, or shards of that data.
    `caption`: where captions stand; `labels`: where classes stand, such as json:group or cls; `images`: the folder that
    paths in a table or JSON file are relative to. A folder of CLIP_benchmark's is recognised by its nshards.txt.
    ValueError: no such protocol, data of another size, no usable sample, both captions and labels.
    """
    if labels is not None and (caption is not None or protocol is not None):
        raise ValueError(f"--labels {labels}: a set is measured by its classes or by its captions; give one of the two")
    settings = _pairs(given)
    standard = None if protocol is None else find_protocol(protocol)
    found = find_benchmark(names[0]) if len(names) == 1 and labels is None else None
    if found is not None:
        return _benchmark(found, settings, standard, caption)
    if standard is not None:
        names = [standard.spec(name) for name in names]
    foreign = standard is not None or labels is not None  # of other make than what the model was trained on
    change: dict[str, object] = {"caption": labels or caption or settings.caption}
    if images is not None or foreign:
        change["images"] = None if images is None else str(images)
    if foreign:
        change["id"] = None
    chosen = settings.model_copy(update=change)
    source = _plain(chosen, names, chosen.image) if foreign else build_data.shards(chosen, list(names))
    _refuse_other_size(standard, source)
    return EvaluationData(source, chosen, standard, None, labels)


def folds(features: Features, protocol: Protocol | None) -> list[Features]:
    """The pictures of each fold with their captions; one fold of all without a protocol that says otherwise."""
    if protocol is None or protocol.folds == 1:
        return [features]
    places = features.places
    parts = [protocol.fold(number) for number in range(protocol.folds)]
    return [features.select(((places >= p.start) & (places < p.stop)).nonzero().flatten()) for p in parts]


def _pairs(given: schema.Data) -> schema.PairData:
    shared = {"train", "images", "image", "caption", "id", "max_bad_fraction", "shard_cache"}
    return given if isinstance(given, schema.PairData) else schema.PairData(**given.model_dump(include=shared))


def _benchmark(
    found: Benchmark, settings: schema.PairData, standard: Protocol | None, caption: str | None
) -> EvaluationData:
    if found.classes and (standard is not None or caption is not None):
        what = f"--caption {caption}" if standard is None else f"--protocol {standard.name}"
        raise ValueError(f"{found.folder}: has classes, and {what} is about captions: leave it away")
    chosen = settings.model_copy(update={"caption": caption or found.caption, "id": None})
    source = _plain(chosen, found.shards, IMAGES)
    _refuse_other_size(standard, source)
    return EvaluationData(source, chosen, standard, found, LABEL if found.classes else None)


def _plain(settings: schema.PairData, names: Sequence[str], image: str) -> Pictures:
    """Pictures with captions, whatever the model was trained on."""
    cache, limit = build_data.shard_cache(settings), settings.max_bad_fraction
    return open_pictures(list(names), image, settings.caption, settings.id, settings.images, limit, cache)


def _refuse_other_size(standard: Protocol | None, source: Pictures) -> None:
    """Also what would shift the folds: a picture that cannot be decoded keeps its place, what is left out has none."""
    if standard is None:
        return
    standard.refuse(len(source) + source.bad.total(), str(source.files[0]))
    if standard.folds > 1 and source.bad:
        raise ValueError(
            f"{source.files[0]}: {dict(source.bad)} were left out, so that others would come into the folds of "
            f"{standard.name}: mend them, or give a protocol without folds"
        )
