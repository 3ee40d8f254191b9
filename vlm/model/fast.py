"""A model made ready to write on a CPU, where the order of weights in memory decides how fast it is."""

import torch

from vlm.model.language import Decoder
from vlm.model.seq2seq import EncoderDecoder
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.layout import lay_out_for_decoding
from vlm.nn.packed import PackedLinear, pack_for_decoding


def prepare_for_decoding(model: VisionLanguageModel, rows: int) -> None:
    """In place, for inference alone; `rows`: texts written together, times beams. What is written stays the same.

    Where packed weights are faster, the language model keeps no others (`pack_for_decoding`) and cannot be saved; else
    `lay_out_for_decoding`. A tied vocabulary in bf16 is held twice, since looking words up needs rows.
    """
    language = model.language
    if isinstance(language, Decoder | EncoderDecoder) and pack_for_decoding(language, rows):
        weight = language.embedding.weight
        if isinstance(language, Decoder) and language.head is None and weight.dtype == torch.bfloat16:
            language.head = PackedLinear(weight)
    lay_out_for_decoding(model)
