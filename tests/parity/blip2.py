"""Shared by the parity tests of BLIP-2's family: small systems, texts with images, and both sides run on them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedModel, T5Config

from tests.parity.noise import gap
from vlm.data.batch import Text
from vlm.loss.language import language, supervised
from vlm.model.beam import Beams
from vlm.model.generate import Decoding, Sampling, generate
from vlm.model.vlm import VisionLanguageModel, last_valid
from vlm.nn.tokens import IGNORE, IMAGE_ID

VOCABULARY, THEIR_IMAGE_ID, QUERIES, PAD, EOS, START, SIZE = 99, 90, 6, 1, 2, 0, 28
VISION = {
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 7,
}
QFORMER = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 48,
    "max_position_embeddings": 24,
}
CONTROL = {"bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": PAD}


def language_config(family: str) -> PreTrainedConfig:
    """A language model of two blocks."""
    if family == "opt":
        sizes = {"hidden_size": 40, "ffn_dim": 72, "max_position_embeddings": 48, "word_embed_proj_dim": 40}
        return OPTConfig(vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4, **sizes, **CONTROL)
    if family == "t5":  # as LAVIS runs Flan-T5: with the exact GELU
        sizes = {"d_model": 40, "d_kv": 8, "d_ff": 72, "num_layers": 2, "num_heads": 3}
        kind = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False}
        return T5Config(vocab_size=VOCABULARY, decoder_start_token_id=START, **sizes, **kind, **CONTROL)
    sizes = {"hidden_size": 40, "intermediate_size": 72, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    return LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4, **sizes, **CONTROL)


def untied(theirs: PreTrainedModel) -> None:
    """Gives a T5 the head of its own that Flan-T5's files hold; transformers 5 ties it when it builds one."""
    if theirs.config.text_config.model_type == "t5":
        theirs.language_model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, 40))


def pictures(count: int = 3) -> Tensor:
    """Pixels as the image encoder takes them."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def prompts(before: list[int], after: list[int], side: str = "left") -> Text:
    """Rows of `before` words, one image and `after` words, padded on a side; the last three words are the answer."""
    maker = torch.Generator().manual_seed(2)
    width = max(map(sum, zip(before, after, strict=True))) + QUERIES
    ids = torch.full((len(before), width), PAD)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    labels = torch.full_like(ids, IGNORE)
    for row, (left, right) in enumerate(zip(before, after, strict=True)):
        words = torch.randint(3, THEIR_IMAGE_ID, (left + right,), generator=maker)
        line = torch.cat([words[:left], torch.full((QUERIES,), IMAGE_ID), words[left:]])
        start = width - len(line) if side == "left" else 0
        ids[row, start : start + len(line)], valid[row, start : start + len(line)] = line, True
        labels[row, start + len(line) - 3 : start + len(line)] = line[-3:]
    return Text(ids, valid, labels)


def replied(text: Text, lengths: list[int]) -> Text:
    """The same to be read by an encoder, and what a decoder writes: its start token and so many words."""
    ids = torch.randint(3, THEIR_IMAGE_ID, (len(lengths), 1 + max(lengths)), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = START
    valid = torch.arange(1 + max(lengths))[None] <= torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~valid, IGNORE)
    labels[:, 0] = IGNORE
    reply = Text(ids.masked_fill(~valid, PAD), valid, labels, bool(valid.all()))
    return Text(text.ids, text.valid, torch.full_like(text.ids, IGNORE), text.full, reply)


def texts(family: str, before: list[int], after: list[int], side: str = "left") -> Text:
    """Prompts as a language model of this family takes them."""
    found = prompts(before, after, side)
    return replied(found, [6, 3, 5][: len(before)]) if family == "t5" else found


def instructions(lengths: list[int]) -> Text:
    """What the Q-Former reads, in its own vocabulary, padded on the right."""
    ids = torch.randint(1, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    valid = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return Text(ids.masked_fill(~valid, 0), valid, torch.full_like(ids, IGNORE))


def theirs_of(text: Text, instruction: Text | None = None) -> dict[str, Tensor]:
    """The arguments of the published model."""
    ids = text.ids.masked_fill(text.ids == IMAGE_ID, THEIR_IMAGE_ID)
    given = {"input_ids": ids, "attention_mask": text.valid.long()}
    if instruction is None:
        return given
    return {
        **given,
        "qformer_input_ids": instruction.ids,
        "qformer_attention_mask": instruction.valid.long(),
    }


def run(
    model: VisionLanguageModel, images: Tensor, text: Text, instruction: Text | None = None
) -> tuple[Tensor, Tensor]:
    """Our logits and loss."""
    hidden = model.write(model.see(images, instruction), text).hidden
    states, target = supervised(hidden, text.written.labels)
    return model.logits(hidden), language(model.logits(states), target)


def expected(
    model: PreTrainedModel, images: Tensor, text: Text, instruction: Text | None = None
) -> tuple[Tensor, Tensor]:
    """Theirs."""
    given, labels = theirs_of(text, instruction), text.labels
    if (reply := text.reply) is not None:
        given |= {"decoder_input_ids": reply.ids, "decoder_attention_mask": reply.valid.long()}
        labels = torch.cat([reply.labels[:, 1:], torch.full((len(reply.ids), 1), IGNORE)], 1)
    out = model(pixel_values=images, labels=labels, **given)
    return out.logits, out.loss


def compared(ours: Tensor, theirs: Tensor, text: Text) -> float:
    """The largest difference of two logits where there is text."""
    return gap(ours[text.written.valid], theirs[text.written.valid])


@torch.no_grad()
def continued(
    model: VisionLanguageModel,
    images: Tensor,
    text: Text,
    how: Decoding,
    instruction: Text | None = None,
    eos: int = EOS,
) -> list[list[int]]:
    """What ours writes after the prompts."""
    if text.reply is not None:
        text = replied(text, [0] * len(text.ids))
    out = model.write(model.see(images, instruction), text)
    said = text.written
    logits = model.logits(last_valid(out.hidden, said.valid))
    return generate(model.proceed, logits, out.state, torch.where(said.valid, said.ids, -1), eos, how)


def expected_continuation(
    model: PreTrainedModel,
    images: Tensor,
    text: Text,
    how: Sampling | Beams,
    instruction: Text | None = None,
    eos: int = EOS,
) -> list[list[int]]:
    """What theirs writes, up to its end token."""
    beams = how.width if isinstance(how, Beams) else 1
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": how.max_new, "do_sample": False}
    found = model.generate(
        pixel_values=images, eos_token_id=eos, pad_token_id=PAD, **options, **theirs_of(text, instruction)
    )
    begin = text.ids.shape[1] if text.reply is None else 1
    rows = [row[begin:].tolist() for row in found]
    return [row[: row.index(eos)] if eos in row else row for row in rows]
