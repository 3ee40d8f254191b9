"""CLIP and SigLIP from published files are the original libraries': features, logits, gradients, and the way back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tests.parity.noise import gap, noise
from tests.parity.published import loaded, same, saved, written
from vlm.data.batch import Text
from vlm.model.connector import MeanPool
from vlm.model.published.clip import clip_part, openai_clip_part
from vlm.model.published.part import Part
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import read
from vlm.nn.tokens import IGNORE

VOCABULARY, LONGEST, WEIGHTS = 70, 10, "model.safetensors"
END, PAD = VOCABULARY - 1, 0

VISION = {
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": LONGEST,
    "eos_token_id": END,
}


def inputs(pad: int = PAD) -> tuple[Tensor, Text]:
    """Pictures, and texts of different length that end with the largest id."""
    maker = torch.Generator().manual_seed(3)
    ids = torch.full((5, LONGEST), pad)
    valid = torch.zeros(5, LONGEST, dtype=torch.bool)
    for row, length in enumerate((4, LONGEST, 2, 7, 5)):
        ids[row, : length - 1] = torch.randint(2, END, (length - 1,), generator=maker)
        ids[row, length - 1] = END
        valid[row, :length] = True
    return torch.randn(4, 3, 32, 32, generator=maker), Text(ids, valid, torch.full_like(ids, IGNORE))


def run(model: VisionLanguageModel, images: Tensor, text: Text) -> tuple[Tensor, Tensor, Tensor]:
    """Image features, text features, logits."""
    assert model.contrast is not None
    image, words = model.embed_image(model.see(images)), model.embed_text(text)
    return image[:, 0], words, model.contrast(image, words)


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    assert all(ours.shape == theirs.shape for ours, theirs in zip(found, wanted, strict=True))
    return all(gap(ours, theirs) < 1e-4 for ours, theirs in zip(found, wanted, strict=True))


def hub(folder: Path, act: str = "quick_gelu", **text: Any) -> tuple[CLIPModel, dict[str, Any]]:
    config = CLIPConfig(
        text_config={**TEXT, "hidden_act": act, **text},
        vision_config={**VISION, "hidden_act": act},
        projection_dim=16,
    )
    theirs = CLIPModel(config)
    return theirs, saved(theirs, folder, scale=0.2, logit_scale=2.3)


def expected(model: CLIPModel, images: Tensor, text: Text) -> tuple[Tensor, Tensor, Tensor]:
    out = model(input_ids=text.ids, pixel_values=images, attention_mask=text.valid.long())
    return out.image_embeds, out.text_embeds, out.logits_per_image


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [END, 2])
@torch.no_grad()
def test_clip_of_the_hub(act: str, end: int, tmp_path: Path) -> None:
    theirs, values = hub(tmp_path, act, eos_token_id=end)
    assert values["text_config"]["eos_token_id"] == end
    ours = loaded(clip_part(values, "config.json"), tmp_path / WEIGHTS)
    wanted = expected(theirs, *inputs())
    assert float(wanted[2].std()) > 0.3
    assert close(run(ours, *inputs()), wanted)


@torch.no_grad()
def test_the_padding_may_be_the_end_itself(tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    ours = loaded(clip_part(values, "config.json"), tmp_path / WEIGHTS)
    assert close(run(ours, *inputs(pad=END)), expected(theirs, *inputs(pad=END)))


def test_gradients_of_clip(tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    ours = loaded(clip_part(values, "config.json"), tmp_path / WEIGHTS)
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(8))
    mine = [
        ours.get_parameter("text.stack.blocks.1.mixer.value.weight"),
        ours.get_parameter("contrast.image.weight"),
        ours.get_parameter("vision.backbone.visual.conv1.weight"),
        ours.get_parameter("contrast.log_scale"),
    ]
    other = [
        theirs.get_parameter("text_model.encoder.layers.1.self_attn.v_proj.weight"),
        theirs.get_parameter("visual_projection.weight"),
        theirs.get_parameter("vision_model.embeddings.patch_embedding.weight"),
        theirs.get_parameter("logit_scale"),
    ]
    found = torch.autograd.grad((run(ours, *inputs())[2] * weight).sum(), mine)
    wanted = torch.autograd.grad((expected(theirs, *inputs())[2] * weight).sum(), other)
    for a, b in zip(found, wanted, strict=True):
        assert float(b.abs().max()) > 1e-2
        assert gap(a, b.view_as(a)) < 1e-4


def test_clip_goes_back_to_the_hub(tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    part = clip_part(values, "config.json")
    loaded(part, tmp_path / WEIGHTS)
    original = read(tmp_path / WEIGHTS)
    assert same(written(part, tmp_path / WEIGHTS), original)
    again = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(expected(again, *inputs())[2], expected(theirs, *inputs())[2])


@pytest.mark.parametrize("tower", ["vision", "text"])
@torch.no_grad()
def test_old_files_give_a_tower_twice_and_the_second_counts(tower: str, tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    doubled = {**values, f"{tower}_config_dict": values[f"{tower}_config"], f"{tower}_config": {"hidden_size": 8}}
    ours = loaded(clip_part(doubled, "config.json"), tmp_path / WEIGHTS)
    assert close(run(ours, *inputs()), expected(theirs, *inputs()))


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": {"hidden_act": "gelu"}},
        {"text_config": {"hidden_act": "gelu"}},
        {"vision_config": {"layer_norm_eps": 1e-2}},
        {"text_config": {"layer_norm_eps": 1e-2}},
        {"vision_config": {"num_attention_heads": 2}},
    ],
)
@torch.no_grad()
def test_changed_facts_of_clip_are_noticed(change: dict[str, Any], tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    changed = {**values, **{name: {**values[name], **part} for name, part in change.items()}}
    ours = loaded(clip_part(changed, "config.json"), tmp_path / WEIGHTS)
    assert gap(run(ours, *inputs())[2], expected(theirs, *inputs())[2]) > 1e-3


@torch.no_grad()
def test_another_place_of_the_feature_is_noticed(tmp_path: Path) -> None:
    theirs, values = hub(tmp_path)
    ours = loaded(clip_part(values, "config.json"), tmp_path / WEIGHTS)
    images, text = inputs()
    wanted = expected(theirs, images, text)[2]
    cut = Text(text.ids, text.valid & (torch.arange(LONGEST) < 4), text.labels)
    assert gap(run(ours, images, cut)[2], wanted) > 1e-3
    ours.connector = MeanPool(32)
    assert gap(run(ours, images, text)[2], wanted) > 1e-3


def test_settings_that_clip_lacks_are_refused(tmp_path: Path) -> None:
    values = {"vision_config": {**VISION, "hidden_act": "relu"}, "text_config": TEXT}
    with pytest.raises(ValueError, match=r"config\.json: vision_config: .*hidden_act='relu' \(known: 'quick_gelu'"):
        clip_part(values, "config.json")


def openai(folder: Path) -> tuple[CLIP, Part, Path]:
    """A state dict with OpenAI's names; heads are 64 wide in all their models."""
    vision = CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=LONGEST, vocab_size=VOCABULARY, width=128, heads=2, layers=3)
    theirs = CLIP(16, vision, text, quick_gelu=True).eval()
    noise(theirs, scale=0.1)
    theirs.logit_scale.data.fill_(2.3)
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(LONGEST)}
    file = folder / "ViT-B-32.pt"
    torch.save({**theirs.state_dict(), **numbers}, file)
    part = openai_clip_part({name: tuple(value.shape) for name, value in read(file).items()}, str(file))
    return theirs, part, file


@torch.no_grad()
def test_openai_names(tmp_path: Path) -> None:
    theirs, part, file = openai(tmp_path)
    images, text = inputs()
    wanted = theirs(images, text.ids)[:2]
    ours = loaded(part, file)
    found = run(ours, images, text)
    assert close(found[:2], wanted)
    assert gap(found[2], theirs.get_logits(images, text.ids)[0]) < 1e-4
    assert same(part.table.to_theirs(part.module.state_dict()), theirs.state_dict())


def test_openai_refusals(tmp_path: Path) -> None:
    _, _, file = openai(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in read(file).items()}
    with pytest.raises(ValueError, match=r"ViT\.pt: no CLIP of OpenAI's: it has no text_projection$"):
        openai_clip_part({name: shape for name, shape in shapes.items() if name != "text_projection"}, "ViT.pt")
    with pytest.raises(ValueError, match=r"RN50\.pt: a CLIP with a ResNet; .*model\.vision\.kind=open_clip"):
        openai_clip_part({**shapes, "visual.layer1.0.conv1.weight": (64, 64, 1, 1)}, "RN50.pt")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_program_is_refused_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt: refused, .* a TorchScript archive, .*safetensors"):
        read(file)
