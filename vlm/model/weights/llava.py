"""LLaVA's weights in all their spellings, for ours: CLIP image tower, projector, language model."""

from vlm.model.weights.open_clip import hf_clip_vision_table
from vlm.model.weights.rows import linear
from vlm.model.weights.table import Table, system

# Files on the hub (the canonical spelling of a composed table), modules in memory, and older files differ.
SPELLINGS = (
    (r"^model\.vision_tower\.(vision_tower\.)?", "vision_tower."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
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


def projector_table(depth: int = 2, bias: bool = True) -> Table:
    """The projector for our `MlpConnector`: one layer in LLaVA, two in LLaVA-1.5."""
    rows = [row for i in range(depth) for row in linear(f"linear_{i + 1}", f"layers.{2 * i}", bias)]
    return Table("llava projector", tuple(rows))


def llava_table(language: Table, depth: int = 2, original: bool = False, vision: Table | None = None) -> Table:
    """LLaVA for a `VisionLanguageModel`; `language`, `vision`: tables of those parts (CLIP's on open_clip's tower).

    As `transformers` publishes it, or as the authors do (`original`; written back, it is as on the hub all the same).
    """
    tower = hf_clip_vision_table().under("", "backbone.visual.") if vision is None else vision
    return system(
        "llava",
        tower.under("vision_tower.", "vision."),
        projector_table(depth).under("multi_modal_projector.", "connector."),
        language.under("language_model.", "language."),
        spellings=ORIGINAL if original else SPELLINGS,
    )
