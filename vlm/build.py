"""Settings to objects: the one place where configs and modules meet, and where dependent sizes are derived."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_never

from vlm.config import schema
from vlm.config.language import (
    AttentionMixer,
    Ffn,
    GatedMlpFfn,
    HuggingFaceLanguage,
    Mixer,
    MoeFfn,
    PublishedLanguage,
    RetentionMixer,
    TransformerLanguage,
)
from vlm.config.language import Language as LanguageSettings
from vlm.config.pictures import MixedSource, OwnTemplate, PictureData
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
from vlm.model import language, vlm
from vlm.model.connector import FirstToken, MeanPool, MlpConnector
from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.huggingface import huggingface_language
from vlm.model.language import Decoder, Language, LearnedPositions
from vlm.model.lora import Lora, about, add_lora
from vlm.model.published import load as published
from vlm.model.published.hub import find
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.text import TextEncoder
from vlm.model.vision import ImageEncoder, open_clip_encoder, timm_encoder
from vlm.model.vlm import VisionLanguageModel, need
from vlm.model.weights.files import fingerprint
from vlm.nn.adapter import adapters
from vlm.nn.attention import Attention
from vlm.nn.backend import bfloat16_is_fast
from vlm.nn.block import PostNorm, PreNorm
from vlm.nn.ffn import GatedMlp, QuickGELU
from vlm.nn.moe import Balance, MixtureOfExperts, sigmoid_router, softmax_router
from vlm.nn.norm import RMSNorm
from vlm.nn.retain import Chunkwise
from vlm.nn.retain_fla import FlaChunks
from vlm.nn.retention import Decay, Retention
from vlm.nn.rotary import Rotary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Spec = str | list[str] | list[MixedSource]


def model(run: schema.Run, tokenizer: Tokenizer, reads: Reader | None = None) -> VisionLanguageModel:
    """The model of a run with its own initialisation; the seed is set first, so equal settings give equal weights.

    `reads`: how its Q-Former reads questions, as of `reader` unless given.
    """
    settings = run.model
    torch.manual_seed(run.train.seed)
    if settings.vision is None or settings.connector is None:
        assert settings.language is not None
        return VisionLanguageModel(language=language_model(settings.language, tokenizer.size))
    vision = image_encoder(settings.vision)
    kinds = {loss.kind for loss in run.losses}
    longest = run.pictures.max_tokens
    reads = reader(run, tokenizer) if reads is None else reads
    text = None if settings.text is None else text_encoder(settings.text, tokenizer.size, longest)
    writer = None if settings.language is None else language_model(settings.language, tokenizer.size)
    words = (tokenizer.size, longest) if reads is None else (reads.tokenizer.size, reads.max_tokens)
    bridge = connector(settings.connector, vision, writer, *words)
    words_of = tokenizer if reads is None else reads.tokenizer
    if isinstance(bridge, QFormer) and bridge.text is not None and words_of.bos is None:
        raise ValueError("tokenizer: it has no start token, and what a Q-Former reads begins with one: take another")
    heads = "itc" in kinds or "itm" in kinds
    text_dim = text.dim if text is not None else bridge.width if isinstance(bridge, QFormer) else 0
    seen = bridge.dim
    return VisionLanguageModel(
        vision=vision,
        connector=bridge,
        text=text,
        language=writer,
        contrast=ContrastiveHead(seen, text_dim, settings.embed_dim, settings.temperature) if heads else None,
        match=MatchingHead(bridge.width) if "itm" in kinds and isinstance(bridge, QFormer) else None,
    )


def adapt(run: schema.Run, model: VisionLanguageModel) -> list[str]:
    """Puts the adapters of `model.lora` into a model that has its starting weights; one line for each kind of layer."""
    return about(model, add_lora(model, [Lora(**spec.model_dump()) for spec in run.model.lora]))


def image_encoder(settings: schema.Vision) -> ImageEncoder:
    """The image encoder, with its pretrained weights if any are named."""
    dtype = None if settings.dtype is None else DTYPES[settings.dtype]
    match settings:
        case schema.OpenClipVision(name=name, weights=weights, layer=layer, image_size=size, frozen=frozen):
            return open_clip_encoder(name, weights, layer, settings.class_token, size, frozen, dtype)
        case schema.TimmVision(name=name, weights=weights, layer=layer, image_size=size, frozen=frozen):
            return timm_encoder(name, weights, layer, settings.class_token, size, settings.args, frozen, dtype)
        case schema.PublishedVision(name=name, architecture=values, layer=layer, frozen=frozen):
            encoder = published.image_encoder(name, values, layer, settings.class_token, frozen, dtype)
            if settings.resize is not None:
                encoder.transform = replace(encoder.transform, resize=settings.resize)
            return encoder
        case _:
            assert_never(settings)


def connector(
    settings: schema.Connector, vision: ImageEncoder, language: Language | None, vocabulary: int, max_tokens: int
) -> MlpConnector | MeanPool | QFormer:
    """What stands between the image encoder and what reads it."""
    out = vision.dim if language is None else language.dim
    match settings:
        case schema.LinearConnector():
            return MlpConnector(vision.dim, out, vision.tokens, depth=1)
        case schema.MlpConnector(depth=depth, hidden=hidden):
            return MlpConnector(vision.dim, out, vision.tokens, depth, hidden)
        case schema.PoolConnector(kind="mean"):
            return MeanPool(vision.dim)
        case schema.PoolConnector():
            return FirstToken(vision.dim)
        case schema.QFormerConnector():
            text = TextBranch(vocabulary, settings.dim, max_tokens) if settings.text else None
            return QFormer(
                image_dim=vision.dim,
                dim=settings.dim,
                layers=settings.layers,
                heads=settings.heads,
                queries=settings.queries,
                hidden=settings.hidden,
                cross_every=settings.cross_every,
                text=text,
                image_norm=nn.LayerNorm(vision.dim),
                out_dim=None if language is None else language.dim,
                dropout=settings.dropout,
            )
        case _:
            assert_never(settings)


def text_encoder(settings: schema.TextTower, vocabulary: int, max_tokens: int) -> TextEncoder:
    """CLIP's text tower."""
    activation = QuickGELU if settings.activation == "quick_gelu" else nn.GELU
    return TextEncoder(
        vocabulary,
        settings.dim,
        settings.layers,
        settings.heads,
        max_tokens,
        activation,
        settings.hidden,
        settings.dropout,
    )


def language_model(settings: LanguageSettings, vocabulary: int) -> Language:
    """The language model, with its published weights if any are named; `vocabulary`: rows that its texts need.

    ValueError: a published model with fewer.
    """
    match settings:
        case TransformerLanguage():
            return decoder(settings, vocabulary)
        case PublishedLanguage(name=name, architecture=values):
            known = values if values is None or name is not None else {"vocab_size": vocabulary, **values}
            dtype = None if settings.dtype is None else DTYPES[settings.dtype]
            found = published.language_model(name, known, dtype)
        case HuggingFaceLanguage(name=name, pretrained=pretrained):
            found = huggingface_language(name, pretrained, DTYPES[settings.dtype])
        case _:
            assert_never(settings)
    if (rows := found.vocabulary) < vocabulary:
        raise ValueError(
            f"model.language.name={name}: it knows {rows} tokens, the tokenizer {vocabulary}: take its own "
            f"(tokenizer.kind=published tokenizer.name={name})"
        )
    return found


def decoder(settings: TransformerLanguage, vocabulary: int) -> Decoder:
    """The decoder that settings of our own describe."""
    dim, heads, mixer = settings.dim, settings.heads, settings.mixer
    rotary = positions = decay = None
    match mixer:
        case AttentionMixer(max_positions=int(longest)):
            positions = LearnedPositions(longest, dim)
        case AttentionMixer(theta=theta):
            rotary = Rotary(dim // heads, theta)
        case RetentionMixer():
            decay = Decay(heads, dim // heads, mixer.decay)
    return language.decoder(
        vocabulary,
        dim,
        settings.layers,
        mixer=lambda _: _mixer(mixer, dim, heads),
        ffn=lambda i: _ffn(settings.ffn, dim, i),
        norm=lambda: RMSNorm(dim, eps=1e-5) if settings.norm == "rms" else nn.LayerNorm(dim),
        rotary=rotary,
        decay=decay,
        positions=positions,
        tied=settings.tied,
        dropout=settings.dropout,
        residual=PreNorm if settings.placement == "pre" else PostNorm,
        final_norm=settings.placement == "pre",
    )


def _mixer(settings: Mixer, dim: int, heads: int) -> nn.Module:
    match settings:
        case AttentionMixer():
            return Attention(
                dim,
                heads,
                settings.kv_heads,
                settings.bias,
                out_bias=False,
                norm=(lambda width: RMSNorm(width, eps=1e-5)) if settings.head_norm else None,
                window=settings.window,
            )
        case RetentionMixer():
            form = FlaChunks() if settings.kernel == "fla" else Chunkwise(settings.chunk)
            return Retention(dim, heads, settings.value_dim, form=form)
        case _:
            assert_never(settings)


def _ffn(settings: Ffn, dim: int, block: int) -> nn.Module:
    dense = -(-8 * dim // (3 * 32)) * 32  # as Llama rounds 8/3 dim
    match settings:
        case GatedMlpFfn(hidden=hidden):
            return GatedMlp(dim, hidden or dense)
        case MoeFfn(dense_blocks=first) if block < first:
            return GatedMlp(dim, settings.dense_hidden or dense)
        case MoeFfn():
            width = settings.hidden or max(1, dense // (settings.top_k + settings.shared))
            return _experts(settings, dim, width)
        case _:
            assert_never(settings)


def _experts(settings: MoeFfn, dim: int, hidden: int) -> MixtureOfExperts:
    router = (softmax_router if settings.router == "softmax" else sigmoid_router)(
        dim,
        settings.experts,
        settings.top_k,
        settings.renormalize,
        settings.scale,
        settings.groups,
        settings.top_groups,
        bias=settings.bias_rate is not None,
    )
    losses = [(settings.balance, None), (settings.device_balance, settings.devices)]
    return MixtureOfExperts(
        dim,
        hidden,
        router,
        shared=GatedMlp(dim, settings.shared * hidden) if settings.shared else None,
        balance=[Balance(alpha, groups) for alpha, groups in losses if alpha],
    )


def tokenizer(settings: schema.Tokenizer, captions: Iterable[str]) -> Tokenizer:
    """The tokenizer; `captions` are read only if one is to be learned from them."""
    match settings:
        case schema.FileTokenizer(path=path):
            return load_tokenizer(Path(path))
        case schema.PublishedTokenizer(name=name):
            return load_tokenizer(find(name), settings.add)
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


def feature_info(settings: schema.Vision, encoder: vlm.ImageEncoder, dtype: FeatureDtype = "float32") -> FeatureInfo:
    """What features of an encoder are, and what they come from."""
    tokens, dim, shown = encoder.tokens, encoder.dim, repr(encoder.transform)
    assert isinstance(encoder, nn.Module)
    state = encoder.state_dict()
    made = settings.model_dump_json(exclude={"weights", "frozen"})
    return FeatureInfo(tokens, dim, dtype, made, fingerprint(state, list(state)), shown)


def transform(settings: schema.Vision | None, model: VisionLanguageModel, source: Pictures) -> Transform:
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
        transform = replace(transform, scaled=data.scaled_decode)
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
) -> Loader:
    """Every sample once, as it is, with all its captions; `image_tokens` and `reply_start` are the model's."""
    return Loader(
        source,
        transform,
        tokens,
        batch_size,
        max_tokens=data.max_tokens,
        template=template(data.template) if image_tokens and isinstance(data, schema.PairData) else None,
        image_tokens=image_tokens,
        reply_start=reply_start,
        captions_per_image=0,
        shuffle=False,
        talks=talks,
    )


def precision(run: schema.Run, device: torch.device) -> torch.dtype:
    """The dtype of products while training."""
    if run.train.precision == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    return DTYPES[run.train.precision]
