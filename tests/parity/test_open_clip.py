"""open_clip's published folders give open_clip's numbers: its own ViT, towers of timm's, SigLIP's form."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.noise import gap, noise
from tests.parity.published import loaded, same, written
from tests.parity.test_clip import LONGEST, VOCABULARY, close, inputs, run
from vlm.data.batch import Text
from vlm.model.published.open_clip import open_clip_part
from vlm.model.weights.files import differences, read

FILE = "open_clip_model.safetensors"
VIT = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32, "mlp_ratio": 1.7}
TEXT = {"context_length": LONGEST, "vocab_size": VOCABULARY, "width": 24, "heads": 3, "layers": 3, "mlp_ratio": 3.1}
BOTH_WAYS = {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
TIMM = {"timm_model_name": "test_vit", "image_size": 160}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "quick": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "apart": {"embed_dim": 16, "custom_text": True, "vision_cfg": VIT, "text_cfg": {**TEXT, "proj_bias": True}},
    "timm": {"embed_dim": 16, "vision_cfg": {**TIMM, "timm_pool": "token", "timm_proj": None}, "text_cfg": TEXT},
    "siglip": {
        "embed_dim": 64,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {**TIMM, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {**TEXT, **BOTH_WAYS},
    },
}


def hub(name: str, folder: Path) -> tuple[Any, dict[str, Any], Path]:
    """The model, its config as read from disk, its weights."""
    config = json.loads(json.dumps(CONFIGS[name]))
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    theirs = kind(**{key: value for key, value in config.items() if key != "custom_text"}).eval()
    noise(theirs, scale=0.2)
    theirs.logit_scale.data.fill_(4.0)
    theirs.visual.image_mean, theirs.visual.image_std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)
    theirs.visual.preprocess_cfg = {"interpolation": "bilinear", "resize_mode": "squash"}
    save_config_for_hf(theirs, folder / "open_clip_config.json", CONFIGS[name])
    save_file(theirs.state_dict(), folder / FILE)
    return theirs, json.loads((folder / "open_clip_config.json").read_text()), folder / FILE


def given(name: str) -> tuple[Tensor, Text]:
    images, text = inputs()
    size = CONFIGS[name]["vision_cfg"]["image_size"]
    return torch.nn.functional.interpolate(images, (size, size)), text


def expected(model: Any, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    image, text = model(images, ids)[:2]
    return image, text, model.get_logits(images, ids)[0]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_features_and_logits(name: str, tmp_path: Path) -> None:
    theirs, config, file = hub(name, tmp_path)
    ours = loaded(open_clip_part(config, "open_clip_config.json"), file)
    images, text = given(name)
    wanted = expected(theirs, images, text.ids)
    assert float(wanted[2].std()) > 0.3
    assert close(run(ours, images, text), wanted)
    transform = ours.vision.transform
    assert (transform.mean, transform.std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.25))
    assert (transform.size[0], transform.resize, transform.interpolation) == (images.shape[2], "squash", "bilinear")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_way_back(name: str, tmp_path: Path) -> None:
    theirs, config, file = hub(name, tmp_path)
    part = open_clip_part(config, "open_clip_config.json")
    loaded(part, file)
    assert same(written(part, tmp_path / "back.safetensors"), theirs.state_dict())
    images, text = given(name)
    wanted = expected(theirs, images, text.ids)[2]
    noise(theirs, seed=5)
    assert not torch.equal(expected(theirs, images, text.ids)[2], wanted)
    theirs.load_state_dict(read(tmp_path / "back.safetensors"))
    assert torch.equal(expected(theirs, images, text.ids)[2], wanted)


@pytest.mark.parametrize("name", ["apart", "siglip"])
def test_gradients(name: str, tmp_path: Path) -> None:
    theirs, config, file = hub(name, tmp_path)
    ours = loaded(open_clip_part(config, "open_clip_config.json"), file)
    images, text = given(name)
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(8))
    mine = [ours.text.embedding.weight, ours.contrast.text.weight, ours.contrast.log_scale]
    other = [theirs.text.token_embedding.weight, theirs.text.text_projection.weight, theirs.logit_scale]
    if name == "siglip":
        mine += [ours.connector.queries, ours.contrast.logit_bias]
        other += [theirs.visual.trunk.attn_pool.latent, theirs.logit_bias]
    found = torch.autograd.grad((run(ours, images, text)[2] * weight).sum(), mine)
    wanted = torch.autograd.grad((expected(theirs, images, text.ids)[2] * weight).sum(), other)
    for a, b in zip(found, wanted, strict=True):
        assert float(b.abs().max()) > 1e-2
        assert gap(a, b.view_as(a)) < 1e-4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("plain", {"quick_gelu": True}),
        ("plain", {"vision_cfg": {"norm_kwargs": {"eps": 1e-2}}}),
        ("plain", {"vision_cfg": {"head_width": 16}}),
        ("siglip", {"text_cfg": {"act_kwargs": None}}),
        ("siglip", {"text_cfg": {"pad_id": 3}}),
        ("siglip", {"text_cfg": {"no_causal_mask": False, "pool_type": "eos"}}),
    ],
)
@torch.no_grad()
def test_changed_facts_are_noticed(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    theirs, config, file = hub(name, tmp_path)
    for key, value in change.items():
        model = config["model_cfg"]
        model[key] = {**model[key], **value} if isinstance(value, dict) else value
    ours = loaded(open_clip_part(config, "open_clip_config.json"), file)
    images, text = given(name)
    assert gap(run(ours, images, text)[2], expected(theirs, images, text.ids)[2]) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_cfg": {"hf_model_name": "xlm-roberta-base"}}, r"text_cfg: .*does not have: hf_model_name='xlm-roberta"),
        ({"vision_cfg": {**VIT, "layers": [3, 4, 6, 3]}}, r"vision_cfg: layers=\[3, 4, 6, 3\]: a ResNet"),
        ({"vision_cfg": {**VIT, "attentional_pool": True}}, r"vision_cfg: .*attentional_pool=True"),
        ({"vision_cfg": {**VIT, "wings": 2}}, r"vision_cfg: no settings of open_clip's: wings"),
        ({"wings": 2}, r"model_cfg: no settings of open_clip's: wings"),
        ({"vision_cfg": {**TIMM, "timm_pool": "avg"}}, r"vision_cfg: .*timm_pool='avg'"),
        (
            {"vision_cfg": {"timm_model_name": "vitt", "timm_pool": "map", "timm_proj": "none"}},
            r"no architecture 'vitt'; near:",
        ),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], message: str) -> None:
    config = {"model_cfg": {**CONFIGS["plain"], **change}}
    with pytest.raises(ValueError, match=f"open_clip_config.json: .*{message}"):
        open_clip_part(config, "open_clip_config.json")


@pytest.mark.parametrize("name", ["timm", "siglip"])
@torch.no_grad()
def test_built_without_memory_it_is_the_same(name: str, tmp_path: Path) -> None:
    theirs, config, file = hub(name, tmp_path)
    with torch.device("meta"):
        part = open_clip_part(config, "open_clip_config.json")
    images, text = given(name)
    assert close(run(loaded(part, file), images, text), expected(theirs, images, text.ids))


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16-SigLIP"])
def test_real_sizes_fit_tensor_by_tensor(name: str) -> None:
    """On the meta device: all that open_clip itself would load is read, and all of ours comes from it."""
    config = open_clip.get_model_config(name)
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    with torch.device("meta"):
        part = open_clip_part({"model_cfg": config}, "open_clip_config.json")
        theirs = kind(**{key: value for key, value in config.items() if key != "custom_text"}).state_dict()
    ours = part.module.state_dict()
    assert differences(ours, part.table.to_ours(theirs)) == []
    assert differences(theirs, part.table.to_theirs(ours)) == []
