"""Tokens averaged into cells, and centred; EfficientNet-Lite0's names."""

import pytest
import timm
import torch
from torch import nn

from vlm.data.image import ImageTransform
from vlm.model.grid import GridEncoder
from vlm.model.vision import ImageEncoder, timm_encoder
from vlm.model.weights.efficientnet import efficientnet_lite0_table
from vlm.model.weights.files import load_strict

TRANSFORM = ImageTransform((6, 6), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Pixels(nn.Module):
    """Every pixel is a token of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2).transpose(1, 2)


def grid(side: int) -> GridEncoder:
    return GridEncoder(ImageEncoder(Pixels(), TRANSFORM, frozen=True), side)


def test_cells_are_means_row_by_row() -> None:
    images = torch.randn(2, 3, 6, 6)
    cells = grid(2)(images)
    assert cells.shape == (2, 4, 3)
    corners = [images[:, :, top : top + 3, left : left + 3].mean((2, 3)) for top in (0, 3) for left in (0, 3)]
    assert torch.allclose(cells, torch.stack(corners, 1), atol=1e-6)
    assert torch.equal(grid(6)(images), Pixels()(images))


def test_the_mean_of_the_pictures_becomes_zero() -> None:
    images, new = torch.rand(70, 3, 6, 6), torch.rand(2, 3, 6, 6)
    ours, plain = grid(3), grid(3)
    cells = ours(images)
    ours.centre(cells)
    assert torch.allclose(ours(images), cells, atol=1e-6) and float(cells.mean((0, 1)).abs().max()) < 1e-6
    ours.centre(cells)  # nothing is left to take away
    assert torch.allclose(ours(new), plain(new) - images.mean((0, 2, 3)), atol=1e-6)


def test_what_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="36 image tokens form no square of 7 x 7"):
        grid(7)
    with_class_token = timm_encoder("vit_tiny_patch16_224", image_size=32, args={"depth": 1})
    with pytest.raises(ValueError, match="5 image tokens form no square of 2 x 2"):
        GridEncoder(with_class_token, 2)


def test_names_of_efficientnet_lite0() -> None:
    table = efficientnet_lite0_table()
    own = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    theirs = table.to_theirs(own)
    assert len(theirs) == len(own) == 294
    assert theirs["_blocks.0._project_conv.weight"] is own["blocks.0.0.conv_pw.weight"]
    assert theirs["_blocks.7._expand_conv.weight"] is own["blocks.3.2.conv_pw.weight"]
    assert theirs["_blocks.15._bn2.running_var"] is own["blocks.6.0.bn3.running_var"]
    classifier = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    back = table.to_ours({**theirs, **classifier})
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
    fresh = timm_encoder("tf_efficientnet_lite0", image_size=32)
    load_strict(fresh.backbone.model, back, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"efficientnet-lite0: .*_blocks\.16\._bn2\.bias"):
        table.to_ours({**theirs, "_blocks.16._bn2.bias": torch.zeros(1)})
