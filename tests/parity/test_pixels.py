"""Image transforms read from preprocessor_config.json give the pixels of transformers' processors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vlm.data.image import ImageTransform
from vlm.model.published.pixels import image_transform

SIZES = [(97, 64), (64, 97), (101, 101), (31, 47), (250, 33)]
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (CLIPImageProcessorPil, {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}),
    (CLIPImageProcessorPil, {"size": {"shortest_edge": 45}, "crop_size": {"height": 37, "width": 37}, "resample": 2}),
    (SiglipImageProcessorPil, {"size": {"height": 40, "width": 56}}),
    (BlipImageProcessorPil, {"size": {"height": 48, "width": 48}}),
    (ViTImageProcessorPil, {"size": {"height": 41, "width": 41}}),
    (LlavaImageProcessorPil, {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}, "do_pad": True}),
    (
        CLIPImageProcessorPil,
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}, "do_normalize": False},
    ),
]


def photo(width: int, height: int) -> Image.Image:
    """Soft shapes with sharp edges and some noise, as photographs have them."""
    random = np.random.default_rng(width * 1000 + height)
    across, down = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 3, height))
    waves = [127 + 120 * np.sin(across * (i + 1) + down * (2 - i)) for i in range(3)]
    pixels = np.stack(waves, -1) + random.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 90)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def read(processor: Any, folder: Path) -> dict[str, Any]:
    processor.save_pretrained(folder)
    values: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text())
    return values


def levels(transform: ImageTransform, processor: Any, picture: Image.Image) -> Tensor:
    """Differences in levels of 255.

    Where proportions change, PIL is made to resize rows first, as it did before Pillow 13 whatever the proportions.
    """
    given = picture
    if transform.resize == "squash":
        given = picture.resize((transform.size[1], picture.height), processor.resample)
    wanted = torch.as_tensor(np.array(processor(given, return_tensors="np")["pixel_values"][0]))
    found = transform(picture)
    assert found.shape == wanted.shape
    return (found - wanted).abs() * torch.tensor(transform.std).view(3, 1, 1) * 255


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_pixels_are_those_of_the_processor(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    processor = kind(**settings)
    transform = image_transform(read(processor, tmp_path), "preprocessor_config.json")
    off = torch.cat([levels(transform, processor, photo(*size)).flatten() for size in SIZES])
    assert float(off.max()) < 1.01  # rounding: PIL's filter works in other whole numbers than torch's
    assert float((off > 0.01).float().mean()) < 0.01


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorFast"])
def test_processors_on_torchvision_give_the_same(name: str, tmp_path: Path) -> None:
    processor = CLIPImageProcessor(**KINDS[0][1])
    values = {**read(processor, tmp_path), "image_processor_type": name}
    transform = image_transform(values, "preprocessor_config.json")
    assert all(float(levels(transform, processor, photo(*size)).max()) < 1.01 for size in SIZES)


def test_another_cut_of_the_middle_is_noticed(tmp_path: Path) -> None:
    processor = CLIPImageProcessorPil(**KINDS[0][1])
    transform = image_transform(read(processor, tmp_path), "preprocessor_config.json")
    rounded = ImageTransform(**{**transform.__dict__, "floored": False})
    assert float(levels(transform, processor, photo(64, 95)).max()) < 1.01  # 59 rows, of which 40 are kept
    assert float(levels(rounded, processor, photo(64, 95)).max()) > 5


@pytest.mark.parametrize(
    "change",
    [{"resize": "squash"}, {"interpolation": "bilinear"}, {"crop_fraction": 0.9}, {"mean": (0.5, 0.5, 0.5)}],
)
def test_changed_facts_are_noticed(change: dict[str, Any], tmp_path: Path) -> None:
    processor = CLIPImageProcessorPil(**KINDS[0][1])
    transform = image_transform(read(processor, tmp_path), "preprocessor_config.json")
    changed = ImageTransform(**{**transform.__dict__, **change})
    assert float(levels(changed, processor, photo(97, 64)).max()) > 5


def test_padding_after_resizing_is_not_llavas(tmp_path: Path) -> None:
    processor = LlavaImageProcessorPil(**KINDS[5][1])
    transform = image_transform(read(processor, tmp_path), "preprocessor_config.json")
    assert (transform.resize, transform.fill) == ("padded", (122, 116, 104))
    after = ImageTransform(**{**transform.__dict__, "resize": "longest"})
    assert float(levels(after, processor, photo(97, 64)).max()) > 5


def test_llavas_own_files_say_it_elsewhere() -> None:
    values = {"image_processor_type": "CLIPImageProcessor"}
    assert image_transform(values, "").resize == "shortest"
    assert image_transform(values, "", pad=True).resize == "padded"
    assert image_transform({"image_processor": values}, "") == image_transform(values, "")


def test_sizes_of_old_files_are_numbers() -> None:
    clip = image_transform({"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336}, "")
    assert (clip.size, clip.resize) == ((336, 336), "shortest")
    vit = image_transform({"feature_extractor_type": "ViTFeatureExtractor", "size": 384}, "")
    assert (vit.size, vit.resize, vit.interpolation) == ((384, 384), "squash", "bilinear")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "'PixtralImageProcessor' is no image processor known here"),
        ({"image_processor_type": None}, "image_processor_type='None' is no image processor"),
        ({"do_resize": False}, r"do_resize=False \(known: True\)"),
        ({"resample": 1}, r"resample=1 \(known: 2, 3\)"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078"),
        ({"size": {"longest_edge": 300}}, r"size=\{'longest_edge': 300\}: known are shortest_edge"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "size=.*known are shortest_edge"),
        ({"do_center_crop": False}, "without do_center_crop: pictures of different sizes"),
        ({"crop_size": {"height": 448, "width": 448}}, "crop_size=.* is no smaller copy of size="),
        ({"crop_size": [224]}, r"crop_size=\[224\]: known are height and width"),
        ({"image_processor_type": "BlipImageProcessor", "do_pad": True, "size": 224}, "do_pad=True: known of CLIP's"),
    ],
)
def test_what_we_do_not_have_is_refused(change: dict[str, Any], message: str) -> None:
    values = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, **change}
    with pytest.raises(ValueError, match=f"^preprocessor_config.json: .*{message}"):
        image_transform(values, "preprocessor_config.json")
