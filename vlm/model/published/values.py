"""config.json of a whole system from its modules: what `systems.system_part` reads, the way back.

ValueError everywhere: a part, or a pair of parts, that no published system has, in words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlm.model.connector import FirstToken, MlpConnector
from vlm.model.heads import ContrastiveHead
from vlm.model.language import Language
from vlm.model.published.values_language import activation_name, language_values
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.text import PaddedTextEncoder, TextEncoder
from vlm.model.vision import ImageEncoder, OpenClipBackbone, TimmBackbone
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.attention import Attention
from vlm.nn.block import Block
from vlm.nn.ffn import Mlp
from vlm.nn.route import PerRoute

SYSTEMS = (
    "CLIP's ViT with its text tower (CLIP), or a linear layer or an MLP and a language model (LLaVA); BLIP-2's ViT "
    "with a Q-Former and a language model (BLIP-2, InstructBLIP) or both heads of stage 1; a language model alone"
)

OLD_EOS = 2


@dataclass(frozen=True)
class Words:
    """What a config.json says of the vocabulary of its language model."""

    control: Mapping[str, Any]  # bos_token_id, eos_token_id, pad_token_id
    image: int | None = None  # the token that stands where an image is
    tied: bool = False  # is the head the embedding?

    def into(self, values: dict[str, Any], language: Language) -> dict[str, Any]:
        """A text_config with them, in the rows that the language model has."""
        return {**values, "vocab_size": language.vocabulary, **self.control}


def system_values(
    model: VisionLanguageModel, words: Words, language: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Its config.json. `language`: what is known of that of its language model, which the modules do not say all."""
    has = {name for name, _ in model.named_children()}
    reader, text = model.language, None
    if reader is not None:
        known = language_values(reader, "language") if language is None else dict(language)
        text = words.into(known, reader)
    if text is not None and has == {"language"}:
        return text
    match model.connector:
        case FirstToken() if has == {"vision", "connector", "text", "contrast"}:
            return _clip(model, words)
        case MlpConnector() as connector if text is not None and has == {"vision", "connector", "language"}:
            return _llava(_eyes(model), connector, text, words)
        case QFormer() as qformer if text is not None and has == {"vision", "connector", "language"}:
            return _blip2(_eyes(model), qformer, text, words)
        case QFormer() as qformer if has == {"vision", "connector", "contrast", "match"}:
            assert isinstance(model.contrast, ContrastiveHead)
            values = _blip2_values(_eyes(model), qformer, "blip_2")
            size = {"image_text_hidden_size": model.contrast.dim}
            return {"model_type": "blip-2", "architectures": ["Blip2ForImageTextRetrieval"], **size, **values}
    kinds = {name: type(getattr(model, name)).__name__ for name in sorted(has)}
    shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    raise ValueError(f"these parts together are no published system: {shown}; there are layouts for {SYSTEMS}")


def _eyes(model: VisionLanguageModel) -> ImageEncoder:
    assert isinstance(model.vision, ImageEncoder)
    return model.vision


def _clip(model: VisionLanguageModel, words: Words) -> dict[str, Any]:
    text, head = model.text, model.contrast
    if not isinstance(text, TextEncoder) or isinstance(text, PaddedTextEncoder) or head is None:
        raise ValueError(f"text ({type(text).__name__}): no text tower of CLIP's; there are layouts for {SYSTEMS}")
    if set(head.state_dict()) != {"image.weight", "text.weight", "log_scale"}:
        raise ValueError("contrast: CLIP's heads are two matrices without biases, and no number is added to its logits")
    _whole(_eyes(model), "CLIP")
    if words.control["eos_token_id"] == OLD_EOS:
        raise ValueError(
            f"text: the end of a text has the id {OLD_EOS}, by which transformers knows CLIP's first files, whose real "
            "one is the largest id: it would look elsewhere for the feature; train with another tokenizer (kind: clip)"
        )
    mixer, ffn, norm = _block(text.stack.blocks[0])
    shape = {"projection_dim": head.dim}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "vision_config": {**_clip_vision(_eyes(model)), **shape},
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.embedding.num_embeddings,
            "hidden_size": text.dim,
            "intermediate_size": ffn.up.out_features,
            "num_hidden_layers": len(text.stack.blocks),
            "num_attention_heads": mixer.heads,
            "max_position_embeddings": text.max_tokens,
            "hidden_act": activation_name(ffn.activation),
            "layer_norm_eps": norm.eps,
            **shape,
            **words.control,
        },
        **shape,
    }


def _whole(encoder: ImageEncoder, system: str) -> None:
    """Refuses an encoder that is read elsewhere than at its end."""
    layer, dropped = encoder.backbone.layer, getattr(encoder.backbone, "class_token", "keep") == "drop"
    if layer != -1 or dropped or getattr(encoder.backbone, "drop", 0):
        raise ValueError(f"vision: {system} reads all tokens of its end, so model.vision.layer=-1 class_token=keep")


def _clip_vision(encoder: ImageEncoder) -> dict[str, Any]:
    """The vision_config of open_clip's own ViT; what else it may have shows in its names, which are compared later."""
    tower = encoder.backbone.visual if isinstance(encoder.backbone, OpenClipBackbone) else None
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if tower is None or not blocks or not isinstance(blocks[0].attn, nn.MultiheadAttention):
        found = type(getattr(encoder.backbone, "model", tower)).__name__
        raise ValueError(f"vision ({found}): CLIP's own ViT alone has a place in CLIP and LLaVA")
    return {
        "model_type": "clip_vision_model",
        "hidden_size": tower.conv1.out_channels,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "num_channels": 3,
        "image_size": encoder.transform.size[0],
        "patch_size": tower.conv1.kernel_size[0],
        "hidden_act": activation_name(blocks[0].mlp.gelu),
        "layer_norm_eps": blocks[0].ln_1.eps,
    }


def _llava(encoder: ImageEncoder, connector: MlpConnector, text: dict[str, Any], words: Words) -> dict[str, Any]:
    if text["model_type"] == "t5":
        raise ValueError(
            "language: an encoder-decoder (T5), and LLaVA's is a decoder; behind a Q-Former there is BLIP-2"
        )
    vision = _clip_vision(encoder)
    linears = [layer for layer in connector.layers if isinstance(layer, nn.Linear)]
    if len(linears) > 2 or (len(linears) == 2 and linears[0].out_features != connector.dim):
        raise ValueError(
            f"connector: {len(linears)} layers of widths {', '.join(str(layer.out_features) for layer in linears)}: "
            f"LLaVA has one or two of the language model's width, {connector.dim}"
        )
    backbone = encoder.backbone
    assert isinstance(backbone, OpenClipBackbone)
    if backbone.layer == -1:
        raise ValueError(
            "vision: it is read after its last norm (model.vision.layer=-1); LLaVA reads what a block gives, such as -2"
        )
    layer = backbone.layer if backbone.layer < 0 else backbone.layer - vision["num_hidden_layers"]
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": vision,
        "text_config": text,
        # One layer: as the first of two, the second of which changes nothing.
        "projector_hidden_act": "gelu" if len(linears) == 2 else "linear",
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if backbone.class_token == "drop" else "full",
        "image_seq_length": encoder.tokens,
        "image_token_index": words.image,
        "tie_word_embeddings": words.tied,
    }


def _blip2(encoder: ImageEncoder, qformer: QFormer, text: dict[str, Any], words: Words) -> dict[str, Any]:
    reads = qformer.text is not None
    decoder_only = not text.get("is_encoder_decoder", text["model_type"] == "t5")
    return {
        "model_type": "instructblip" if reads else "blip-2",
        "architectures": ["InstructBlipForConditionalGeneration" if reads else "Blip2ForConditionalGeneration"],
        **_blip2_values(encoder, qformer, "instructblip" if reads else "blip_2"),
        "text_config": text,
        "use_decoder_only_language_model": decoder_only,
        "image_token_index": words.image,
        "tie_word_embeddings": words.tied,
    }


def _blip2_values(encoder: ImageEncoder, qformer: QFormer, family: str) -> dict[str, Any]:
    vision, crosses = _blip2_vision(encoder), _crosses(qformer)
    mixer, ffn, norm = _block(qformer.stack.blocks[0])
    every = crosses[1] if len(crosses) > 1 else len(qformer.stack.blocks)
    words = {}
    if isinstance(qformer.text, TextBranch):
        words = {
            "vocab_size": qformer.text.embedding.num_embeddings,
            "max_position_embeddings": qformer.text.max_tokens,
        }
    return {
        "vision_config": {"model_type": f"{family}_vision_model", **vision},
        "qformer_config": {
            "model_type": f"{family}_qformer",
            "hidden_size": qformer.width,
            "num_hidden_layers": len(qformer.stack.blocks),
            "num_attention_heads": mixer.heads,
            "intermediate_size": ffn.up.out_features,
            "hidden_act": activation_name(ffn.activation),
            "layer_norm_eps": norm.eps,
            "cross_attention_frequency": every,
            "encoder_hidden_size": encoder.dim,
            **words,
            **({"use_qformer_text_input": words != {}} if family == "blip_2" else {}),
        },
        "num_query_tokens": qformer.tokens,
    }


def _crosses(qformer: QFormer) -> list[int]:
    return [i for i, block in enumerate(qformer.stack.blocks) if getattr(block, "cross", None) is not None]


def _blip2_vision(encoder: ImageEncoder) -> dict[str, Any]:
    """The vision_config of timm's ViT without a norm at its end; its names are compared later."""
    tower: Any = encoder.backbone.model if isinstance(encoder.backbone, TimmBackbone) else encoder.backbone
    blocks = getattr(tower, "blocks", None)
    if not blocks or not isinstance(getattr(tower, "norm", None), nn.Identity) or not hasattr(blocks[0], "attn"):
        found = type(getattr(tower, "visual", tower)).__name__
        raise ValueError(
            f"vision ({found}): only BLIP-2's own ViT, which has no norm at its end, has a place before a Q-Former"
        )
    _whole(encoder, "BLIP-2")
    return {
        "hidden_size": tower.embed_dim,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "image_size": encoder.transform.size[0],
        "patch_size": tower.patch_embed.patch_size[0],
        "hidden_act": activation_name(blocks[0].mlp.act),
        "layer_norm_eps": blocks[0].norm1.eps,
        "qkv_bias": True,
    }


def _block(block: nn.Module) -> tuple[Attention, Mlp, nn.LayerNorm]:
    """Of a block of the common stack: attention, plain network (that of queries in a Q-Former), first norm."""
    assert isinstance(block, Block)
    ffn = block.ffn.routes["query"] if isinstance(block.ffn, PerRoute) else block.ffn
    norm = block.mixer_residual.norm
    assert isinstance(block.mixer, Attention) and isinstance(ffn, Mlp) and isinstance(norm, nn.LayerNorm)
    return block.mixer, ffn, norm
