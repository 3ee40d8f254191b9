"""A published checkpoint by its name or path: found, understood, and loaded into our parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vlm.model.language import Language
from vlm.model.published.hub import find, pinned
from vlm.model.published.language import language_part
from vlm.model.published.lavis import contents, lavis_language, lavis_qformer, lavis_system
from vlm.model.published.part import Part
from vlm.model.published.systems import look_as, settings_of, system_part, vision_part
from vlm.model.vision import ClassToken, ImageEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.fill import Source, fill_from
from vlm.model.weights.gguf import open_gguf
from vlm.model.weights.hollow import hollow
from vlm.model.weights.layout import GGUF
from vlm.model.weights.source import Weights, open_weights
from vlm.model.weights.table import Table


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, found and understood; until `load` fills it, its module has no memory."""

    path: Path
    values: Mapping[str, Any]  # of its config.json
    model: VisionLanguageModel
    table: Table  # of what its own files hold
    sources: Sequence[Source]  # its own files, and those of parts that lie elsewhere

    @property
    def name(self) -> str:
        """By which it is found again: OWNER/NAME@COMMIT, or its path."""
        return pinned(self.path)

    def piece(self, name: str) -> tuple[nn.Module, list[Source]]:
        """One part of the system, such as "vision", and what fills it. ValueError: it has no such part."""
        module = getattr(self.model, name)
        if module is None:
            raise ValueError(f"{self.path}: has no part '{name}'")
        pieces = [Source(source.table.only(f"{name}."), source.weights) for source in self.sources]
        return module, [piece for piece in pieces if piece.table.rows]


def open_checkpoint(name: str, parts: Mapping[str, str] | None = None, revision: str | None = None) -> Checkpoint:
    """`name`: a folder, a file, or OWNER/NAME[@REVISION] of the hub (then, and only then, the network is used).

    `parts`: of which parts the weights lie elsewhere, by names or paths as well: what the authors' own files leave out,
    or what is to stand in place of theirs. ValueError: nothing of that name, no weights, a family that is not known, a
    setting that our parts do not have, a part that is missing.
    """
    path = find(name, revision)
    others = {part: find(source) for part, source in (parts or {}).items()}
    if "vision" not in others and (tower := _tower(path)) is not None:
        others["vision"] = _found(tower, path)
    values, weights, part = _whole(path, others.get("vision"))
    if part is None:
        with hollow():
            return _lavis(path, weights, others)
    assert isinstance(part.module, VisionLanguageModel)
    own = part.table
    for other in others:
        if getattr(part.module, other, None) is None:
            raise ValueError(f"part {other}: {path} has no such part")
        own = own.without(f"{other}.")
    if (eyes := others.get("vision")) is not None:
        look_as(part, eyes, values)
    beside = [_beside(part.table, other, place) for other, place in others.items()]
    return Checkpoint(path, values, part.module, part.table, [Source(own, weights), *beside])


def load(
    name: str,
    parts: Mapping[str, str] | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Checkpoint:
    """A published checkpoint with its weights, in evaluation mode, nothing of it learning; arguments as above.

    `dtype`: of the weights; as published unless given, but fp32 in place of half precision on CPUs.
    ValueError as of `open_checkpoint`, and for names or shapes that differ.
    """
    found = open_checkpoint(name, parts, revision)
    fill_piece(found.model, found.sources, dtype, device)
    found.model.eval().requires_grad_(False)
    return found


def language_model(name: str | None, architecture: Mapping[str, Any] | None, dtype: torch.dtype | None) -> Language:
    """A published language model; without a name, or on the meta device, only its architecture.

    ValueError also where `architecture` is given and the checkpoint is another.
    """
    if name is None or (_hollow() and architecture is not None):
        assert architecture is not None
        module = language_part(architecture, "model.language.architecture").module
    else:
        source = open_checkpoint(name)
        _agree(source.values.get("text_config", source.values), architecture, "model.language.architecture", name)
        module, sources = source.piece("language")
        if not _hollow():
            fill_piece(module, sources, dtype or torch.float32, torch.get_default_device())
    assert isinstance(module, Language)
    return module


def image_encoder(
    name: str | None,
    architecture: Mapping[str, Any] | None,
    layer: int,
    class_token: ClassToken,
    frozen: bool,
    dtype: torch.dtype | None,
) -> ImageEncoder:
    """The image encoder of a published system; `name` and `architecture` as of `language_model`.

    `layer`, `class_token`: which of its tokens are read, whatever the system itself reads.
    """
    if name is None or (_hollow() and architecture is not None):
        assert architecture is not None
        module = vision_part(architecture, "model.vision.architecture").module
        assert isinstance(module, ImageEncoder)
        return module.reading(layer, class_token, frozen, dtype)
    source = open_checkpoint(name)
    _agree(source.values.get("vision_config", source.values), architecture, "model.vision.architecture", name)
    own, sources = source.piece("vision")
    assert isinstance(own, ImageEncoder)
    encoder = own.reading(layer, class_token, frozen, dtype)
    if not _hollow():
        fill_piece(encoder, sources, dtype or torch.float32, torch.get_default_device())
    return encoder


def lone_qformer(name: str) -> tuple[nn.Module, list[Source]] | None:
    """The Q-Former of a file of LAVIS, of which no other part has to be there; None for what is no such file."""
    path = find(name)
    if not path.is_file() or path.suffix == GGUF or settings_of(path):
        return None
    weights = open_weights(path)
    if "qformer" not in contents(weights):
        return None
    with hollow():
        module, table = lavis_qformer(str(path), weights)
    return module, [Source(table.only("connector."), weights)]


def fill_piece(
    module: nn.Module,
    sources: Sequence[Source],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Gives a system, or a piece of one, its weights; `dtype` as of `load`."""
    half = any(tensor.dtype in (torch.float16, torch.bfloat16) for s in sources for tensor in s.weights.values())
    if dtype is None and half and torch.device(device).type == "cpu":
        dtype = torch.float32
    fill_from(module, sources, dtype, device)
    for encoder in module.modules():
        if isinstance(encoder, ImageEncoder):
            encoder.backbone.to(memory_format=torch.channels_last)


def _whole(path: Path, tower: Path | None = None) -> tuple[dict[str, Any], Weights, Part | None]:
    """Settings, weights and system of a folder or file; no system where it is a part of LAVIS' or MiniGPT-4's alone.

    `tower`: where the image encoder of the authors' own LLaVA lies, of which their settings hold only the name.
    """
    if path.suffix == GGUF and path.is_file():
        return _gguf(path)
    weights, values = open_weights(path), settings_of(path)
    if "mm_vision_tower" in values and tower is not None and (seen := settings_of(tower)):
        values["vision_config"] = {"model_type": "clip_vision_model", **seen.get("vision_config", seen)}
    if not values and contents(weights) & {"qformer", "projection"}:
        return values, weights, None
    with hollow():
        return values, weights, system_part(values, path, weights)


def _tower(path: Path) -> str | None:
    """By which name the authors' own LLaVA finds its image encoder; None where the folder holds it, or is another."""
    name: str | None = settings_of(path).get("mm_vision_tower")
    return None if name is None or any("vision_tower." in each for each in open_weights(path)) else name


def _found(tower: str, path: Path) -> Path:
    try:
        return find(tower)
    except ValueError as error:
        raise ValueError(
            f"{path}: its image encoder lies elsewhere (give its folder by --part vision=FOLDER): {error}"
        ) from None


def _gguf(path: Path) -> tuple[dict[str, Any], Weights, Part]:
    """A language model with the names that GGUF has for its tensors."""
    found = open_gguf(path)
    with hollow():
        part = language_part(found.values, str(path))
    alone = VisionLanguageModel(language=cast(Language, part.module))
    return found.values, found.weights, Part(alone, found.table.under("", "language."))


def _beside(own: Table, part: str, path: Path) -> Source:
    """A part's weights that lie elsewhere: in a system's folder, or in a file that names them as `own` does."""
    if path.is_dir() or path.suffix == GGUF:
        _, weights, found = _whole(path)
        table = own if found is None else found.table
    else:
        weights, table = open_weights(path), own
    if not (only := table.only(f"{part}.")).rows:
        raise ValueError(f"part {part}: {path} has no such part")
    return Source(only.under("", f"{part}."), weights)


def _lavis(path: Path, weights: Weights, others: Mapping[str, Path]) -> Checkpoint:
    """A file of LAVIS or MiniGPT-4, with the parts that it lacks."""
    files = {part: open_weights(place) for part, place in others.items()}
    language = None
    if "language" in others:
        language = lavis_language(settings_of(others["language"]), str(others["language"]))
    beside = {part: found for part, found in files.items() if part != "language"}
    system = lavis_system(str(path), weights, beside, language)
    sources = [Source(table, {"main": weights, **files}[part]) for part, table in system.tables.items()]
    return Checkpoint(path, {}, system.module, system.tables["main"], sources)


def _hollow() -> bool:
    return torch.get_default_device().type == "meta"


def _agree(values: Mapping[str, Any], wanted: Mapping[str, Any] | None, where: str, name: str) -> None:
    pairs = [(key, value, values.get(key, value)) for key, value in (wanted or {}).items()]
    differing = [f"{key}={value!r}, there {there!r}" for key, value, there in pairs if there != value]
    if differing:
        raise ValueError(f"{where}: {name} is another model: {'; '.join(differing)}")
