"""LLaVA's weights in all their spellings, for ours: CLIP image tower, projector, language model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.model.weights.open_clip import hf_clip_vision_table
from vlm.model.weights.rows import Row, linear
from vlm.model.weights.table import Table, system

# Files on the hub (the canonical spelling of a composed table), modules in memory, and older files differ.
SPELLINGS = (
    (r"^model\.vision_tower\.(vision_tower\.)?", "vision_tower."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
# As `LlavaForConditionalGeneration` names its modules, by which peft looks for layers.
MODULES = (
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
# The authors' own files: no tower, the projector inside the language model.
ORIGINAL = (
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.mm_projector\.(weight|bias)$", r"multi_modal_projector.linear_1.\1"),
    (r"^model\.vision_tower\.(vision_tower\.)?", "vision_tower."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^(model|lm_head)\.", r"language_model.\1."),
)


class Idle:
    """A layer that is published with a second one after it, which changes nothing: one matrix, or one bias."""

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """The first. ValueError: the second does change something."""
        first, second = theirs
        if not second.is_meta and not torch.equal(second, _nothing(first)):
            raise ValueError("LLaVA's projector: two layers without an activation between them are not known here")
        return (first,)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Both."""
        return ours[0], _nothing(ours[0])


def _nothing(layer: Tensor) -> Tensor:
    return torch.eye(len(layer), dtype=layer.dtype) if layer.ndim == 2 else torch.zeros_like(layer)


def projector_table(depth: int = 2, bias: bool = True) -> Table:
    """The projector for our `MlpConnector`: one layer in LLaVA, two in LLaVA-1.5."""
    rows = [row for i in range(depth) for row in linear(f"linear_{i + 1}", f"layers.{2 * i}", bias)]
    return Table("llava projector", tuple(rows))


def single_projector_table() -> Table:
    """LLaVA's one layer where the layout has two (`LlavaForConditionalGeneration`)."""
    parts = ("weight", "bias")
    return Table(
        "llava projector",
        tuple(Row((f"linear_1.{part}", f"linear_2.{part}"), f"layers.0.{part}", Idle()) for part in parts),
    )


def llava_table(language: Table, depth: int = 2, original: bool = False, vision: Table | None = None) -> Table:
    """LLaVA for a `VisionLanguageModel`; `language`, `vision`: tables of those parts (CLIP's on open_clip's tower).

    As `transformers` publishes it, or as the authors do (`original`; written back, it is as on the hub all the same).
    The hub's layout has two layers: of one (`depth` 1), the second changes nothing.
    """
    single = depth == 1 and not original
    projector = single_projector_table() if single else projector_table(depth)
    tower = hf_clip_vision_table().under("", "backbone.visual.") if vision is None else vision
    return system(
        "llava",
        tower.under("vision_tower.", "vision."),
        projector.under("multi_modal_projector.", "connector."),
        language.under("language_model.", "language."),
        spellings=ORIGINAL if original else SPELLINGS,
    )
