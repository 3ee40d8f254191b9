"""MiniGPT-4 from its authors' files: a projection of its own between LAVIS' Q-Former and Vicuna."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration

from tests.parity.blip2 import (
    QUERIES,
    THEIR_IMAGE_ID,
    compared,
    continued,
    expected,
    expected_continuation,
    language_config,
    pictures,
    prompts,
    run,
)
from tests.parity.lavis import BERT, TOWER, opened, save_lavis
from tests.parity.noise import gap, noise
from tests.parity.published import same
from vlm.data.batch import Text
from vlm.model.beam import Beams
from vlm.model.generate import Sampling
from vlm.model.published import lavis
from vlm.model.published.lavis import contents, lavis_system, needs
from vlm.model.weights.files import read


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of a tower of four, as LAVIS takes 39 of 40."""
    monkeypatch.setattr(lavis, "BLOCKS", 3)


def made(folder: Path) -> tuple[Blip2ForConditionalGeneration, dict[str, Path]]:
    """transformers' BLIP-2 before a Llama, and MiniGPT-4's files of it; the Q-Former's file is for another model."""
    config = Blip2Config(
        vision_config=TOWER,
        qformer_config=BERT,
        text_config=language_config("llama").to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=THEIR_IMAGE_ID,
    )
    theirs = Blip2ForConditionalGeneration(config).eval()
    noise(theirs, scale=0.12)
    paths = save_lavis(theirs, folder, "t5_proj")
    paths["qformer"] = paths["main"]
    qformer = read(paths["qformer"])
    words = {
        "Qformer.bert.embeddings.word_embeddings.weight": torch.randn(60, 128),
        "Qformer.bert.embeddings.position_embeddings.weight": torch.randn(24, 128),
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.randn(96, 128),
        "Qformer.cls.predictions.bias": torch.randn(60),
        "itm_head.weight": torch.randn(2, 128),
    }
    other = {"t5_proj.weight": torch.randn(17, 128), "t5_proj.bias": torch.randn(17), **words}
    torch.save({"model": {**qformer, **other}}, paths["qformer"])
    paths["main"] = folder / "pretrained_minigpt4.pth"
    own = {f"llama_proj.{part}": qformer[f"t5_proj.{part}"] for part in ("weight", "bias")}
    torch.save({"model": own}, paths["main"])
    return theirs, paths


def inputs() -> tuple[Tensor, Text]:
    """The image in the middle of the prompt, as in "###Human: <Img>…</Img> …"."""
    return pictures(), prompts([4, 4, 4], [9, 5, 7])


def test_logits_loss_and_gradients(tmp_path: Path) -> None:
    theirs, paths = made(tmp_path)
    ours, _ = opened(paths)
    (logits, loss), (wanted, wanted_loss) = run(ours, *inputs()), expected(theirs, *inputs())
    assert float(wanted.detach().std()) > 0.3
    assert compared(logits, wanted, inputs()[1]) < 1e-4
    assert gap(loss, wanted_loss) < 1e-5
    found = torch.autograd.grad(loss, ours.connector.out.weight)[0]
    other = torch.autograd.grad(wanted_loss, theirs.language_projection.weight)[0]
    assert float(other.abs().max()) > 1e-3
    assert gap(found, other) < 1e-4


@pytest.mark.parametrize("how", [Sampling(max_new=8), Beams(3, max_new=8)])
def test_generated_text_is_the_same(how: Sampling | Beams, tmp_path: Path) -> None:
    theirs, paths = made(tmp_path)
    found = continued(opened(paths)[0], *inputs(), how)
    assert found == expected_continuation(theirs, *inputs(), how)
    assert all(len(set(row)) > 2 for row in found)


def test_round_trip(tmp_path: Path) -> None:
    _, paths = made(tmp_path)
    ours, system = opened(paths)
    assert set(system.tables) == {"main", "vision", "qformer", "language"}
    out = {name: value for name, value in ours.state_dict().items() if name.startswith("connector.out.")}
    assert same(system.tables["main"].to_theirs(out), read(paths["main"]))


def test_what_its_file_needs(tmp_path: Path) -> None:
    _, paths = made(tmp_path)
    main = read(paths["main"])
    assert contents(main) == {"projection"}
    assert set(needs(main, "a")) == {"vision", "qformer", "language"}
    with pytest.raises(ValueError, match=r"minigpt4\.pth: .* qformer: .*blip2_pretrained_flant5xxl\.pth"):
        lavis_system("minigpt4.pth", main, {"vision": read(paths["vision"])})


def test_its_variant_without_q_former_is_refused(tmp_path: Path) -> None:
    """Four patches side by side before Llama 2: a projection that reads four times the image's width."""
    _, paths = made(tmp_path)
    torch.save(
        {"model": {"llama_proj.weight": torch.randn(40, 704), "llama_proj.bias": torch.zeros(40)}}, paths["main"]
    )
    with pytest.raises(ValueError, match=r"llama_proj reads width 704, the Q-Former writes 128"):
        opened(paths)


@torch.no_grad()
def test_changed_facts_are_noticed(tmp_path: Path) -> None:
    theirs, paths = made(tmp_path)
    ours, _ = opened(paths)
    images, text = inputs()
    wanted = expected(theirs, images, text)[0]
    front = Text(torch.cat([text.ids[:, 4:], text.ids[:, :4]], 1), text.valid, text.labels)
    assert gap(run(ours, images, front)[0][0, -1], wanted[0, -1]) > 1e-3
    ours.connector.out.weight.data *= 1.01
    assert compared(run(ours, images, text)[0], wanted, text) > 1e-3
