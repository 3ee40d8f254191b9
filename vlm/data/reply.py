"""Prompts and answers apart, for models that read with one stack and write with another (T5)."""

from vlm.data.text import Encoded
from vlm.nn.tokens import IGNORE


def apart(whole: Encoded, start: int, eos: int) -> Encoded:
    """What the encoder reads, ended by eos, and as its `reply` what the decoder writes: `start`, the answer, its eos.

    The answer is the last supervised run of `whole`; all before it is read, earlier answers too. A prompt without an
    answer has the start token alone for a reply: decoding goes on from there. ValueError: text after the answer.
    """
    size = len(whole.labels)
    begin = next((at for at in range(size, 0, -1) if whole.labels[at - 1] == IGNORE), 0)
    if begin == size and any(label != IGNORE for label in whole.labels):
        raise ValueError("text after the last answer: an encoder-decoder never reads it, and it cannot be learned")
    answer, read = whole.ids[begin:], [*whole.ids[:begin], eos]
    return Encoded(read, [IGNORE] * len(read), Encoded([start, *answer], [IGNORE, *answer]))
