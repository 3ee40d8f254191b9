"""LLaVA's weights in all their spellings, for ours: CLIP image tower, projector, language model."""

from vlm.model.weights.open_clip import hf_clip_vision_table
from vlm.model.weights.table import Table, linear, system

# Files on the hub (the canonical spelling of a composed table), modules in memory, and the authors' own differ.
SPELLINGS = (
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def projector_table() -> Table:
    """The projector of LLaVA-1.5 for our `MlpConnector` of depth 2."""
    return Table("llava projector", (*linear("linear_1", "layers.0"), *linear("linear_2", "layers.2")))


def llava_table(language: Table) -> Table:
    """LLaVA as `transformers` publishes it, for a `VisionLanguageModel` on open_clip's image tower without projection.

    `language`: the table of the language model.
    """
    return system(
        "llava",
        hf_clip_vision_table().under("vision_tower.", "vision.backbone.visual."),
        projector_table().under("multi_modal_projector.", "connector."),
        language.under("language_model.", "language."),
        spellings=SPELLINGS,
    )
