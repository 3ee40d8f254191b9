"""What `--model` names, ready for use: the folder of a run, or a published checkpoint with all that comes with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.data.talk_batch import Reader
from vlm.data.text import Tokenizer, clip_tokenizer, load_tokenizer
from vlm.model.published.hub import find
from vlm.model.published.load import Checkpoint, load
from vlm.model.published.usage import Usage, usage_of
from vlm.model.qformer import QFormer
from vlm.model.text import TextEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.restore import Ready, restore

READER = "qformer_tokenizer"  # where Hugging Face's folders of InstructBLIP keep the Q-Former's vocabulary


def open_model(name: str, device: torch.device | None = None, parts: Mapping[str, str] | None = None) -> Ready:
    """The folder of a run, a published folder or file, or OWNER/NAME[@REVISION] of the hub.

    `parts`: as of `vlm.model.published.load.load`. ValueError: none of these; the errors of `restore` and `load`.
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        if parts:
            raise ValueError(f"{name} is the folder of a run, which says itself where its parts come from")
        return restore(folder, device)
    if folder.is_dir() and not any(file.suffix in _PUBLISHED for file in folder.iterdir()):
        raise ValueError(f"{name} is neither the folder of a run (no {CONFIG}) nor a published checkpoint")
    return published(name, device, parts)


_PUBLISHED = (".json", ".safetensors", ".bin", ".pth", ".pt", ".ckpt")


def published(name: str, device: torch.device | None = None, parts: Mapping[str, str] | None = None) -> Ready:
    """A published checkpoint with its tokenizer, image transform, template and ways of writing."""
    found = load(name, parts, device="cpu" if device is None else device)
    model = found.model
    tokenizer = tokenizer_of(found, parts or {})
    usage = _usage(found)
    return Ready(name, model, tokenizer, _settings(model, usage), _writes(model), usage=usage, reads=_reader(found))


def tokenizer_of(found: Checkpoint, parts: Mapping[str, str]) -> Tokenizer:
    """From the folder, or that of the language model; CLIP's own vocabulary for its files without one."""
    folders = [found.path, *([find(parts["language"])] if "language" in parts else [])]
    for folder in folders[::-1]:
        if folder.is_dir() and any((folder / file).is_file() for file in _VOCABULARIES):
            return load_tokenizer(folder)
    if isinstance(found.model.text, TextEncoder) and found.model.text.embedding.num_embeddings == _CLIP:
        return clip_tokenizer()
    return load_tokenizer(folders[-1])  # for its error


_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_CLIP = 49_408


def _usage(found: Checkpoint) -> Usage | None:
    """None for what writes no captions."""
    if found.model.language is None or found.model.vision is None:
        return None
    text: Mapping[str, Any] = found.values.get("text_config") or {}
    return usage_of(str(found.values.get("model_type", "blip-2")), str(text.get("model_type", "opt")))


def _settings(model: VisionLanguageModel, usage: Usage | None) -> schema.Data:
    if usage is not None:
        return schema.ChatData(kind="chats", train="", template=usage.template)
    if model.vision is None:
        return schema.TextData(kind="text", train="")
    longest = model.text.max_tokens if isinstance(model.text, TextEncoder) else 32
    return schema.PairData(train="", max_tokens=longest)


def _writes(model: VisionLanguageModel) -> bool:
    return model.vision is not None and model.language is not None


def _reader(found: Checkpoint) -> Reader | None:
    """InstructBLIP's."""
    qformer = found.model.connector
    if found.model.language is None or not isinstance(qformer, QFormer) or qformer.text is None:
        return None
    return Reader(load_tokenizer(found.path / READER), min(128, qformer.text.max_tokens))
