"""InstructBLIP from Hugging Face's files is transformers': the Q-Former reads the instruction, and so does the LM."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from tests.parity.blip2 import (
    QFORMER,
    QUERIES,
    THEIR_IMAGE_ID,
    VISION,
    compared,
    continued,
    expected,
    expected_continuation,
    instructions,
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
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import read

WEIGHTS = "model.safetensors"


class Pair(NamedTuple):
    family: str
    ours: VisionLanguageModel
    theirs: InstructBlipForConditionalGeneration
    folder: Path


@pytest.fixture(scope="module", params=["llama", "t5"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    text = language_config(request.param).to_dict()
    ids = {"num_query_tokens": QUERIES, "image_token_index": THEIR_IMAGE_ID}
    config = InstructBlipConfig(vision_config=VISION, qformer_config=QFORMER, text_config=text, **ids)
    theirs = InstructBlipForConditionalGeneration(config)
    untied(theirs)
    ours = loaded(blip2_part(saved(theirs, folder, scale=0.15), "config.json"), folder / WEIGHTS)
    assert isinstance(ours, VisionLanguageModel)
    return Pair(request.param, ours, theirs, folder)


def inputs(pair: Pair) -> tuple[Tensor, Text, Text]:
    return pictures(), texts(pair.family, [0, 0, 0], [9, 5, 7]), instructions([8, 3, 5])


def test_logits_loss_and_gradients(pair: Pair) -> None:
    _, ours, theirs, _ = pair
    given = inputs(pair)
    (logits, loss), (wanted, wanted_loss) = run(ours, *given), expected(theirs, *given)
    assert float(wanted.detach().std()) > 0.3
    assert compared(logits, wanted, given[1]) < 1e-4
    assert gap(loss, wanted_loss) < 1e-5
    names = {
        "connector.queries": "query_tokens",
        "connector.out.weight": "language_projection.weight",
        "connector.text.embedding.weight": "qformer.embeddings.word_embeddings.weight",
        "connector.stack.blocks.1.ffn.routes.text.up.weight": "qformer.encoder.layer.1.intermediate.dense.weight",
    }
    found = torch.autograd.grad(loss, [ours.get_parameter(name) for name in names])
    other = torch.autograd.grad(wanted_loss, [theirs.get_parameter(name) for name in names.values()])
    for mine, their in zip(found, other, strict=True):
        assert float(their.abs().max()) > 1e-4
        assert gap(mine, their.reshape(mine.shape)) < 1e-4


@torch.no_grad()
def test_padded_instructions_are_their_rows(pair: Pair) -> None:
    images, text, instruction = inputs(pair)
    together = run(pair.ours, images, text, instruction)[0]
    for row in range(3):
        kept = instruction.valid[row]
        alone = Text(*(part[row : row + 1, kept] for part in (instruction.ids, instruction.valid, instruction.labels)))
        found = run(pair.ours, images[row : row + 1], text.select(torch.tensor([row])), alone)[0]
        valid = text.written.valid[row]
        assert gap(found[0, valid], together[row, valid]) < 1e-5


@pytest.mark.parametrize("how", [Sampling(max_new=8), Beams(3, max_new=8)])
def test_generated_text_is_the_same(pair: Pair, how: Sampling | Beams) -> None:
    images, text, instruction = inputs(pair)
    found = continued(pair.ours, images, text, how, instruction)
    assert found == expected_continuation(pair.theirs, images, text, how, instruction)
    assert all(len(set(row)) > 2 for row in found)
    assert found != continued(pair.ours, images, text, how)
    assert found != continued(pair.ours, images.roll(1, 0), text, how, instruction)


def test_round_trip(pair: Pair, tmp_path: Path) -> None:
    part = blip2_part(json.loads((pair.folder / "config.json").read_text()), "config.json")
    loaded(part, pair.folder / WEIGHTS)
    assert same(written(part, tmp_path / WEIGHTS), read(pair.folder / WEIGHTS))
    (tmp_path / "config.json").write_text((pair.folder / "config.json").read_text())
    again = InstructBlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    given = inputs(pair)
    with torch.no_grad():
        assert torch.equal(expected(again, *given)[0], expected(pair.theirs, *given)[0])


@torch.no_grad()
def test_changed_facts_are_noticed(pair: Pair) -> None:
    images, text, instruction = inputs(pair)
    wanted = expected(pair.theirs, images, text, instruction)[0]
    bare = run(pair.ours, images, text)[0]  # the Q-Former does not read it
    assert compared(bare, wanted, text) > 1e-3
    blind = Text(instruction.ids, torch.ones_like(instruction.valid), instruction.labels)
    assert compared(run(pair.ours, images, text, blind)[0], wanted, text) > 1e-3
    shifted = Text(instruction.ids.roll(1, 1), instruction.valid, instruction.labels)
    assert compared(run(pair.ours, images, text, shifted)[0], wanted, text) > 1e-3


def test_files_of_blip2_do_not_fit(pair: Pair) -> None:
    config = {**json.loads((pair.folder / "config.json").read_text()), "model_type": "blip-2", "architectures": None}
    with pytest.raises(ValueError, match=r"BLIP-2: published tensors .*: qformer\.e"):
        loaded(blip2_part(config, "config.json"), pair.folder / WEIGHTS)
