"""A small Llama of transformers, filled with noise, and our decoder with its weights."""

from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity.decoders import filled
from vlm.model.language import Decoder, llama
from vlm.model.weights.files import load_strict
from vlm.model.weights.llama import llama_table

THEIRS = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}


def pair(tied: bool = True) -> tuple[Decoder, LlamaForCausalLM]:
    """Ours and theirs."""
    theirs = filled(LlamaForCausalLM(LlamaConfig(**THEIRS, tie_word_embeddings=tied, rope_parameters=PLAIN)))
    ours = llama(99, 48, 3, 6, 2, hidden=80, theta=5000.0, eps=1e-5, tied=tied)
    load_strict(ours, llama_table(tied).to_ours(theirs.state_dict()), "transformers")
    return ours.eval(), theirs
