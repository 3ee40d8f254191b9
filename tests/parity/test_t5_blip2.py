"""Flan-T5 under BLIP-2, as transformers puts the two together: queries and prompt are what the encoder reads."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

from tests.parity.noise import gap, noise
from vlm.data.batch import Text
from vlm.loss.language import language, supervised
from vlm.model.beam import Beams
from vlm.model.generate import Decoding, Sampling, generate
from vlm.model.published.language import language_part
from vlm.model.published.part import Part
from vlm.model.vlm import Seen, VisionLanguageModel
from vlm.model.weights.files import load_strict, read
from vlm.nn.tokens import IGNORE, IMAGE_ID

VOCABULARY, WIDTH, QUERIES, THEIR_IMAGE_ID = 70, 40, 6, 65


@cache
def published() -> Blip2ForConditionalGeneration:
    text = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer = {"vocab_size": 9, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Blip2Config(
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        qformer_config={**qformer, "num_attention_heads": 2, "encoder_hidden_size": 24, "max_position_embeddings": 8},
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_id=THEIR_IMAGE_ID,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    model.language_model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, WIDTH))  # see test_t5
    noise(model, scale=0.2)
    return model


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """The language model of the files, under its prefix."""
    published().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    found, tensors = language_part(config["text_config"], "config.json"), read(tmp_path / "model.safetensors")
    own = {name: value for name, value in tensors.items() if name.startswith("language_model.")}
    table = found.table.under("language_model.", "")
    load_strict(found.module, table.to_ours(own), "model.safetensors")
    back = table.to_theirs(found.module.state_dict())
    assert set(back) == set(own) and all(torch.equal(value, own[name]) for name, value in back.items())
    return found


def inputs() -> tuple[Tensor, Text]:
    """Prompts of different length after the queries, and answers of different length."""
    maker = torch.Generator().manual_seed(1)
    ids, replies = (torch.randint(2, 60, (2, length), generator=maker) for length in (13, 5))
    ids[:, :QUERIES], replies[:, 0] = IMAGE_ID, 0
    valid, answered = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(replies, dtype=torch.bool)
    valid[1, -4:] = answered[0, -2:] = False
    labels = replies.masked_fill(~answered, IGNORE)
    labels[:, 0] = IGNORE
    reply = Text(replies, answered, labels)
    return torch.randn(2, 3, 16, 16, generator=maker), Text(ids, valid, torch.full_like(ids, IGNORE), reply=reply)


def theirs(text: Text) -> dict[str, Tensor]:
    ids = text.ids.masked_fill(text.ids == IMAGE_ID, THEIR_IMAGE_ID)
    return {"input_ids": ids, "attention_mask": text.valid.long()}


@torch.no_grad()
def looked(images: Tensor) -> Seen:
    """What their own connector hands to the language model."""
    model = published()
    queries = model.query_tokens.expand(len(images), -1, -1)
    image = model.vision_model(images).last_hidden_state
    return Seen(model.language_projection(model.qformer(query_embeds=queries, encoder_hidden_states=image)[0]))


def test_logits_and_loss(part: Part) -> None:
    model, (images, text) = VisionLanguageModel(language=part.module.eval()), inputs()  # type: ignore[arg-type]
    reply = text.written
    hidden = model.write(looked(images), text).hidden
    labels = torch.cat([reply.labels[:, 1:], torch.full((2, 1), IGNORE)], 1)
    # Where an answer has ended their decoder reads other tokens, which no state before them sees.
    out = published()(pixel_values=images, labels=labels, **theirs(text))
    assert float(out.logits.detach().std()) > 0.3
    assert gap(model.logits(hidden)[reply.valid], out.logits[reply.valid]) < 1e-4
    states, target = supervised(hidden, reply.labels)
    assert gap(language(model.logits(states), target), out.loss) < 1e-5
    other = model.logits(model.write(looked(images.flip(0)), text).hidden)
    assert gap(other[reply.valid], out.logits[reply.valid]) > 1e-2


@pytest.mark.parametrize("decoding", [Sampling(8), Beams(3, max_new=8)])
@torch.no_grad()
def test_the_same_captions(part: Part, decoding: Decoding) -> None:
    model, (images, text) = VisionLanguageModel(language=part.module.eval()), inputs()  # type: ignore[arg-type]
    start = torch.zeros(2, 1, dtype=torch.long)
    asked = Text(text.ids, text.valid, text.labels, reply=Text(start, start == 0, start + IGNORE, True))
    out = model.write(looked(images), asked)
    found = generate(model.proceed, model.logits(out.hidden[:, 0]), out.state, start, 1, decoding)
    width = getattr(decoding, "width", 1)
    rows = published().generate(
        pixel_values=images, max_new_tokens=8, num_beams=width, do_sample=False, eos_token_id=1, **theirs(text)
    )
    wanted = [row[: row.index(1)] if 1 in row else row for row in rows[:, 1:].tolist()]
    assert found == wanted and found[0] != found[1]
