"""T5, T5 1.1 and Flan-T5 from the settings in their config.json."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vlm.model.published.part import Part, Settings
from vlm.model.seq2seq import t5
from vlm.model.weights.t5 import t5_table
from vlm.nn.ffn import GatedMlp, Mlp

# What transformers' T5Config takes where config.json says nothing; the last five follow from others there.
T5: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "num_decoder_layers": None,
    "dense_act_fn": None,
    "is_gated_act": None,
    "decoder_start_token_id": None,
    "scale_decoder_outputs": None,
}
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
}


def t5_part(s: Settings) -> Part:
    """T5 1.0 ties its head and divides what it reads by sqrt(d_model); later ones, also as transformers 5 writes them
    (there `scale_decoder_outputs` alone tells), have a head of their own. ValueError: an activation not known here.
    """
    gated, activation = _feed(s)
    tied = s["tie_word_embeddings"] is not False and s["scale_decoder_outputs"] is not False
    dim, hidden = s["d_model"], s["d_ff"]

    def ffn() -> nn.Module:
        return GatedMlp(dim, hidden, activation()) if gated else Mlp(dim, hidden, activation(), bias=False)

    start = s["decoder_start_token_id"]
    module = t5(
        s["vocab_size"],
        dim,
        s["num_layers"],
        s["num_heads"],
        s["d_kv"],
        hidden,
        decoder_layers=s["num_decoder_layers"],
        ffn=ffn,
        buckets=s["relative_attention_num_buckets"],
        longest=s["relative_attention_max_distance"],
        eps=s["layer_norm_epsilon"],
        tied=tied,
        start=s["pad_token_id"] if start is None else start,
    )
    return Part(module, t5_table(tied, gated))


def _feed(s: Settings) -> tuple[bool, Callable[[], nn.Module]]:
    """Whether the FFN is gated, and its activation: "gated-gelu" means the tanh-approximated one unless told."""
    gate, _, last = str(s["feed_forward_proj"]).rpartition("-")
    name = "gelu_new" if s["feed_forward_proj"] == "gated-gelu" else last
    name = s["dense_act_fn"] or name
    if gate not in ("", "gated") or name not in ACTIVATIONS:
        raise ValueError(
            f"{s.where}: feed_forward_proj={s['feed_forward_proj']!r} with dense_act_fn={name!r} is not known here "
            f"(known: {', '.join(ACTIVATIONS)}, and the same after 'gated-')"
        )
    gated = gate == "gated" if s["is_gated_act"] is None else bool(s["is_gated_act"])
    return gated, ACTIVATIONS[name]
