"""Settings to objects: the one place where configs and modules meet, and where dependent sizes are derived."""

from dataclasses import replace

import torch
from torch import nn
from typing_extensions import assert_never

from vlm.build_data import reader
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
from vlm.config.vision import OpenClipVision, PublishedVision, TimmVision, Vision
from vlm.data.talk_batch import Reader
from vlm.data.text import Tokenizer
from vlm.model import language
from vlm.model.connector import FirstToken, MeanPool, MlpConnector
from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.huggingface import huggingface_language
from vlm.model.language import Decoder, Language, LearnedPositions
from vlm.model.lora import Lora, about, add_lora
from vlm.model.published import load as published
from vlm.model.qformer import QFormer, TextBranch, bert_transform
from vlm.model.text import TextEncoder
from vlm.model.vision import ImageEncoder, open_clip_encoder, timm_encoder
from vlm.model.vlm import VisionLanguageModel
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


def image_encoder(settings: Vision) -> ImageEncoder:
    """The image encoder, with its pretrained weights if any are named."""
    dtype = None if settings.dtype is None else DTYPES[settings.dtype]
    match settings:
        case OpenClipVision(name=name, weights=weights, layer=layer, image_size=size, frozen=frozen):
            return open_clip_encoder(name, weights, layer, settings.class_token, size, frozen, dtype)
        case TimmVision(name=name, weights=weights, layer=layer, image_size=size, frozen=frozen):
            return timm_encoder(name, weights, layer, settings.class_token, size, settings.args, frozen, dtype)
        case PublishedVision(name=name, architecture=values, layer=layer, frozen=frozen):
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
            text = _text_branch(settings, vocabulary, max_tokens) if settings.text else None
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


def _text_branch(settings: schema.QFormerConnector, vocabulary: int, max_tokens: int) -> TextBranch:
    match settings.text_head:
        case "linear":
            return TextBranch(vocabulary, settings.dim, max_tokens)
        case "bert":
            return TextBranch(vocabulary, settings.dim, max_tokens, bert_transform(settings.dim), "tied")
        case "none":
            return TextBranch(vocabulary, settings.dim, max_tokens, head="none")
        case _:
            assert_never(settings.text_head)


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


def precision(run: schema.Run, device: torch.device) -> torch.dtype:
    """The dtype of products while training."""
    if run.train.precision == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    return DTYPES[run.train.precision]
