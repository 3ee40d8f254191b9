"""BLIP-2 and InstructBLIP as Hugging Face publishes them: from the settings in their config.json."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.language import Language
from vlm.model.published.language import language_part
from vlm.model.published.part import Part, Settings
from vlm.model.published.vit import BLIP2_VISION, blip2_vit
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.vision import ImageEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.blip2 import HUGGING_FACE, INSTRUCTBLIP, blip2_table, retrieval_table
from vlm.model.weights.table import Table

# What transformers' config classes take where config.json says nothing (the first files held hardly anything).
BLIP2 = {
    "model_type": "blip-2",
    "architectures": None,
    "num_query_tokens": 32,
    "image_text_hidden_size": 256,
}
QFORMER = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
    "use_qformer_text_input": False,
    "position_embedding_type": "absolute",
}
GENERATION = ("Blip2ForConditionalGeneration", "Blip2Model")
INSTRUCTED, RETRIEVAL = "InstructBlipForConditionalGeneration", "Blip2ForImageTextRetrieval"


def blip2_part(values: Mapping[str, Any], where: str) -> Part:
    """The system that a config.json of model_type "blip-2" or "instructblip" describes.

    `Blip2ForImageTextRetrieval` has the contrastive and the matching head of stage 1; the others end in a language
    model. ValueError: another architecture, a setting that our parts do not have.
    """
    s, instructed = _settings(values, where)
    usual = RETRIEVAL if s.section("qformer_config", QFORMER)["use_qformer_text_input"] else GENERATION[0]
    named = s["architectures"] or [INSTRUCTED if instructed else usual]
    if named[0] == RETRIEVAL:
        return _retrieval(s)
    if named[0] not in ((INSTRUCTED,) if instructed else GENERATION):
        known = (INSTRUCTED,) if instructed else (*GENERATION, RETRIEVAL)
        raise ValueError(f"{where}: architectures={named}: known here are {', '.join(known)}")
    return _generation(s, instructed)


def _settings(values: Mapping[str, Any], where: str) -> tuple[Settings, bool]:
    """With defaults, and whether the Q-Former reads an instruction."""
    s = Settings(values, where, BLIP2)
    s.expect(model_type=("blip-2", "instructblip"))
    return s, s["model_type"] == "instructblip"


def _generation(s: Settings, instructed: bool) -> Part:
    s.section("qformer_config", QFORMER).expect(use_qformer_text_input=(False,))
    vision, tower = _vision(s)
    text = s.section("text_config", {})
    language = language_part({"model_type": "opt", **text.given}, text.where)
    reader = language.module
    assert isinstance(reader, Language)
    model = VisionLanguageModel(vision, _qformer(s, instructed, reader.dim), language=reader)
    return Part(model, blip2_table(tower, language.table, INSTRUCTBLIP if instructed else HUGGING_FACE))


def _retrieval(s: Settings) -> Part:
    (vision, tower), qformer = _vision(s), _qformer(s, reads=True)
    contrast = ContrastiveHead(qformer.width, qformer.width, s["image_text_hidden_size"], temperature=1.0, bias=True)
    model = VisionLanguageModel(vision, qformer, contrast=contrast, match=MatchingHead(qformer.width))
    return Part(model, retrieval_table(tower))


def _vision(s: Settings) -> tuple[ImageEncoder, Table]:
    module, table = blip2_vit(s.section("vision_config", BLIP2_VISION), f"{s.where}: vision_config")
    assert isinstance(module, ImageEncoder)
    return module, table


def _qformer(s: Settings, reads: bool, out_dim: int | None = None) -> QFormer:
    """`reads`: with words, such as an instruction; their head is never published in this layout."""
    vision, q = s.section("vision_config", BLIP2_VISION), s.section("qformer_config", QFORMER)
    q.expect(hidden_act=("gelu",), position_embedding_type=("absolute",))
    width: int = q["hidden_size"]
    return QFormer(
        image_dim=vision["hidden_size"],
        dim=width,
        layers=q["num_hidden_layers"],
        heads=q["num_attention_heads"],
        queries=s["num_query_tokens"],
        hidden=q["intermediate_size"],
        cross_every=q["cross_attention_frequency"],
        text=TextBranch(q["vocab_size"], width, q["max_position_embeddings"], head="none") if reads else None,
        image_norm=nn.LayerNorm(vision["hidden_size"], eps=vision["layer_norm_eps"]),
        out_dim=out_dim,
        dropout=q["hidden_dropout_prob"],
        eps=q["layer_norm_eps"],
    )
