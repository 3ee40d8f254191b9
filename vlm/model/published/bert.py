"""Published text encoders from the settings in their config.json: BERT, and MiniLM, which is one."""

from collections.abc import Mapping
from typing import Any

from vlm.model.bert import Bert
from vlm.model.published.part import Part, Settings
from vlm.model.weights.bert import bert_table

# What transformers' BertConfig takes where config.json says nothing.
BERT: Mapping[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def text_part(values: Mapping[str, Any], where: str, pooler: bool = True) -> Part:
    """The text encoder that a config.json describes.

    `pooler`: with the layer on the first token, which models trained on masked words alone do not have. ValueError: a
    family that is not known, a setting that our parts do not have.
    """
    if values.get("model_type") != "bert":
        raise ValueError(f"{where}: model_type={values.get('model_type')!r} is no text encoder known here (bert)")
    s = Settings(values, where, BERT)
    s.expect(
        hidden_act=("gelu",), position_embedding_type=("absolute",), is_decoder=(False,), add_cross_attention=(False,)
    )
    module = Bert(
        s["vocab_size"],
        s["hidden_size"],
        s["num_hidden_layers"],
        s["num_attention_heads"],
        s["max_position_embeddings"],
        s["intermediate_size"],
        s["type_vocab_size"],
        pooler,
        s["layer_norm_eps"],
    )
    return Part(module, bert_table(pooler))
