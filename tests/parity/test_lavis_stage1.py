"""BLIP-2's first stage from LAVIS' file: its heads, its temperature, and its ITC, ITM and LM losses.

The losses are worked out again in test_stage1_losses from transformers' pieces; here they hold the weights of the file.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.model.small import LONGEST, QUERIES, VOCABULARY, WIDTH
from tests.parity.lavis import lavis_names
from tests.parity.noise import gap, noise
from tests.parity.test_stage1_losses import DEC, SMOOTHING, Recipe, Theirs, batch, recompute
from tests.parity.test_stage1_losses import hardest as hardest  # both sides take the hardest negative
from vlm.model.published import lavis
from vlm.model.published.lavis import Assembled, contents, lavis_system, needs
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import load_strict, read
from vlm.train.task import Itc, Itm, Lm, Losses, Task

TOWER_WIDTH, TOWER_BLOCKS, CLS = 10, 2, "Qformer.cls.predictions"


@pytest.fixture(autouse=True)
def four_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' side has them; in LAVIS they are 64 wide."""
    monkeypatch.setattr(lavis, "HEAD", WIDTH // 4)


def published() -> Theirs:
    """transformers' Q-Former with BERT's head for words, tied to the embedding."""
    theirs = Theirs()
    tied = nn.Linear(WIDTH, VOCABULARY)
    tied.weight = theirs.embeddings.word_embeddings.weight
    theirs.vocabulary = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH, eps=1e-12), tied)
    noise(theirs.eval(), scale=0.3)
    theirs.temperature.data.fill_(0.07)
    return theirs


def tower() -> dict[str, Tensor]:
    """A ViT of two blocks for pictures of 8 by 8, and the norm after it."""
    width = TOWER_WIDTH
    shapes = {
        "visual_encoder.cls_token": (1, 1, width),
        "visual_encoder.pos_embed": (1, 5, width),
        "visual_encoder.patch_embed.proj.weight": (width, 3, 4, 4),
        "visual_encoder.patch_embed.proj.bias": (width,),
        "ln_vision.weight": (width,),
        "ln_vision.bias": (width,),
    }
    for i in range(TOWER_BLOCKS):
        block = f"visual_encoder.blocks.{i}"
        for name in ("attn.q_bias", "attn.v_bias", "attn.proj.bias", "mlp.fc2.bias"):
            shapes[f"{block}.{name}"] = (width,)
        for name in ("norm1", "norm2"):
            shapes[f"{block}.{name}.weight"] = shapes[f"{block}.{name}.bias"] = (width,)
        shapes[f"{block}.attn.qkv.weight"], shapes[f"{block}.attn.proj.weight"] = (3 * width, width), (width, width)
        shapes[f"{block}.mlp.fc1.weight"], shapes[f"{block}.mlp.fc1.bias"] = (24, width), (24,)
        shapes[f"{block}.mlp.fc2.weight"] = (width, 24)
    maker = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=maker) * 0.3 for name, shape in shapes.items()}


def file_of(theirs: Theirs, path: Path) -> Path:
    """As LAVIS saves it: everything tied once more under its other names."""
    state = theirs.state_dict()
    own = {k: v for k, v in state.items() if k.startswith(("query_tokens", "embeddings.", "qformer."))}
    found = {**lavis_names(own, ""), **tower(), "temp": state["temperature"]}
    for name, other in (("image", "vision_proj"), ("text", "text_proj"), ("match", "itm_head")):
        found |= {f"{other}.{part}": state[f"{name}.{part}"] for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        found[f"{CLS}.transform.dense.{part}"] = state[f"vocabulary.0.{part}"]
        found[f"{CLS}.transform.LayerNorm.{part}"] = state[f"vocabulary.2.{part}"]
        found[f"{CLS}.decoder.{part}"] = state[f"vocabulary.3.{part}"]
    found[f"{CLS}.bias"] = state["vocabulary.3.bias"]
    found["Qformer.bert.embeddings.position_ids"] = torch.arange(LONGEST)[None]
    torch.save({"model": found}, path)
    return path


def opened(path: Path) -> tuple[VisionLanguageModel, Assembled]:
    weights = read(path)
    system = lavis_system(path.name, weights)
    load_strict(system.module, system.tables["main"].to_ours(weights), path.name)
    return system.module.eval(), system


def pair(folder: Path) -> tuple[VisionLanguageModel, Theirs]:
    theirs = published()
    return opened(file_of(theirs, folder / "blip2_pretrained.pth"))[0], theirs


def losses(ours: VisionLanguageModel) -> Losses:
    return Task(ours, [Itc(label_smoothing=SMOOTHING), Itm(), Lm(VOCABULARY, DEC, label_smoothing=SMOOTHING)])(batch())


def wanted(ours: VisionLanguageModel, theirs: Theirs, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    image = ours.connector.image_norm(ours.vision(batch().images)).detach()
    return recompute(theirs, image, batch().captions, recipe)


def test_losses_and_gradients(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    found, expected = losses(ours), wanted(ours, theirs, Recipe())
    for mine, other in zip(found.each.values(), expected, strict=True):
        assert gap(mine, other) < 1e-5
    found.total.backward()
    torch.stack(expected).sum().backward()
    names = {
        "connector.text.embedding.weight": "embeddings.word_embeddings.weight",  # also the head's
        "connector.text.bias": "vocabulary.3.bias",
        "connector.text.transform.0.weight": "vocabulary.0.weight",
        "connector.queries": "query_tokens",
        "contrast.text.weight": "text.weight",
        "match.classify.weight": "match.weight",
    }
    for name, other in names.items():
        grad, their = ours.get_parameter(name).grad, theirs.get_parameter(other).grad
        assert grad is not None and their is not None
        assert float(their.abs().max()) > 1e-3 and gap(grad, their.reshape(grad.shape)) < 1e-4, name
    assert ours.contrast is not None and ours.contrast.log_scale.grad is not None
    assert gap(-ours.contrast.log_scale.grad / theirs.temperature, theirs.temperature.grad) < 1e-4


def test_round_trip(tmp_path: Path) -> None:
    path = file_of(published(), tmp_path / "a.pth")
    ours, system = opened(path)
    back, original = system.tables["main"].to_theirs(ours.state_dict()), read(path)
    del original["Qformer.bert.embeddings.position_ids"]
    assert set(back) == set(original)
    assert float(back.pop("temp")) == pytest.approx(0.07, rel=1e-6)  # ours is its logarithm
    assert all(torch.equal(value, original[name]) for name, value in back.items())


def test_it_holds_all_of_stage_1(tmp_path: Path) -> None:
    weights = read(file_of(published(), tmp_path / "a.pth"))
    assert contents(weights) == {"vision", "qformer", "heads"} and needs(weights, "a.pth") == {}
    ours, _ = opened(tmp_path / "a.pth")
    assert ours.connector.tokens == QUERIES and ours.connector.text.max_tokens == LONGEST
    assert (ours.connector.image_norm.eps, ours.connector.embed_norm.eps) == (1e-5, 1e-12)


@pytest.mark.parametrize("name", [f"{CLS}.decoder.weight", f"{CLS}.decoder.bias"])
def test_a_head_that_is_not_the_embedding_is_refused(name: str, tmp_path: Path) -> None:
    path = file_of(published(), tmp_path / "a.pth")
    weights = read(path)
    torch.save({**weights, name: weights[name] + 1}, path)
    with pytest.raises(ValueError, match="should be one and the same"):
        opened(path)
    del weights[name]
    torch.save(weights, path)
    opened(path)


def test_a_temperature_that_is_none_is_refused(tmp_path: Path) -> None:
    path = file_of(published(), tmp_path / "a.pth")
    torch.save({**read(path), "temp": torch.tensor(-0.1)}, path)
    with pytest.raises(ValueError, match=r"a temperature of -0\.1: it must be above 0"):
        opened(path)


@torch.no_grad()
def test_changed_facts_are_noticed(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    expected = dict(zip(("itc", "itm", "lm"), wanted(ours, theirs, Recipe()), strict=True))
    warm, bare, straight = (copy.deepcopy(ours) for _ in range(3))
    warm.contrast.log_scale.data += 0.1
    bare.connector.text.bias.data.zero_()
    straight.connector.text.transform[1] = nn.ReLU()
    for model, loss in ((warm, "itc"), (bare, "lm"), (straight, "lm")):
        assert gap(losses(model).each[loss], expected[loss]) > 1e-3
