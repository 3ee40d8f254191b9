"""Image encoders of timm and open_clip: tokens, layer choice, freezing, and weights from files."""

import json
import os
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.model.vision import ImageEncoder, from_open_clip, open_clip_encoder, timm_encoder

SWIN = {"window_size": 7, "embed_dim": 12, "depths": (1, 1, 1), "num_heads": (1, 1, 2)}

TINY = "tiny-of-the-tests"


@pytest.fixture(scope="module", autouse=True)
def tiny_model_by_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One more name that open_clip knows, because its smallest own model has a large vocabulary."""
    text = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "image_size": 32}
    file = tmp_path_factory.mktemp("configs") / f"{TINY}.json"
    file.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)


def clip(vision: str = "vit") -> CLIP:
    settings = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    if vision == "resnet":
        settings = {"layers": (1, 1, 1, 1), "width": 8, "head_width": 8, "image_size": 64}
    text = CLIPTextCfg(context_length=8, vocab_size=40, width=16, heads=2, layers=1)
    return CLIP(24, CLIPVisionCfg(**settings), text)


def images(encoder: ImageEncoder, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *encoder.transform.size)


def hooked(module: nn.Module, encoder: ImageEncoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What a module inside gives while the encoder runs, and what the encoder gives."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    found = encoder(pixels)
    handle.remove()
    return kept[0], found


@pytest.mark.parametrize(
    ("name", "size", "args", "tokens", "dim"),
    [
        ("test_vit", None, None, 1 + 10 * 10, 64),
        ("test_vit", 64, None, 1 + 4 * 4, 64),
        ("test_convnext", None, None, 5 * 5, 64),
        ("resnet10t", 64, None, 2 * 2, 512),
        ("swin_tiny_patch4_window7_224", 56, SWIN, 4 * 4, 48),
    ],
)
@torch.no_grad()
def test_timm_sizes(name: str, size: int | None, args: dict[str, object] | None, tokens: int, dim: int) -> None:
    encoder = timm_encoder(name, image_size=size, args=args).eval()
    assert (encoder.tokens, encoder.dim) == (tokens, dim)
    pixels = images(encoder)
    rows = encoder(pixels)
    assert rows.shape == (2, tokens, dim)
    assert torch.allclose(encoder(pixels[1:]), rows[1:], atol=1e-5)


@torch.no_grad()
def test_grids_become_rows_top_left_first() -> None:
    convnet = timm_encoder("test_convnext", image_size=64).eval()
    grid = convnet.backbone.model.forward_features(pixels := images(convnet))  # B C H W
    torch.testing.assert_close(convnet(pixels)[:, 1], grid[:, :, 0, 1])
    swin = timm_encoder("swin_tiny_patch4_window7_224", image_size=56, args=SWIN).eval()
    grid = swin.backbone.model.forward_features(pixels := images(swin))  # B H W C
    torch.testing.assert_close(swin(pixels)[:, 5], grid[:, 1, 1])


@torch.no_grad()
def test_timm_layer_is_that_blocks_output() -> None:
    encoder = timm_encoder("test_vit", layer=-2).eval()
    block, found = hooked(encoder.backbone.model.blocks[-2], encoder, images(encoder))
    torch.testing.assert_close(found, block)
    dropped = timm_encoder("test_vit", layer=-2, class_token="drop").eval()
    dropped.load_state_dict(encoder.state_dict())
    block, found = hooked(dropped.backbone.model.blocks[-2], dropped, images(dropped))
    torch.testing.assert_close(found, block[:, 1:])
    assert dropped.tokens == encoder.tokens - 1


@torch.no_grad()
def test_timm_output_without_class_token() -> None:
    kept, dropped = (timm_encoder("test_vit", image_size=64, class_token=token).eval() for token in ("keep", "drop"))
    dropped.load_state_dict(kept.state_dict())
    pixels = images(kept)
    torch.testing.assert_close(dropped(pixels), kept(pixels)[:, 1:])
    assert dropped.tokens == kept.tokens - 1


@torch.no_grad()
def test_timm_layers_of_grids() -> None:
    encoder = timm_encoder("test_convnext", image_size=64, layer=-2).eval()
    stage, found = hooked(encoder.backbone.model.stages[-2], encoder, images(encoder))
    torch.testing.assert_close(found, stage.flatten(2).transpose(1, 2))
    assert (encoder.tokens, encoder.dim) == (found.shape[1], found.shape[2])


@torch.no_grad()
def test_open_clip_vit() -> None:
    model = clip()
    encoder = from_open_clip(model).eval()
    assert (encoder.tokens, encoder.dim, encoder.transform.size) == (17, 32, (32, 32))
    pixels = images(encoder)
    rows = encoder(pixels)
    torch.testing.assert_close(rows[:, 0] @ model.visual.proj, model.encode_image(pixels), atol=1e-5, rtol=1e-5)
    dropped = from_open_clip(model, class_token="drop").eval()
    assert dropped.tokens == 16
    torch.testing.assert_close(dropped(pixels), rows[:, 1:])


@torch.no_grad()
def test_open_clip_layer_is_that_blocks_output() -> None:
    encoder = from_open_clip(clip(), layer=-2).eval()
    block, found = hooked(encoder.backbone.visual.transformer.resblocks[-2], encoder, images(encoder))
    torch.testing.assert_close(found, block.transpose(0, 1))  # blocks run on N B C
    last, _ = hooked(encoder.backbone.visual.transformer.resblocks[1], encoder, images(encoder))
    assert last.transpose(0, 1).shape == found.shape


@torch.no_grad()
def test_the_order_of_axes_inside_changes_nothing() -> None:
    given, model = clip().eval(), clip().eval()
    given.load_state_dict(model.state_dict())
    encoder = from_open_clip(model, layer=-2).eval()
    assert given.visual.transformer.batch_first and not model.visual.transformer.batch_first
    pixels, blocks = images(encoder), list[Tensor]()
    given.visual.transformer.resblocks[-2].register_forward_hook(lambda _module, _inputs, output: blocks.append(output))
    given.visual(pixels)
    torch.testing.assert_close(encoder(pixels), blocks[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_open_clip_resnet() -> None:
    model = clip("resnet")
    encoder, earlier = from_open_clip(model).eval(), from_open_clip(model, layer=-2).eval()
    assert (encoder.tokens, encoder.dim) == (4, 8 * 32)
    assert (earlier.tokens, earlier.dim) == (16, 8 * 16)
    pixels = images(encoder)
    stage, found = hooked(model.visual.layer4, encoder, pixels)
    torch.testing.assert_close(found, stage.flatten(2).transpose(1, 2))
    stage, found = hooked(model.visual.layer3, earlier, pixels)
    torch.testing.assert_close(found, stage.flatten(2).transpose(1, 2))


def test_open_clip_by_name_and_with_a_timm_trunk() -> None:
    encoder = open_clip_encoder("ViT-S-32-alt", image_size=64)
    assert (encoder.tokens, encoder.dim, encoder.transform.size) == (5, 384, (64, 64))
    assert encoder.transform.mean == open_clip.OPENAI_DATASET_MEAN
    text = CLIPTextCfg(context_length=8, vocab_size=40, width=16, heads=2, layers=1)
    trunk = CLIP(24, CLIPVisionCfg(timm_model_name="test_vit", image_size=64), text)
    assert (from_open_clip(trunk).tokens, from_open_clip(trunk).dim) == (17, 64)


def test_frozen_stays_in_evaluation_mode_without_gradient() -> None:
    encoder = timm_encoder("test_efficientnet", image_size=64, frozen=True)
    around = nn.Sequential(encoder, nn.Dropout()).train()
    assert around[1].training
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert not encoder(images(encoder).requires_grad_()).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())  # batch norm too


def test_trained_follows_its_model() -> None:
    encoder = timm_encoder("test_vit", image_size=32)
    assert encoder.train().backbone.training and not encoder.eval().backbone.training
    pixels = images(encoder)
    encoder(pixels).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_frozen_computes_in_its_own_dtype() -> None:
    plain = timm_encoder("test_vit", image_size=32, frozen=True)
    low = timm_encoder("test_vit", image_size=32, frozen=True, dtype=torch.bfloat16)
    low.load_state_dict(plain.state_dict())
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    pixels = images(plain)
    rows = low(pixels)
    assert rows.dtype == torch.float32
    block, _ = hooked(low.backbone.model.blocks[0], low, pixels)
    assert block.dtype == torch.bfloat16
    assert 0 < float((rows - plain(pixels)).abs().max()) < 0.2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low(pixels), rows)
    with pytest.raises(ValueError, match=r"model\.vision\.dtype is for frozen encoders"):
        timm_encoder("test_vit", dtype=torch.bfloat16)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    model, file = timm.create_model("test_vit", num_classes=7), tmp_path / f"weights{suffix}"
    weights = model.state_dict()
    assert "head.weight" in weights
    save_file(weights, file) if suffix == ".safetensors" else torch.save({"state_dict": weights}, file)
    encoder = timm_encoder("test_vit", str(file))
    assert all(torch.equal(value, weights[name]) for name, value in encoder.backbone.model.state_dict().items())


def test_norms_that_stand_in_the_head_are_kept(tmp_path: Path) -> None:
    model, file = timm.create_model("test_convnext", num_classes=7), tmp_path / "weights.pth"
    nn.init.normal_(model.head.norm.weight)
    torch.save(model.state_dict(), file)
    encoder = timm_encoder("test_convnext", str(file))
    assert torch.equal(encoder.backbone.model.head.norm.weight, model.head.norm.weight)


def test_a_file_that_does_not_fit_is_refused_with_its_differences(tmp_path: Path) -> None:
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    weights["extra.weight"] = torch.zeros(2, 3)
    del weights["norm.bias"]
    weights["cls_token"] = torch.zeros(1, 1, 5)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not fit") as error:
        timm_encoder("test_vit", str(tmp_path / "weights.pth"))
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "missing: norm.bias 64",
        "not in the model: extra.weight 2x3",
        "other shape: cls_token is 1x1x5, the model's is 1x1x64",
    ]


class Malicious:
    """Would make a folder when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", [timm_encoder, open_clip_encoder])
def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path: Path, kind: object) -> None:
    assert callable(kind)
    marker, file = tmp_path / "marker", tmp_path / "weights.pth"
    torch.save({"state_dict": Malicious(marker)}, file)
    name = "test_vit" if kind is timm_encoder else TINY
    with pytest.raises(ValueError, match=r"weights\.pth: refused"):
        kind(name, str(file))
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # so the file would have done it


def test_open_clip_weights_from_a_file(tmp_path: Path) -> None:
    model = open_clip.create_model(TINY)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    encoder = open_clip_encoder(TINY, str(tmp_path / "clip.pt"), frozen=True)
    loaded = encoder.backbone.visual.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.visual.state_dict().items())
    weights = model.state_dict()
    del weights["visual.ln_post.weight"]
    torch.save(weights, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"less\.pt does not fit.*[\s\S]*visual\.ln_post\.weight"):
        open_clip_encoder(TINY, str(tmp_path / "less.pt"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: timm_encoder("vit_tinny_patch16_224"), r"timm has no model 'vit_tinny.*near: .*vit_tiny_patch16_224"),
        (lambda: timm_encoder("zzz"), "near: none"),
        (lambda: timm_encoder("resnet10t", "imagenet"), r"model\.vision\.weights: 'imagenet' is neither.*c3_in1k"),
        (lambda: timm_encoder("test_vit", "no/such/file.pth"), r"'no/such/file\.pth' is neither a file"),
        (lambda: open_clip_encoder("ViT-B-33"), r"open_clip has no model 'ViT-B-33'; near: .*ViT-B-32"),
        (lambda: open_clip_encoder("ViT-B-32", "laion"), r"'laion' is neither a file nor.*openai"),
    ],
)
def test_wrong_names_are_named_with_their_remedy(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("kind", "name"), [(timm_encoder, "test_vit"), (timm_encoder, "resnet10t"), (open_clip_encoder, TINY)]
)
def test_builds_on_the_meta_device(kind: object, name: str) -> None:
    assert callable(kind)
    real = kind(name, image_size=64)
    with torch.device("meta"):
        shell = kind(name, image_size=64)
    assert all(parameter.is_meta for parameter in shell.parameters())
    assert (shell.tokens, shell.dim, shell.transform) == (real.tokens, real.dim, real.transform)
