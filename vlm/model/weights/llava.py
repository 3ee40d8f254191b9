"""LLaVA's weights in the layouts of `transformers`, for ours: CLIP image tower, projector of two layers, Llama."""

from collections.abc import Mapping

from torch import Tensor

from vlm.model.weights.llama import llama_table
from vlm.model.weights.open_clip import hf_clip_vision_table
from vlm.model.weights.table import Table, linear

VISION, CONNECTOR, LANGUAGE = "vision.backbone.visual.", "connector.", "language."

# Published prefix -> part of ours, prefix inside that part's table. Files on the hub and modules in memory differ.
PREFIXES = {
    "model.vision_tower.vision_model.": (VISION, ""),
    "model.vision_tower.": (VISION, ""),
    "vision_tower.vision_model.": (VISION, ""),
    "vision_tower.": (VISION, ""),
    "model.multi_modal_projector.": (CONNECTOR, ""),
    "multi_modal_projector.": (CONNECTOR, ""),
    "model.language_model.": (LANGUAGE, "model."),
    "language_model.model.": (LANGUAGE, "model."),
    "language_model.lm_head.": (LANGUAGE, "lm_head."),
    "lm_head.": (LANGUAGE, "lm_head."),
}


def projector_table() -> Table:
    """The projector of LLaVA-1.5 for our `MlpConnector` of depth 2."""
    return Table("llava projector", (*linear("linear_1", "layers.0"), *linear("linear_2", "layers.2")))


def llava_to_ours(theirs: Mapping[str, Tensor], tied: bool = False) -> dict[str, Tensor]:
    """Weights of our `VisionLanguageModel` (open_clip image tower without its projection) from published ones.

    Errors: a published tensor that belongs to no part.
    """
    parts: dict[str, dict[str, Tensor]] = {VISION: {}, CONNECTOR: {}, LANGUAGE: {}}
    unknown = []
    for name, tensor in theirs.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            unknown.append(name)
            continue
        part, inside = PREFIXES[prefix]
        parts[part][inside + name.removeprefix(prefix)] = tensor
    if unknown:
        raise ValueError(f"llava: published tensors that belong to no part: {', '.join(unknown[:8])}")
    ours = {VISION: hf_clip_vision_table().to_theirs(parts[VISION])}
    ours[CONNECTOR] = projector_table().to_ours(parts[CONNECTOR])
    ours[LANGUAGE] = llama_table(tied).to_ours(parts[LANGUAGE])
    return {part + name: tensor for part, table in ours.items() for name, tensor in table.items()}


def llava_to_theirs(ours: Mapping[str, Tensor], tied: bool = False) -> dict[str, Tensor]:
    """Published weights, as the module of `transformers` names them in memory, from ours.

    Errors: a tensor of ours that belongs to no part.
    """
    parts: dict[str, dict[str, Tensor]] = {VISION: {}, CONNECTOR: {}, LANGUAGE: {}}
    unknown = []
    for name, tensor in ours.items():
        part = next((part for part in parts if name.startswith(part)), None)
        if part is None:
            unknown.append(name)
            continue
        parts[part][name.removeprefix(part)] = tensor
    if unknown:
        raise ValueError(f"llava: tensors of ours that belong to no part: {', '.join(unknown[:8])}")
    vision = hf_clip_vision_table().to_ours(parts[VISION])
    projector = projector_table().to_theirs(parts[CONNECTOR])
    language = llama_table(tied).to_theirs(parts[LANGUAGE])
    return {
        **{f"model.vision_tower.{name}": tensor for name, tensor in vision.items()},
        **{f"model.multi_modal_projector.{name}": tensor for name, tensor in projector.items()},
        **{
            f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
            for name, tensor in language.items()
        },
    }
