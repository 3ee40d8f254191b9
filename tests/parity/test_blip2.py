"""BLIP-2 from Hugging Face's files is transformers' BLIP-2: logits, loss, gradients, texts, and the way back."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

from tests.parity.blip2 import (
    QFORMER,
    QUERIES,
    THEIR_IMAGE_ID,
    VISION,
    compared,
    continued,
    expected,
    expected_continuation,
    language_config,
    pictures,
    run,
    texts,
    untied,
)
from tests.parity.noise import gap
from tests.parity.published import loaded, same, saved, written
from vlm.data.batch import Text
from vlm.model.beam import Beams
from vlm.model.generate import Sampling
from vlm.model.published.blip2 import blip2_part
from vlm.model.vision import TimmBackbone
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import differences, read
from vlm.nn.tokens import IMAGE_ID

WEIGHTS = "model.safetensors"
FAMILIES = ("opt", "llama", "t5")


class Pair(NamedTuple):
    family: str
    ours: VisionLanguageModel
    theirs: Blip2ForConditionalGeneration
    folder: Path


def published(family: str) -> Blip2ForConditionalGeneration:
    text = language_config(family).to_dict()
    ids = {"num_query_tokens": QUERIES, "image_token_index": THEIR_IMAGE_ID}
    config = Blip2Config(vision_config=VISION, qformer_config=QFORMER, text_config=text, **ids)
    theirs = Blip2ForConditionalGeneration(config)
    untied(theirs)
    return theirs


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = published(request.param)
    config = saved(theirs, folder, scale=0.15)
    if request.param == "opt":  # so that its tied head does not say one word for ever
        theirs.language_model.model.decoder.embed_positions.weight.data *= 10
        theirs.save_pretrained(folder)
    ours = loaded(blip2_part(config, "config.json"), folder / WEIGHTS)
    assert isinstance(ours, VisionLanguageModel)
    return Pair(request.param, ours, theirs, folder)


GRADIENTS = {
    "connector.queries": "query_tokens",
    "connector.out.weight": "language_projection.weight",
    "connector.image_norm.weight": "vision_model.post_layernorm.weight",
    "connector.stack.blocks.2.cross.attention.key.weight": "layer.2.crossattention.attention.key.weight",
    "vision.backbone.model.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
}
DECODERS = {"language.stack.blocks.0.mixer.value.weight": "layers.0.self_attn.v_proj.weight"}
VALUES = {
    "opt": DECODERS,
    "llama": DECODERS,
    "t5": {
        "language.encoder.blocks.0.mixer.value.weight": "encoder.block.0.layer.0.SelfAttention.v.weight",
        "language.decoder.blocks.1.cross.attention.key.weight": "decoder.block.1.layer.1.EncDecAttention.k.weight",
    },
}


def test_logits_loss_and_gradients(pair: Pair) -> None:
    _, ours, theirs, _ = pair
    images, text = pictures(), texts(pair.family, [0, 0, 0], [9, 5, 7])
    (logits, loss), (wanted, wanted_loss) = run(ours, images, text), expected(theirs, images, text)
    assert float(wanted.detach().std()) > 0.3
    assert compared(logits, wanted, text) < 1e-4
    assert gap(loss, wanted_loss) < 1e-5
    names = {**GRADIENTS, **VALUES[pair.family]}
    their_names = [next(n for n, _ in theirs.named_parameters() if n.endswith(end)) for end in names.values()]
    found = torch.autograd.grad(loss, [ours.get_parameter(name) for name in names])
    grads = torch.autograd.grad(wanted_loss, [theirs.get_parameter(name) for name in their_names])
    for name, mine, other in zip(names, found, grads, strict=True):
        assert float(other.abs().max()) > 1e-3, name
        assert gap(mine, other.reshape(mine.shape)) < 1e-4, name


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_images_anywhere_in_the_prompt(pair: Pair, side: str) -> None:
    images, text = pictures(), texts(pair.family, [4, 0, 2], [9, 5, 7], side)
    logits, wanted = run(pair.ours, images, text)[0], expected(pair.theirs, images, text)[0]
    assert compared(logits, wanted, text) < 1e-4


@torch.no_grad()
def test_a_padded_batch_is_its_rows(pair: Pair) -> None:
    images, text = pictures(), texts(pair.family, [0, 0, 0], [9, 5, 7])
    together = run(pair.ours, images, text)[0]
    for row, kept in enumerate(text.written.valid):
        found = run(pair.ours, images[row : row + 1], alone(text, row))[0][0]
        assert gap(found, together[row, kept]) < 1e-5


def alone(text: Text, row: int) -> Text:
    """A row without its padding."""
    ids, valid, labels = (part[row : row + 1, text.valid[row]] for part in (text.ids, text.valid, text.labels))
    return Text(ids, valid, labels, True, None if text.reply is None else alone(text.reply, row))


@pytest.mark.parametrize("how", [Sampling(max_new=10), Beams(3, max_new=10)])
def test_generated_text_is_the_same(pair: Pair, how: Sampling | Beams) -> None:
    images, text = pictures(), texts(pair.family, [0, 0, 0], [9, 5, 7])
    free = continued(pair.ours, images, text, how)
    assert free == expected_continuation(pair.theirs, images, text, how)
    assert len({tuple(row) for row in free}) == 3 and all(len(set(row)) >= 3 for row in free)
    assert free != continued(pair.ours, images.roll(1, 0), text, how)
    eos = free[0][4]
    ended = continued(pair.ours, images, text, how, eos=eos)
    assert ended == expected_continuation(pair.theirs, images, text, how, eos=eos)
    assert len(ended[0]) <= 4


def test_round_trip(pair: Pair, tmp_path: Path) -> None:
    part = blip2_part(read_config(pair.folder), "config.json")
    loaded(part, pair.folder / WEIGHTS)
    assert same(written(part, tmp_path / WEIGHTS), read(pair.folder / WEIGHTS))
    (tmp_path / "config.json").write_text((pair.folder / "config.json").read_text())
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    images, text = pictures(), texts(pair.family, [0, 0, 0], [9, 5, 7])
    with torch.no_grad():
        assert torch.equal(expected(again, images, text)[0], expected(pair.theirs, images, text)[0])


def read_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def earlier_block(model: VisionLanguageModel) -> None:
    backbone = model.vision.backbone
    assert isinstance(backbone, TimmBackbone)
    backbone.layer = -2


def without_image_norm(model: VisionLanguageModel) -> None:
    model.connector.image_norm = nn.Identity()


def without_query_norm(model: VisionLanguageModel) -> None:
    model.connector.embed_norm = nn.Identity()


def without_a_cross_attention(model: VisionLanguageModel) -> None:
    model.connector.stack.blocks[2].cross = None


def without_bias(model: VisionLanguageModel) -> None:
    model.vision.get_parameter("backbone.model.blocks.1.attn.qkv.bias").data[-48:] = 0


CHANGES = [earlier_block, without_image_norm, without_query_norm, without_a_cross_attention, without_bias]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_facts_are_noticed(pair: Pair, change: Callable[[VisionLanguageModel], None]) -> None:
    ours = copy.deepcopy(pair.ours)
    change(ours)
    images, text = pictures(), texts(pair.family, [0, 0, 0], [9, 5, 7])
    assert compared(run(ours, images, text)[0], expected(pair.theirs, images, text)[0], text) > 1e-3


def test_another_rhythm_of_cross_attention_does_not_fit(pair: Pair) -> None:
    config = read_config(pair.folder)
    config["qformer_config"]["cross_attention_frequency"] = 1
    with pytest.raises(ValueError, match=r"missing: connector\.stack\.blocks\.1\.cross\.attention"):
        loaded(blip2_part(config, "config.json"), pair.folder / WEIGHTS)


@torch.no_grad()
def test_the_image_stands_before_the_prompt(pair: Pair) -> None:
    """Not after it, as a language model's order of words would have it with the same tokens."""
    images, text = pictures(), texts(pair.family, [0, 0, 0], [9, 9, 9])
    moved = Text(
        torch.cat([text.ids[:, QUERIES:], text.ids[:, :QUERIES]], 1), text.valid, text.labels, reply=text.reply
    )
    ours, wanted = run(pair.ours, images, moved)[0], expected(pair.theirs, images, text)[0]
    assert bool((moved.ids[:, -1] == IMAGE_ID).all())
    assert gap(ours[:, -1], wanted[:, -1]) > 1e-3


def test_what_old_files_leave_out_has_the_library_s_defaults() -> None:
    """The first files held hardly any settings: all sizes of the published systems, without memory."""
    with torch.device("meta"):
        part = blip2_part({"model_type": "blip-2", "vision_config": {}, "text_config": None}, "config.json")
        theirs = Blip2ForConditionalGeneration(Blip2Config())
    assert sum(tensor.numel() for tensor in theirs.parameters()) > 1.2e9
    ours = part.module
    assert isinstance(ours, VisionLanguageModel)
    assert not differences(ours.state_dict(), part.table.to_ours(theirs.state_dict()))
    heads = [block.mixer.heads for block in ours.connector.stack.blocks]
    assert heads == [theirs.config.qformer_config.num_attention_heads] * 12
    assert ours.vision.backbone.model.blocks[0].attn.num_heads == theirs.config.vision_config.num_attention_heads
    eps = (ours.connector.image_norm.eps, ours.connector.embed_norm.eps, ours.connector.embed_dropout.p)
    assert eps == (theirs.vision_model.post_layernorm.eps, theirs.qformer.layernorm.eps, theirs.qformer.dropout.p)
