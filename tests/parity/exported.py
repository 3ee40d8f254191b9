"""Shared by the tests of export: small published folders with a tokenizer, and the logits of what they open as."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tests.parity.blip2 import QFORMER, VISION, language_config
from tests.parity.noise import noise
from vlm.data.text import Tokenizer, load_tokenizer, train_bpe
from vlm.data.tokenizer_files import save_tokenizer

ROWS, IMAGE, SIZE, END = 320, 310, 28, 271
CONTROL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WORDS = ["a red square on white", "a photo of a blue circle", "Question: what is it? Answer: a drum"]
LANGUAGE = {
    "vocab_size": ROWS,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **CONTROL,
}
CLIP = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "vocab_size": ROWS,
    "projection_dim": 24,
    **CONTROL,
    "eos_token_id": END,
}
ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LANGUAGE, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    "llama, linear": {"model_type": "llama", **LANGUAGE, "rope_parameters": ROPE, "head_dim": 12},
    "llama 3.1": {
        "model_type": "llama",
        **LANGUAGE,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 128},
    },
    "mistral": {"model_type": "mistral", **LANGUAGE, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **LANGUAGE, "tie_word_embeddings": True},
    "qwen2 with windows": {"model_type": "qwen2", **LANGUAGE, **SLIDING},
    "qwen3": {"model_type": "qwen3", **LANGUAGE, "head_dim": 12},
    "smollm3": {"model_type": "smollm3", **LANGUAGE, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", **LANGUAGE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": language_config("opt").to_dict() | {"vocab_size": ROWS, **CONTROL},
    "t5": language_config("t5").to_dict() | {"vocab_size": ROWS, **CONTROL, "bos_token_id": None},
    "t5 1.0": language_config("t5").to_dict()
    | {"vocab_size": ROWS, **CONTROL, "feed_forward_proj": "relu", "tie_word_embeddings": True, "dense_act_fn": "relu"}
    | {"is_gated_act": False, "scale_decoder_outputs": True},
}
BLIP2 = ("blip2 opt", "blip2 t5", "instructblip llama", "instructblip t5", "retrieval")
SYSTEMS = ("clip", "siglip", "llava", "llava all", *BLIP2)


def config_of(name: str) -> PreTrainedConfig:  # noqa: PLR0911  # one for each
    """Of one of LANGUAGES or SYSTEMS."""
    kind, _, language = name.partition(" ")
    text = LANGUAGES.get(language, LANGUAGES["llama"])
    blip2 = {"vision_config": VISION, "qformer_config": {**QFORMER, "vocab_size": ROWS}, "num_query_tokens": 6}
    match kind:
        case "clip":
            return transformers.CLIPConfig(text_config=TEXT, vision_config=CLIP, projection_dim=24)
        case "siglip":
            same = {"hidden_size": 48, "vocab_size": ROWS, "eos_token_id": 2}
            return transformers.SiglipConfig(text_config={**TEXT, **same, "projection_size": 48}, vision_config=CLIP)
        case "llava":
            given = {"vision_config": CLIP, "text_config": {**text, "tie_word_embeddings": False}}
            options: dict[str, Any] = {"image_token_index": IMAGE, "tie_word_embeddings": False}
            if language == "all":  # the last block before the norm, and the class token with the patches
                options |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
            return transformers.LlavaConfig(**given, **options)
        case "blip2":
            return transformers.Blip2Config(**blip2, text_config=text, image_token_index=IMAGE)
        case "instructblip":
            return transformers.InstructBlipConfig(**blip2, text_config=text, image_token_index=IMAGE)
        case "retrieval":
            return transformers.Blip2Config(
                **{**blip2, "qformer_config": {**blip2["qformer_config"], "use_qformer_text_input": True}},  # type: ignore[dict-item]
                image_text_hidden_size=20,
                architectures=["Blip2ForImageTextRetrieval"],
            )
        case _:
            found = dict(LANGUAGES[name])
            return transformers.CONFIG_MAPPING[found.pop("model_type")](**found)


CLASSES = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "llava": "LlavaForConditionalGeneration",
    "blip-2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
}


def class_of(config: PreTrainedConfig) -> Any:
    """Of transformers'."""
    if (config.architectures or [""])[0] == "Blip2ForImageTextRetrieval":
        return transformers.Blip2ForImageTextRetrieval
    return getattr(transformers, CLASSES.get(config.model_type, "AutoModelForCausalLM"))


def published(name: str, folder: Path) -> Path:
    """A folder of a system with noise in all of it, as its library writes it, with a tokenizer."""
    config = config_of(name)
    kind = class_of(config)
    model = kind.from_config(config) if kind is transformers.AutoModelForCausalLM else kind(config)
    text = getattr(config, "text_config", config)
    if text.model_type == "t5" and text.scale_decoder_outputs is False:
        holder = getattr(model, "language_model", model)
        holder.lm_head.weight = nn.Parameter(torch.zeros(ROWS, text.d_model))
    noise(model.eval(), scale=0.15)
    if text.model_type != "t5":
        model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = words()
    save_tokenizer(tokenizer, folder, ends=False)
    if config.model_type == "instructblip":
        (folder / "qformer_tokenizer").mkdir()
        save_tokenizer(tokenizer, folder / "qformer_tokenizer", ends=True)
    return folder


def words() -> Tokenizer:
    """A small tokenizer."""
    return train_bpe(WORDS * 4, 280)


def opened(folder: Path) -> PreTrainedModel:
    """By transformers, which must find all weights that it wants, and want all that it finds."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model, told = class_of(config).from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(told.values()), told
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """On fixed pictures and words, in the vocabulary's rows that all have."""
    maker = torch.Generator().manual_seed(1)
    pixels, ids = torch.randn(2, 3, SIZE, SIZE, generator=maker), torch.randint(3, 270, (2, 13), generator=maker)
    config = model.config
    if config.model_type in ("clip", "siglip"):
        ids[:, -1] = END
        found: Tensor = model(input_ids=ids, pixel_values=pixels).logits_per_image
        return found
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    if isinstance(model, transformers.Blip2ForImageTextRetrieval):
        scores = [
            model(pixels, ids, **given, use_image_text_matching_head=itm).logits_per_image for itm in (True, False)
        ]
        return torch.cat(scores, 1)
    if hasattr(config, "vision_config"):
        full = getattr(config, "vision_feature_select_strategy", None) == "full"
        images = getattr(config, "num_query_tokens", 17 if full else 16)
        ids = torch.cat([torch.full((2, images), config.image_token_index), ids], 1)
        given = {"attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if config.model_type == "instructblip":
        asked = torch.randint(3, 270, (2, 5), generator=maker)
        given |= {"qformer_input_ids": asked, "qformer_attention_mask": torch.ones_like(asked)}
    if getattr(config, "text_config", config).is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 270, (2, 4), generator=maker)
    out: Tensor = model(input_ids=ids, **given).logits
    return out[..., :ROWS]


def settings(folder: Path) -> dict[str, Any]:
    """Its config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def tokenizer_of(folder: Path) -> Tokenizer:
    """As our parts read it."""
    return load_tokenizer(folder)
