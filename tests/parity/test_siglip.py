"""SigLIP from published files is transformers': features, logits, probabilities, gradients, and the way back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import SiglipConfig, SiglipModel

from tests.parity.noise import gap
from tests.parity.published import loaded, same, saved, written
from tests.parity.test_clip import TEXT, VISION, WEIGHTS, close, run
from vlm.data.batch import Text
from vlm.model.connector import MeanPool
from vlm.model.published.siglip import siglip_part
from vlm.model.weights.files import read
from vlm.nn.tokens import IGNORE

LONGEST, PAD = 10, 1


def inputs() -> tuple[Tensor, Text]:
    """Pictures, and texts of up to seven tokens, padded with another id than SigLIP's."""
    maker = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 60, (5, 7), generator=maker)
    valid = torch.arange(7) < torch.tensor([[3], [7], [1], [6], [4]])
    ids = ids.masked_fill(~valid, 0)
    return torch.randn(4, 3, 32, 32, generator=maker), Text(ids, valid, torch.full_like(ids, IGNORE))


def hub(folder: Path) -> tuple[SiglipModel, dict[str, Any]]:
    vision = {**VISION, "hidden_size": 24}
    config = SiglipConfig(text_config={**TEXT, "pad_token_id": PAD}, vision_config=vision)
    theirs = SiglipModel(config)
    # Published temperatures are above CLIP's bound: exp(4.77) = 118.
    return theirs, saved(theirs, folder, scale=0.2, logit_scale=4.77, logit_bias=-13.0)


def expected(model: SiglipModel, images: Tensor, text: Text) -> tuple[Tensor, Tensor, Tensor]:
    """Texts are filled up to their full length, without a mask, as SigLIP's processor does."""
    ids = torch.full((len(text.ids), LONGEST), PAD)
    ids[:, :7] = torch.where(text.valid, text.ids, PAD)
    out = model(input_ids=ids, pixel_values=images)
    return out.image_embeds, out.text_embeds, out.logits_per_image


@torch.no_grad()
def test_siglip_of_the_hub(tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    ours = loaded(siglip_part(values, "config.json"), tmp_path / WEIGHTS)
    found, wanted = run(ours, *inputs()), expected(theirs, *inputs())
    assert float(wanted[2].std()) > 3
    assert close(found, wanted)
    probability = ours.contrast.probability(found[0][:, None], found[1])
    assert gap(probability, torch.sigmoid(wanted[2])) < 1e-4


def test_gradients_of_siglip(tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    ours = loaded(siglip_part(values, "config.json"), tmp_path / WEIGHTS)
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(8)) / 100
    mine = [
        "connector.queries",
        "connector.attention.key.weight",
        "contrast.logit_bias",
        "text.stack.blocks.0.mixer.key.weight",
    ]
    other = [
        "vision_model.head.probe",
        "vision_model.head.attention.in_proj_weight",
        "logit_bias",
        "text_model.encoder.layers.0.self_attn.k_proj.weight",
    ]
    found = torch.autograd.grad((run(ours, *inputs())[2] * weight).sum(), [ours.get_parameter(name) for name in mine])
    given = [theirs.get_parameter(name) for name in other]
    wanted = list(torch.autograd.grad((expected(theirs, *inputs())[2] * weight).sum(), given))
    wanted[1] = wanted[1][24:48]
    for a, b in zip(found, wanted, strict=True):
        assert float(b.abs().max()) > 1e-2
        assert gap(a, b.view_as(a)) < 1e-4


def test_siglip_goes_back_to_the_hub(tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    part = siglip_part(values, "config.json")
    loaded(part, tmp_path / WEIGHTS)
    original = read(tmp_path / WEIGHTS)
    assert same(written(part, tmp_path / WEIGHTS), original)
    again = SiglipModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(expected(again, *inputs())[2], expected(theirs, *inputs())[2])


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": {"hidden_act": "gelu"}},
        {"text_config": {"hidden_act": "gelu"}},
        {"vision_config": {"layer_norm_eps": 1e-2}},
        {"text_config": {"layer_norm_eps": 1e-2}},
        {"text_config": {"pad_token_id": 0}},
    ],
)
@torch.no_grad()
def test_changed_facts_of_siglip_are_noticed(change: dict[str, Any], tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    changed = {**values, **{name: {**values[name], **part} for name, part in change.items()}}
    ours = loaded(siglip_part(changed, "config.json"), tmp_path / WEIGHTS)
    assert gap(run(ours, *inputs())[2], expected(theirs, *inputs())[2]) > 1e-2


@torch.no_grad()
def test_another_pool_or_a_bound_temperature_is_noticed(tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    ours = loaded(siglip_part(values, "config.json"), tmp_path / WEIGHTS)
    wanted = expected(theirs, *inputs())[2]
    ours.contrast.limit = 100.0
    assert gap(run(ours, *inputs())[2], wanted) > 1e-2
    ours.connector = MeanPool(24)
    assert gap(run(ours, *inputs())[2], wanted) > 1e-2


@torch.no_grad()
def test_the_tokenizers_padding_may_be_given(tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    values["text_config"]["pad_token_id"] = 5
    ours = loaded(siglip_part(values, "config.json", pad=PAD), tmp_path / WEIGHTS)
    assert close(run(ours, *inputs())[1:2], expected(theirs, *inputs())[1:2])


def test_towers_that_cannot_be_compared_are_refused() -> None:
    values = {"vision_config": VISION, "text_config": TEXT}
    with pytest.raises(ValueError, match=r"config\.json: texts have 24 numbers and images 32: they cannot be compared"):
        siglip_part(values, "config.json")
