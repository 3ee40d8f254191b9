"""Vision Transformers from published files are the original libraries': outputs, gradients, and the way back."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from timm.models.eva import Eva
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel, ViTConfig, ViTForImageClassification, ViTModel

from tests.parity.noise import gap, noise
from tests.parity.published import loaded, same, saved, written
from vlm.data.image import ImageTransform
from vlm.model.published.vit import blip2_vit, timm_part, vit_part
from vlm.model.weights.files import read

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 53,  # 4.3637 times the width is no whole number in BLIP-2 either
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
WEIGHTS = "model.safetensors"


def pictures(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def without_norm(model: Blip2VisionModel, pixels: Tensor) -> Tensor:
    """What the Q-Former's norm receives, which is a part of the Q-Former here."""
    kept: list[Tensor] = []
    handle = model.post_layernorm.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    model(pixels)
    handle.remove()
    return kept[0]


def blip2(folder: Path) -> tuple[Blip2VisionModel, dict[str, Any], Path]:
    theirs = Blip2VisionModel(Blip2VisionConfig(**SIZES))
    config = saved(theirs, folder)
    weights = read(folder / WEIGHTS)
    norm = {name: weights.pop(name) for name in list(weights) if name.startswith("post_layernorm.")}
    assert len(norm) == 2
    save_file(weights, folder / "tower.safetensors")
    return theirs, config, folder / "tower.safetensors"


def test_blip2_tower_and_gradients(tmp_path: Path) -> None:
    theirs, config, file = blip2(tmp_path)
    ours = loaded(blip2_vit(config, "config.json"), file)
    pixels = pictures()
    found, wanted = ours(pixels), without_norm(theirs, pixels)
    assert found.shape == (3, 17, 24) and float(wanted.detach().std()) > 0.3
    assert gap(found, wanted) < 1e-4
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad((found * weight).sum(), ours.get_parameter("backbone.model.blocks.1.attn.qkv.weight"))
    other = torch.autograd.grad((wanted * weight).sum(), theirs.encoder.layers[1].self_attn.qkv.weight)
    assert float(other[0].abs().max()) > 1e-2
    assert gap(mine[0], other[0]) < 1e-4


def test_blip2_tower_round_trip(tmp_path: Path) -> None:
    _, config, file = blip2(tmp_path)
    part = blip2_vit(config, "config.json")
    loaded(part, file)
    assert same(written(part, tmp_path / "back.safetensors"), read(file))


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-2}, {"num_attention_heads": 2}])
@torch.no_grad()
def test_changed_facts_of_blip2_are_noticed(change: dict[str, Any], tmp_path: Path) -> None:
    theirs, config, file = blip2(tmp_path)
    ours = loaded(blip2_vit({**config, **change}, "config.json"), file)
    assert gap(ours(pictures()), without_norm(theirs, pictures())) > 1e-3


def eva() -> Eva:
    """EVA-CLIP's ViT-g as timm has it, one block more than BLIP-2 uses, with a norm and a head that it leaves out."""
    model = Eva(
        img_size=32,
        patch_size=8,
        num_classes=7,
        embed_dim=24,
        depth=4,
        num_heads=4,
        mlp_ratio=53.5 / 24,
        use_rot_pos_emb=False,
        global_pool="token",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()
    noise(model)
    return model


@torch.no_grad()
def test_lavis_layout_is_the_same_tower(tmp_path: Path) -> None:
    theirs, file = eva(), tmp_path / "eva_vit_g.pth"
    torch.save(theirs.state_dict(), file)
    assert "blocks.0.attn.q_bias" in theirs.state_dict()
    part = blip2_vit(SIZES, "eva_vit_g.pth", "lavis")
    found = loaded(part, file)(pictures())
    options = {"output_fmt": "NLC", "intermediates_only": True, "return_prefix_tokens": True}
    [(patches, class_token)] = theirs.forward_intermediates(pictures(), indices=[2], norm=False, **options)
    assert gap(found, torch.cat([class_token, patches], 1)) < 1e-4
    used = {name: value for name, value in theirs.state_dict().items() if name.split(".")[:2] != ["blocks", "3"]}
    left_out = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    assert same(part.table.to_theirs(part.module.state_dict()), {k: v for k, v in used.items() if k not in left_out})


@torch.no_grad()
def test_a_bias_of_the_key_changes_nothing() -> None:
    """Why it may be dropped on the way back to files that have none."""
    ours = blip2_vit(SIZES, "config.json").module.eval()
    noise(ours)
    before = ours(pictures())
    ours.get_parameter("backbone.model.blocks.1.attn.qkv.bias")[24:48] += 3
    assert gap(ours(pictures()), before) < 1e-5


@pytest.mark.parametrize("change", [{"qkv_bias": False}, {"hidden_act": "relu"}])
def test_other_towers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"config.json: settings that vlm does not have: {next(iter(change))}="):
        blip2_vit({**SIZES, **change}, "config.json")


@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
def test_plain_vit_and_gradients(kind: type[Any], tmp_path: Path) -> None:
    theirs = kind(ViTConfig(**SIZES))
    config = saved(theirs, tmp_path)
    part = vit_part(config, "config.json")
    found = loaded(part, tmp_path / WEIGHTS)(pictures())
    body = theirs.vit if kind is ViTForImageClassification else theirs
    wanted = body(pictures()).last_hidden_state
    assert gap(found, wanted) < 1e-4
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad((found * weight).sum(), part.module.get_parameter("backbone.model.pos_embed"))
    other = torch.autograd.grad((wanted * weight).sum(), body.embeddings.position_embeddings)
    assert float(other[0].abs().max()) > 1e-2
    assert gap(mine[0], other[0]) < 1e-4


@torch.no_grad()
def test_plain_vit_goes_back(tmp_path: Path) -> None:
    theirs = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)
    part = vit_part(saved(theirs, tmp_path), "config.json")
    loaded(part, tmp_path / WEIGHTS)
    original = read(tmp_path / WEIGHTS)
    assert same(written(part, tmp_path / WEIGHTS), original)
    again = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert torch.equal(again(pictures()).last_hidden_state, theirs(pictures()).last_hidden_state)


@torch.no_grad()
def test_changed_facts_of_plain_vit_are_noticed(tmp_path: Path) -> None:
    theirs = ViTModel(ViTConfig(**SIZES))
    config = {**saved(theirs, tmp_path), "layer_norm_eps": 1e-2}
    ours = loaded(vit_part(config, "config.json"), tmp_path / WEIGHTS)
    assert gap(ours(pictures()), theirs(pictures()).last_hidden_state) > 1e-3


ARGS: dict[str, dict[str, Any]] = {
    "eva02_base_patch16_clip_224": {"img_size": 48, "depth": 2, "embed_dim": 48, "num_heads": 4},
    "eva_giant_patch14_clip_224": {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4},
    "vit_base_patch16_siglip_224": {"img_size": 48, "depth": 2, "embed_dim": 48, "num_heads": 4},
    "test_convnext": {},
}


def folder_of_timm(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    model = timm.create_model(name, **ARGS[name]).eval()
    noise(model)
    save_for_hf(model, str(folder), model_args=ARGS[name], safe_serialization=True)
    return model, json.loads((folder / "config.json").read_text())


def rows(features: Tensor) -> Tensor:
    return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", ARGS)
@torch.no_grad()
def test_folders_of_timm(name: str, tmp_path: Path) -> None:
    theirs, config = folder_of_timm(name, tmp_path)
    file, part = tmp_path / WEIGHTS, timm_part(config, "config.json")
    pixels = pictures(ARGS[name].get("img_size", 64))
    assert gap(loaded(part, file)(pixels), rows(theirs.forward_features(pixels))) < 1e-4
    classifier = f"{theirs.pretrained_cfg['classifier']}."
    body = {key: value for key, value in read(file).items() if not key.startswith(classifier)}
    assert same(written(part, tmp_path / "back.safetensors"), body)
    picture = Image.effect_noise((70, 50), 80).convert("RGB")
    wanted = create_transform(**resolve_data_config(pretrained_cfg=config["pretrained_cfg"]), is_training=False)
    transform = part.module.transform
    assert isinstance(transform, ImageTransform)
    assert gap(transform(picture), wanted(picture)) < 2.1 / 255 / min(transform.std)


@pytest.mark.parametrize("name", ["eva02_base_patch16_clip_224", "vit_base_patch16_siglip_224"])
@torch.no_grad()
def test_built_without_memory_it_is_the_same(name: str, tmp_path: Path) -> None:
    theirs, config = folder_of_timm(name, tmp_path)
    with torch.device("meta"):
        part = timm_part(config, "config.json")
    ours = loaded(part, tmp_path / WEIGHTS)
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    assert gap(ours(pictures(48)), theirs.forward_features(pictures(48))) < 1e-4


def test_folders_that_timm_cannot_build_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"config\.json: this timm \(.*\) has no architecture 'test_vitt'; near: test_vit"
    ):
        timm_part({"architecture": "test_vitt", "pretrained_cfg": {}}, "config.json")
    with pytest.raises(ValueError, match=r"config\.json: timm's test_vit does not take what model_args says .*'wings'"):
        timm_part({"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"wings": 2}}, "config.json")
