"""A RetNet behind the Q-Former of a published BLIP-2, by the path of `model.init`: equal, and it learns."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

from tests.parity.blip2 import QFORMER, QUERIES, THEIR_IMAGE_ID, VISION, language_config, pictures, prompts, run
from tests.parity.lavis import BERT, TOWER, save_lavis
from tests.parity.noise import gap, noise
from tests.parity.published import saved
from vlm.model.published import lavis
from vlm.model.published.blip2 import blip2_part
from vlm.model.published.load import load
from vlm.model.published.start import starting_weights
from vlm.model.qformer import QFormer
from vlm.model.retnet import retnet
from vlm.model.vlm import VisionLanguageModel

WIDTH, VOCABULARY = 24, 99
SETTINGS = {"num_query_tokens": QUERIES, "image_token_index": THEIR_IMAGE_ID}


def published(folder: Path, vision: dict[str, int], qformer: dict[str, int]) -> Blip2ForConditionalGeneration:
    text = language_config("opt").to_dict()
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, **SETTINGS)
    theirs = Blip2ForConditionalGeneration(config)
    saved(theirs, folder, scale=0.15)
    return theirs


def own(settings: dict[str, object]) -> VisionLanguageModel:
    """The parts of the small systems before a decoder of another width, filled with other noise."""
    vision = blip2_part(settings, "config.json").module.vision
    qformer = QFormer(48, 32, 4, 4, QUERIES, 56, image_norm=nn.LayerNorm(48, 1e-6), out_dim=WIDTH)
    model = VisionLanguageModel(vision, qformer, language=retnet(VOCABULARY, WIDTH, 2, 2))
    noise(model, seed=9)
    return model


def seen_by_theirs(theirs: Blip2ForConditionalGeneration) -> torch.Tensor:
    found: torch.Tensor = theirs.get_image_features(pictures(), return_dict=True).qformer_outputs.last_hidden_state
    return found


def test_a_retnet_behind_the_q_former(tmp_path: Path) -> None:
    theirs = published(tmp_path, VISION, QFORMER)
    model = own(theirs.config.to_dict())
    before = model.connector.out.weight.clone()
    for part in ("vision", "connector"):
        module = model.get_submodule(part)
        weights, _ = starting_weights(module, part, str(tmp_path))
        missing, unexpected = module.load_state_dict(weights, strict=False)
        assert missing == ([] if part == "vision" else ["out.weight", "out.bias"]) and not unexpected
    assert torch.equal(model.connector.out.weight, before)
    queries = model.connector.query(model.connector.look(model.vision(pictures())), 3).hidden
    assert gap(queries, seen_by_theirs(theirs)) < 1e-4
    text = prompts([0, 0, 0], [9, 9, 9])
    model.vision.requires_grad_(False)
    learns = [*model.connector.parameters(), *model.language.parameters()]
    optimizer, losses = torch.optim.AdamW(learns, 1e-2), list[float]()
    for _ in range(6):
        loss = run(model, pictures(), text)[1]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_the_same_from_lavis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lavis, "BLOCKS", 3)
    theirs = published(tmp_path, TOWER, BERT).eval()
    paths = save_lavis(theirs, tmp_path, "opt_proj")
    qformer = QFormer(176, 128, 4, 2, QUERIES, 96, image_norm=nn.LayerNorm(176), out_dim=WIDTH)
    noise(qformer, seed=9)
    before = qformer.out.weight.clone()
    weights, _ = starting_weights(qformer, "connector", str(paths["main"]))  # it asks for no image encoder, for no OPT
    missing, unexpected = qformer.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["out.weight", "out.bias"], []) and torch.equal(qformer.out.weight, before)
    whole = load(str(paths["main"]), {name: str(paths[name]) for name in ("vision", "language")}).model
    assert whole.vision is not None
    queries = qformer.eval().query(qformer.look(whole.vision(pictures())), 3).hidden
    assert gap(queries, seen_by_theirs(theirs)) < 1e-4
    with pytest.raises(ValueError, match="holds a part of a system"):
        starting_weights(whole.vision, "vision", str(paths["main"]))
