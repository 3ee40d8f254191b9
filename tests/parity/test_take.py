"""A RetNet behind the Q-Former of a published BLIP-2: parts by name, what is new and left is told, and it learns."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from tests.parity.blip2 import QFORMER, QUERIES, THEIR_IMAGE_ID, VISION, language_config, pictures, prompts, run
from tests.parity.lavis import BERT, TOWER, config_of, save_lavis
from tests.parity.noise import gap, noise
from tests.parity.published import loaded, saved
from vlm.model.published import lavis
from vlm.model.published.blip2 import front_part
from vlm.model.published.lavis import lavis_system, together
from vlm.model.published.take import take
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.retnet import retnet
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import load_strict, read

WIDTH, VOCABULARY = 24, 99
SETTINGS = {"num_query_tokens": QUERIES, "image_token_index": THEIR_IMAGE_ID}


def published(folder: Path, vision: dict[str, int], qformer: dict[str, int]) -> Blip2ForConditionalGeneration:
    text = language_config("opt").to_dict()
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, **SETTINGS)
    theirs = Blip2ForConditionalGeneration(config)
    saved(theirs, folder, scale=0.15)
    return theirs


def own(text: TextBranch | None = None, out_dim: int | None = WIDTH) -> VisionLanguageModel:
    """The parts of the small systems before a decoder of another width."""
    front = front_part({"vision_config": VISION, "qformer_config": QFORMER, **SETTINGS}, "config.json").module
    qformer = QFormer(48, 32, 4, 4, QUERIES, 56, text=text, image_norm=nn.LayerNorm(48, 1e-6), out_dim=out_dim)
    model = VisionLanguageModel(front.vision, qformer, language=retnet(VOCABULARY, WIDTH, 2, 2))
    noise(model, seed=9)
    return model


def seen_by_theirs(theirs: Blip2ForConditionalGeneration) -> torch.Tensor:
    found: torch.Tensor = theirs.get_image_features(pictures(), return_dict=True).qformer_outputs.last_hidden_state
    return found


def test_a_retnet_behind_the_q_former(tmp_path: Path) -> None:
    theirs = published(tmp_path, VISION, QFORMER)
    front = loaded(front_part(config_of(tmp_path), "config.json"), tmp_path / "model.safetensors")
    assert isinstance(front, VisionLanguageModel) and front.language is None
    model = own()
    before = model.connector.out.weight.clone()
    lines = take(model, front, ["vision", "connector"], new=["connector.out"])
    assert lines[0].startswith("vision: ") and lines[0].endswith(" tensors taken")
    assert lines[1].endswith(" tensors taken, new here: connector.out.bias, connector.out.weight")
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


def test_what_is_left_is_told(tmp_path: Path) -> None:
    text = {**QFORMER, "use_qformer_text_input": True}
    theirs = Blip2ForImageTextRetrieval(
        Blip2Config(vision_config=VISION, qformer_config=text, num_query_tokens=QUERIES)
    )
    part = front_part(saved(theirs, tmp_path), "config.json")
    front = loaded(part, tmp_path / "model.safetensors")
    assert isinstance(front, VisionLanguageModel) and front.match is None
    [line] = take(own(), front, ["connector"], new=["connector.out"])
    assert line.endswith(", 26 left behind")  # two of embeddings, six in each of four blocks


@torch.no_grad()
def test_the_same_from_lavis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lavis, "BLOCKS", 3)
    theirs = published(tmp_path, TOWER, BERT).eval()
    paths = save_lavis(theirs, tmp_path, "opt_proj")
    files = {name: read(paths[name]) for name in ("main", "vision")}
    system = lavis_system("blip2.pth", files["main"], {"vision": files["vision"]}, front=True)
    load_strict(system.module, system.table.to_ours(together(files)), "LAVIS")
    assert system.module.language is None and isinstance(system.module.connector.out, nn.Identity)
    assert gap(system.module.eval().see(pictures()).soft, seen_by_theirs(theirs)) < 1e-4


def test_mistakes_are_told_and_nothing_is_copied() -> None:
    model, given = own(), own(out_dim=40)
    noise(given, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"connector\.out\.bias is \(40,\) there and \(24,\) here; .*in `new`"):
        take(model, given, ["vision", "connector"])
    with pytest.raises(ValueError, match=r"new=connector\.head: no tensor of connector has such a name"):
        take(model, given, ["connector"], new=["connector.out", "connector.head"])
    with pytest.raises(ValueError, match=r"ffn\.routes\.text\.up\.weight is not in what is given; .*; and 21 more"):
        take(own(TextBranch(9, 32, 8, head="none")), given, ["connector"], new=["connector.out"])
    with pytest.raises(ValueError, match="part 'audio': there are vision, connector, text"):
        take(model, given, ["audio"])
    with pytest.raises(ValueError, match="no match"):
        take(model, given, ["match"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
