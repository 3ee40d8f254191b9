"""Export: a published checkpoint, or a run whose parts are those of a published system, as a folder of Hugging Face."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm import build, build_data
from vlm.checkpoint import CONFIG as RUN
from vlm.config import schema
from vlm.config.language import PublishedLanguage
from vlm.data.encode import end_ids
from vlm.data.tars import drafted
from vlm.data.template import TEMPLATES
from vlm.data.text import load_tokenizer
from vlm.data.tokenizer_files import image_token
from vlm.model.adapter_file import CONFIG as ADAPTER
from vlm.model.adapter_file import save_adapter
from vlm.model.language import Decoder, LearnedPositions
from vlm.model.lora import merge_lora
from vlm.model.published.decoders import LLAMA
from vlm.model.published.folder import CONFIG, READER, Texts, write_beside, write_json
from vlm.model.published.hub import SMALL, find
from vlm.model.published.language import FAMILIES
from vlm.model.published.lavis import lavis_language_values
from vlm.model.published.load import Checkpoint, open_checkpoint
from vlm.model.published.systems import OPEN_CLIP, settings_of, system_part
from vlm.model.published.values import Words, system_values
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import differences, refuse
from vlm.model.weights.fill import fill_from
from vlm.model.weights.hollow import hollow
from vlm.model.weights.layout import SINGLE
from vlm.model.weights.llava import MODULES
from vlm.model.weights.save import save
from vlm.model.weights.table import Table
from vlm.nn.adapter import adapters
from vlm.nn.route import PerRoute
from vlm.ready import tokenizer_of
from vlm.restore import Trained, restore

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Weights:
    """How weights are written: their type (None: as they are), and bytes of a shard."""

    dtype: torch.dtype | None = None
    shard_bytes: int = 5_000_000_000


PLAIN = Weights()


def export(
    name: str,
    out: Path,
    parts: Mapping[str, str] | None = None,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    overwrite: bool = False,
    only_adapters: bool = False,
) -> list[str]:
    """Writes the folder `out`, whole or not at all; returns lines on what it is, and what has no place in it.

    `name`, `parts`: as of `vlm.ready.open_model`, and `qformer_tokenizer` for the Q-Former's vocabulary of an
    InstructBLIP of LAVIS. Adapters come merged; `only_adapters`: they alone, as peft's folder.

    Errors: ValueError: no model, parts that no published system has, an `out` that exists; OSError: the disk is full.
    """
    how = Weights(None if dtype is None else DTYPES[dtype], int(shard_gb * 1e9))
    given, folder = dict(parts or {}), Path(name).expanduser()
    _check(out, overwrite)
    _apart([name, *given.values()], out)
    if (folder / RUN).is_file():
        if given:
            raise ValueError(f"{name} is the folder of a run, which says itself where its parts come from (no --part)")
        return _run(restore(folder), out, how, overwrite, only_adapters)
    if only_adapters:
        raise ValueError(f"{name}: --adapters is for the folder of a run; published checkpoints have none beside them")
    reader = given.pop(READER, None)
    found = open_checkpoint(name, given)
    if found.values and "mm_vision_tower" not in found.values:
        _fill(found)
        return _as_published(found, out, how, overwrite)
    texts = _published_texts(found, given, reader)
    _fill(found)
    language = _llava_language(found.values) if found.values else _lavis_language(given)
    return write_model(found.model, texts, out, name, language, how, overwrite)


def _fill(found: Checkpoint) -> None:
    fill_from(found.model, found.sources)
    found.model.eval().requires_grad_(False)


def _as_published(found: Checkpoint, out: Path, how: Weights, overwrite: bool) -> list[str]:
    """In the layout that it has already, with its own settings and the files beside them."""
    values = dict(found.values)
    if how.dtype is not None:
        values = _typed(values, how.dtype)
    config = OPEN_CLIP if "model_cfg" in values else CONFIG
    with _draft(out, overwrite) as draft:
        for file in sorted(found.path.iterdir()):
            if file.is_file() and file.suffix in SMALL and not file.name.endswith(".index.json"):
                shutil.copyfile(file, draft / file.name)
        if (found.path / READER).is_dir():
            shutil.copytree(found.path / READER, draft / READER)
        write_json(draft / config, values)
        files = save(found.model, found.table, draft, how.dtype, how.shard_bytes)
        if config == OPEN_CLIP:
            if len(files) > 1:
                raise ValueError(f"{out}: open_clip reads one file of weights: give a larger --shard-gb")
            (draft / SINGLE).rename(draft / "open_clip_model.safetensors")
    return [_line(values, found.model)]


def _run(trained: Trained, out: Path, how: Weights, overwrite: bool, only_adapters: bool) -> list[str]:
    run, model = trained.run, trained.model
    texts = _texts_of(trained)
    language = _known_language(run)
    if only_adapters:
        return _adapters(trained, texts, language, out, overwrite)
    merged = merge_lora(model)
    lines = [f"{len(merged)} adapters merged"] if merged else []
    return lines + write_model(model, texts, out, trained.name, language, how, overwrite)


def write_model(
    model: VisionLanguageModel,
    texts: Texts,
    out: Path,
    name: str,
    language: Mapping[str, Any] | None = None,
    how: Weights = PLAIN,
    overwrite: bool = False,
) -> list[str]:
    """A model of ours in the layout of the published system that its parts are; settings are made from the modules.

    What that layout has no place for is taken off the model, and told in the lines that are returned. `name`: for
    messages. `language`: what is known of the settings of the language model beside its modules. Errors as of `export`.
    """
    try:
        lines = _trim(model, reads=texts.reader is not None)
        words = _words(model, texts)
        lines += _one_eps(model)
        if model.language is not None and words.image is not None and words.image >= model.language.vocabulary:
            _grow(model.language, words.image + 1)
            lines.append(f"one row more in the vocabulary: {words.image}, the token that stands where an image is")
        values = _typed(system_values(model, words, language), how.dtype or _dtype(model))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    with _draft(out, overwrite) as draft:
        write_beside(draft, model, values, texts)
        save(model, _table(values, draft, model, name), draft, how.dtype, how.shard_bytes)
    return [_line(values, model), *lines]


def _table(values: Mapping[str, Any], folder: Path, model: nn.Module, name: str) -> Table:
    """Of the system that the settings describe, which must have the model's tensors. ValueError: it has others."""
    with hollow():
        part = system_part(values, folder, {})
    refuse(differences(part.module.state_dict(), model.state_dict()), f"{name}, as {values['model_type']},")
    return part.table


def _adapters(
    trained: Trained, texts: Texts, language: Mapping[str, Any] | None, out: Path, overwrite: bool
) -> list[str]:
    """They alone, by the names that their layers have in the published layout."""
    with hollow():
        bare = build.model(trained.run, trained.tokenizer, trained.reads)
        _trim(bare, reads=texts.reader is not None)
    try:
        values = system_values(bare, _words(bare, texts), language)
    except ValueError as error:
        raise ValueError(f"{trained.name}: {error}") from None
    table = _table(values, Path(trained.name), bare, trained.name)
    if values["model_type"] == "llava":
        table = table.renamed(MODULES)
    source = None if trained.run.model.language is None else trained.run.model.language.source
    with _draft(out, overwrite) as draft:
        save_adapter(trained.model, draft / "adapter", source, table)
        for file in (draft / "adapter").iterdir():
            file.rename(draft / file.name)
        (draft / "adapter").rmdir()
    return [f"{len(adapters(trained.model))} adapters for {values['model_type']}"]


def _texts_of(trained: Trained) -> Texts:
    data, tokenizer = trained.run.data, trained.tokenizer
    ends, chat = list(tokenizer.ends), None
    if isinstance(data, schema.ChatData):
        chat = build_data.template(data.template)
        chat = chat if data.system is None else replace(chat, default_system=data.system)
    if trained.model.language is not None and not isinstance(data, schema.TextData):
        template = build_data.template(data.template)
        end = end_ids(tokenizer, template)
        ends = list(dict.fromkeys([*(end if len(end) == 1 else []), *ends]))
    return Texts(tokenizer, ends, None if trained.reads is None else trained.reads.tokenizer, chat)


def _published_texts(found: Checkpoint, parts: Mapping[str, str], reader: str | None) -> Texts:
    tokenizer, qformer = tokenizer_of(found, parts), found.model.connector
    ends = list(tokenizer.ends)
    if isinstance(found.model.language, Decoder) and isinstance(found.model.language.positions, LearnedPositions):
        end = tokenizer.encode_inside("\n")  # before OPT a line's end is the end of an answer
        ends = list(dict.fromkeys([*(end if len(end) == 1 else []), *ends]))
    reads = found.model.language is not None and isinstance(qformer, QFormer) and qformer.text is not None
    if reads and reader is None:
        raise ValueError(
            f"{found.path}: its Q-Former reads questions, and the file has no vocabulary for them: give BERT's with "
            f"[DEC] as --part {READER}=FOLDER"
        )
    chat = TEMPLATES["vicuna_v1"] if "mm_vision_tower" in found.values else None
    return Texts(tokenizer, ends, load_tokenizer(find(reader)) if reads and reader is not None else None, chat)


def _known_language(run: schema.Run) -> dict[str, Any] | None:
    """What is known of the config.json of a published language model; None for one of our own settings."""
    settings = run.model.language
    if not isinstance(settings, PublishedLanguage):
        return None
    values = settings.architecture
    if settings.name is not None:
        whole = settings_of(find(settings.name))
        values = whole.get("text_config", whole)
    return _language_alone(values or {})


def _lavis_language(parts: Mapping[str, str]) -> dict[str, Any] | None:
    """As LAVIS runs it."""
    if "language" not in parts:
        return None
    values = lavis_language_values(settings_of(find(parts["language"])))
    return _language_alone(values)


def _llava_language(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the authors' own config.json, which is that of a Llama with more in it."""
    return {"model_type": "llama", **{name: value for name, value in values.items() if name in LLAMA}}


def _language_alone(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Without what its file says of itself; None where it is that of a system."""
    if values.get("model_type") not in FAMILIES:
        return None
    return {name: value for name, value in values.items() if name not in _OF_THE_FILE}


_OF_THE_FILE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


def _words(model: VisionLanguageModel, texts: Texts) -> Words:
    looks = model.language is not None and model.vision is not None
    tied = getattr(model.language, "head", None) is None
    return Words(texts.control(model), image_token(texts.tokenizer) if looks else None, tied)


@torch.no_grad()
def _grow(language: Any, rows: int) -> None:
    """More rows for the vocabulary: the mean of the others, whose logit is never the largest."""
    layers = [language.embedding] + ([] if language.head is None else [language.head])
    for layer in layers:
        old = layer.weight
        more = old.float().mean(0, keepdim=True).to(old.dtype).expand(rows - len(old), -1)
        layer.weight = nn.Parameter(torch.cat([old, more]), requires_grad=False)
    language.vocabulary = rows


def _trim(model: VisionLanguageModel, reads: bool) -> list[str]:
    """Takes off a Q-Former what has no place in any layout of Hugging Face; a line for each thing that is lost."""
    qformer, lines = model.connector, list[str]()
    if not isinstance(qformer, QFormer) or not isinstance(qformer.text, TextBranch):
        return lines
    if model.language is not None and not reads:
        qformer.text = None
        for block in qformer.stack.blocks:
            for routed in block.modules():
                if isinstance(routed, PerRoute):
                    del routed.routes["text"]
        return ["left out: the Q-Former's weights for texts, of which it reads none here"]
    if qformer.text.head is not None or qformer.text.bias is not None:
        qformer.text.head = qformer.text.bias = None
        qformer.text.transform = nn.Identity()
        lines.append("left out: the Q-Former's head for words, which has no place in this layout")
    if model.contrast is not None:
        lines.append(f"left out: the temperature, {float((-model.contrast.log_scale).exp()):.4g}: scores are cosines")
        for layer in (model.contrast.image, model.contrast.text):
            if isinstance(layer, nn.Linear) and "bias" not in layer.state_dict():
                layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)
    return lines


def _one_eps(model: VisionLanguageModel) -> list[str]:
    """BLIP-2's settings have one number for the image encoder's norms and the one before the Q-Former."""
    eyes, norm = getattr(model.vision, "backbone", None), getattr(model.connector, "image_norm", None)
    eps = {part.eps for part in ([] if eyes is None else eyes.modules()) if isinstance(part, nn.LayerNorm)}
    if not isinstance(norm, nn.LayerNorm) or len(eps) != 1 or norm.eps in eps:
        return []
    return [f"the norm before the Q-Former has eps={norm.eps:g} here and {eps.pop():g} there, as the image encoder has"]


def _typed(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Settings that name another type of weights, their sections too where they name one."""
    name, found = str(dtype).removeprefix("torch."), dict(values)
    for key, value in values.items():
        if isinstance(value, dict) and any(own in value for own in ("dtype", "torch_dtype")):
            found[key] = _typed(value, dtype)
    found["torch_dtype" if "torch_dtype" in values else "dtype"] = name
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    """That which holds all weights."""
    found = {parameter.dtype for parameter in model.parameters()}
    return found.pop() if len(found) == 1 else torch.float32


def _line(values: Mapping[str, Any], model: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = values.get("model_type") or values.get("architecture") or "open_clip"
    return f"{kind}: {count:,} parameters"


@contextmanager
def _draft(out: Path, overwrite: bool) -> Iterator[Path]:
    """As `drafted`. OSError, naming the folder: the disk is full or not writable; nothing was written."""
    try:
        with drafted(out, overwrite, _check) as draft:
            yield draft
    except OSError as error:
        first = error.__context__ if isinstance(error.__context__, OSError) else error  # `save` says where it drafts
        raise OSError(f"could not write {out}: {first.strerror or first}; nothing was written") from None


def _check(out: Path, overwrite: bool) -> None:
    """Refuses a folder that is not to be replaced. ValueError."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: is a file; a model is written into a folder of its own")
    names = {file.name for file in out.iterdir()}
    if names and not overwrite:
        raise ValueError(f"{out}: exists already; choose another folder, or --overwrite it")
    if names and (RUN in names or not names & {CONFIG, OPEN_CLIP, ADAPTER}):
        raise ValueError(f"{out}: holds {min(names)} and is no exported model; choose another folder")


def _apart(sources: Sequence[str], out: Path) -> None:
    """Refuses to write into, or in place of, what is read. ValueError."""
    place = out.resolve()
    for name in sources:
        path = Path(name).expanduser().resolve()
        if path.exists() and (place == path or place in path.parents or path in place.parents):
            raise ValueError(f"{out}: and {name}, which is read, lie in each other; write to a folder beside it")
