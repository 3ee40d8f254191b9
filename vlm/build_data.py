"""Settings of data to objects: tokenizers, templates, sources, and the loaders that make batches of them."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import nn
from typing_extensions import assert_never

from vlm.config import schema
from vlm.config.pictures import MixedSource, OwnTemplate, PictureData
from vlm.config.vision import Vision
from vlm.data.augment import Augment
from vlm.data.cache import Cache, default_folder
from vlm.data.features import FeatureDtype, FeatureInfo, FeatureShards, Transform, open_features
from vlm.data.image import ImageTransform
from vlm.data.loader import Loader
from vlm.data.mixture import Mixture
from vlm.data.pictures import Pictures
from vlm.data.sources import open_pictures
from vlm.data.talk_batch import Reader, TalkForm
from vlm.data.template import Template
from vlm.data.text import Tokenizer, clip_tokenizer, load_tokenizer, train_bpe
from vlm.model import vlm
from vlm.model.published.hub import find
from vlm.model.published.tokens import published_tokenizer
from vlm.model.vlm import VisionLanguageModel, need
from vlm.model.weights.files import fingerprint
from vlm.nn.adapter import adapters

Spec = str | list[str] | list[MixedSource]


def tokenizer(settings: schema.Tokenizer, captions: Iterable[str]) -> Tokenizer:
    """The tokenizer; `captions` are read only if one is to be learned from them."""
    match settings:
        case schema.FileTokenizer(path=path):
            return load_tokenizer(Path(path))
        case schema.PublishedTokenizer(name=name):
            return published_tokenizer(find(name), settings.add)
        case schema.ClipTokenizer():
            return clip_tokenizer()
        case schema.BpeTokenizer(vocab=vocab):
            return train_bpe(captions, vocab)
        case _:
            assert_never(settings)


def reader(run: schema.Run, tokens: Tokenizer, kept: Path | None = None) -> Reader | None:
    """How the Q-Former reads questions; None where it reads none. `kept`: a copy of its tokenizer, if there is one."""
    settings = run.data.instruction if isinstance(run.data, schema.ChatData) else None
    if settings is None:
        return None
    if settings.tokenizer is not None:
        tokens = load_tokenizer(kept) if kept is not None and kept.exists() else tokenizer(settings.tokenizer, ())
    return Reader(tokens, settings.max_tokens)


def template(settings: str | OwnTemplate) -> Template:
    """A published template, that of a line, or one of the user's own. ValueError: what no template can be."""
    if isinstance(settings, str):
        return Template.of(settings)
    return Template(**settings.model_dump() | {"stop": tuple(settings.stop)})


def talk_form(
    run: schema.Run,
    tokens: Tokenizer,
    image_tokens: int,
    reply_start: int | None = None,
    reads: Reader | None = None,
) -> TalkForm | None:
    """How conversations become text; None for a run on captions. `reads`: as of `reader` unless given.

    `image_tokens`, `reply_start`: of the model.
    """
    data = run.data
    if not isinstance(data, schema.ChatData):
        return None
    return TalkForm(
        tokens,
        template(data.template),
        image_tokens,
        data.max_tokens,
        data.turns,
        data.system,
        tuple(data.questions),
        reader(run, tokens) if reads is None else reads,
        reply_start,
    )


def feature_info(settings: Vision, encoder: vlm.ImageEncoder, dtype: FeatureDtype = "float32") -> FeatureInfo:
    """What features of an encoder are, and what they come from."""
    tokens, dim, shown = encoder.tokens, encoder.dim, repr(encoder.transform)
    assert isinstance(encoder, nn.Module)
    state = encoder.state_dict()
    made = settings.model_dump_json(exclude={"weights", "frozen"})
    return FeatureInfo(tokens, dim, dtype, made, fingerprint(state, list(state)), shown)


def transform(settings: Vision | None, model: VisionLanguageModel, source: Pictures) -> Transform:
    """How the samples of a source become what the model takes. Errors: features of another encoder, or augmented.

    `settings`: of the model's encoder; None for a published model, whose features are not kept.
    """
    encoder = need(model.vision, "image encoder")
    if not isinstance(source, FeatureShards):
        return encoder.transform
    if settings is None:
        raise ValueError(f"{source.folder} holds features of a run's encoder: give the pictures to a published model")
    if adapters(model.get_submodule("vision")):
        raise ValueError(f"model.lora: an encoder with adapters cannot learn from {source.folder}")
    if not settings.frozen:
        raise ValueError(f"model.vision.frozen=false: an encoder that learns cannot learn from {source.folder}")
    source.info.refuse_other(feature_info(settings, encoder), source.folder)
    return source.info


def shards(settings: PictureData, spec: Spec) -> Pictures:
    """An index over tar shards of pictures or features, over what else `spec` names, or over a mixture of sources."""
    if isinstance(spec, list) and (mixed := [part for part in spec if isinstance(part, MixedSource)]):
        return _mixture(settings, mixed)
    names = spec if isinstance(spec, str) else [name for name in spec if isinstance(name, str)]
    cache = shard_cache(settings)
    talks = isinstance(settings, schema.ChatData)
    if (features := open_features(names, settings.max_bad_fraction, cache)) is not None:
        if talks:
            raise ValueError(f"{features.folder}: holds features, which data.kind=chats does not take; name pictures")
        return features
    return open_pictures(
        names, settings.image, settings.caption, settings.id, settings.images, settings.max_bad_fraction, cache, talks
    )


def _mixture(settings: PictureData, parts: list[MixedSource]) -> Mixture:
    sources, problems = list[Pictures](), list[str]()
    for number, part in enumerate(parts):
        own = part.model_dump(include={"images", "image", "caption", "id"}, exclude_none=True)
        try:
            source = shards(settings.model_copy(update=own), part.source)
        except ValueError as error:
            problems.append(f"data.train.{number}: {error}")
            continue
        if isinstance(source, FeatureShards):
            problems.append(f"data.train.{number}: {source.folder} holds features; a mixture is of pictures")
        sources.append(source)
    if problems:
        raise ValueError("\n".join(problems))
    names = [part.source if isinstance(part.source, str) else ", ".join(part.source) for part in parts]
    return Mixture(sources, names, [part.weight for part in parts], settings.max_bad_fraction)


def shard_cache(settings: PictureData) -> Cache:
    """Where shards by address and indices are kept."""
    folder = settings.shard_cache
    return Cache(default_folder() if folder is None else Path(folder).expanduser(), settings.shard_cache_gb)


def training_loader(
    run: schema.Run,
    source: Pictures,
    transform: Transform,
    tokens: Tokenizer,
    image_tokens: int,
    reply_start: int | None = None,
) -> Loader:
    """Endless batches for training, augmented. Errors: features, which cannot be.

    `image_tokens`, `reply_start`: of the model.
    """
    data = run.pictures
    if isinstance(source, FeatureShards) and data.augment is not None:
        raise ValueError(
            f"data.augment: it changes pictures, and {source.folder} holds what an encoder made of them; "
            "set data.augment=null, or train on the pictures"
        )
    if isinstance(transform, ImageTransform):
        transform = replace(transform, scaled=int(data.scaled_decode))
    pairs = data if isinstance(data, schema.PairData) else None
    return Loader(
        source,
        transform,
        tokens,
        run.train.batch_size,
        max_tokens=data.max_tokens,
        template=caption_template(run),
        image_tokens=image_tokens,
        reply_start=reply_start,
        captions_per_image=1 if pairs is None else pairs.captions_per_image,
        keep_first=pairs is not None and pairs.keep_first_caption,
        augment=None if data.augment is None else Augment(**data.augment.model_dump()),
        seed=run.train.seed,
        workers=data.workers,
        cache_mb=data.cache_mb,
        window=data.shuffle_window,
        talks=talk_form(run, tokens, image_tokens, reply_start),
    )


def caption_template(run: schema.Run) -> Template | None:
    """How a caption stands in the language model's text; None without one, and for conversations."""
    data = run.data
    return template(data.template) if run.model.language is not None and isinstance(data, schema.PairData) else None


def evaluation_loader(
    data: schema.PairData | schema.ChatData,
    source: Pictures,
    transform: Transform,
    tokens: Tokenizer,
    batch_size: int,
    image_tokens: int = 0,
    reply_start: int | None = None,
    talks: TalkForm | None = None,
    captions: int = 0,
) -> Loader:
    """Every sample once, as it is; `image_tokens` and `reply_start` are the model's.

    `captions`: the first so many of each; 0: all of them.
    """
    return Loader(
        source,
        transform,
        tokens,
        batch_size,
        max_tokens=data.max_tokens,
        template=template(data.template) if image_tokens and isinstance(data, schema.PairData) else None,
        image_tokens=image_tokens,
        reply_start=reply_start,
        captions_per_image=captions,
        shuffle=False,
        talks=talks,
    )
