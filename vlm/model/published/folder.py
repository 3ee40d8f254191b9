"""What lies beside the weights in a folder of Hugging Face: tokenizer, image transform, and how the two go together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.chat_template import chat_template
from vlm.data.template import Template
from vlm.data.text import Tokenizer
from vlm.data.tokenizer_files import IMAGE, save_tokenizer
from vlm.model.published.pixels import processor_values
from vlm.model.seq2seq import EncoderDecoder
from vlm.model.vision import ImageEncoder
from vlm.model.vlm import VisionLanguageModel

CONFIG, GENERATION, PIXELS, PROCESSOR = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
CHAT, READER = "chat_template.jinja", "qformer_tokenizer"  # the Q-Former's vocabulary, in folders of InstructBLIP
PROCESSORS = {
    "clip": "CLIPProcessor",
    "llava": "LlavaProcessor",
    "blip-2": "Blip2Processor",
    "instructblip": "InstructBlipProcessor",
}


@dataclass(frozen=True)
class Texts:
    """How texts reach a model: its tokenizer, that of a Q-Former which reads too, and the template of conversations.

    `ends`: all tokens at which what it writes ends.
    """

    tokenizer: Tokenizer
    ends: Sequence[int]
    reader: Tokenizer | None = None
    chat: Template | None = None

    def control(self, model: VisionLanguageModel) -> dict[str, Any]:
        """Ids of a config.json's control tokens."""
        ends = list(self.ends)
        found: dict[str, Any] = {
            "bos_token_id": self.tokenizer.bos,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": self.tokenizer.pad,
        }
        if isinstance(model.language, EncoderDecoder):
            found["decoder_start_token_id"] = model.language.start
        return found


def write_beside(folder: Path, model: VisionLanguageModel, values: Mapping[str, Any], texts: Texts) -> None:
    """All files beside the weights. `values`: what config.json holds, which is written too.

    ValueError: an image transform that no image processor does.
    """
    processor = PROCESSORS.get(values["model_type"])
    named = {} if processor is None else {"processor_class": processor}
    write_json(folder / CONFIG, values)
    image = "image_token_index" in values
    goes_on = model.language is not None and not isinstance(model.language, EncoderDecoder)
    save_tokenizer(texts.tokenizer, folder, not goes_on, image, named)
    if model.language is not None:
        write_json(folder / GENERATION, texts.control(model))
    if isinstance(model.vision, ImageEncoder):
        write_json(folder / PIXELS, {**processor_values(model.vision.transform), **named})
    if image:
        write_json(folder / PROCESSOR, {**named, "image_token": IMAGE, **_image_tokens(values)})
    if texts.chat is not None and values["model_type"] == "llava":  # BLIP-2's processor puts images before all words
        (folder / CHAT).write_text(chat_template(texts.chat, IMAGE), encoding="utf-8")
    if values["model_type"] == "instructblip":
        assert texts.reader is not None
        (folder / READER).mkdir()
        save_tokenizer(texts.reader, folder / READER, ends=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A table of settings."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _image_tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """How many tokens an image has, in the terms of each processor."""
    if values["model_type"] != "llava":
        return {"num_query_tokens": values["num_query_tokens"]}
    return {
        "patch_size": values["vision_config"]["patch_size"],
        "num_additional_image_tokens": 1,  # the class token
        "vision_feature_select_strategy": values["vision_feature_select_strategy"],
    }
