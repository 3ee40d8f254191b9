"""Image encoders: any model of open_clip or timm as `images -> tokens`, with its transform, layer choice and freezing.

Letters: B batch, N image tokens, C image width.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import open_clip
import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm.data.image import ImageTransform, Resize
from vlm.model.weights.files import load_into, read
from vlm.model.weights.source import open_file
from vlm.nn.adapter import train_dropout

ClassToken = Literal["keep", "drop"]


class ImageEncoder(nn.Module):
    """A backbone with what its users need to know: `dim`, `tokens`, `transform`.

    Frozen means: evaluation mode for ever, no gradient, no graph, and a dtype of its own if one is given. Adapters
    (`vlm.model.lora`) may learn in it all the same; there is a graph then, and their dropout.
    """

    def __init__(
        self, backbone: nn.Module, transform: ImageTransform, frozen: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """`backbone` maps B 3 H W to B N C; `dtype` (frozen encoders only) holds its weights and computes in it."""
        super().__init__()
        if dtype is not None and not frozen:
            raise ValueError("model.vision.dtype is for frozen encoders: a trained one follows train.precision")
        self.backbone, self.transform, self.frozen, self.dtype = backbone, transform, frozen, dtype
        self.tokens, self.dim = _output_size(backbone, transform.size)
        if frozen:
            self.requires_grad_(False).eval()
        if dtype is not None:
            self.backbone.to(dtype)
        self.backbone.to(memory_format=torch.channels_last)

    def reading(
        self, layer: int, class_token: ClassToken, frozen: bool = False, dtype: torch.dtype | None = None
    ) -> "ImageEncoder":
        """An encoder over the same network that gives other tokens of it. ValueError: a backbone of the user's own."""
        if not isinstance(self.backbone, TimmBackbone | OpenClipBackbone):
            raise ValueError(
                f"{type(self.backbone).__name__} gives the tokens that it gives: leave layer and class_token"
            )
        return ImageEncoder(self.backbone.reading(layer, class_token), self.transform, frozen, dtype)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Stays in evaluation mode when frozen, whatever the model around it does."""
        super().train(mode and not self.frozen)
        train_dropout(self, mode)
        return self

    def recompute(self) -> None:
        """Activation checkpointing, by the backbone's own means. ValueError for one that has none."""
        for part in self.backbone.children():
            if not callable(switch := getattr(part, "set_grad_checkpointing", None)):
                raise ValueError(f"train.activation_checkpointing: {type(part).__name__} has no means for it")
            switch(True)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N C"]:
        """Image tokens in fp32 (in autocast's dtype while that is on)."""
        # The layout in which convolutions are fastest; other arithmetic does not mind.
        images = images.contiguous(memory_format=torch.channels_last)
        out: Tensor
        if not self.frozen:
            out = self.backbone(images)
            return out
        learns = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            if self.dtype is None:
                out = self.backbone(images)
                return out
            with torch.autocast(images.device.type, enabled=False):
                out = self.backbone(images.to(self.dtype))
                return out.to(images.dtype)


def _output_size(backbone: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """(N, C), with no assumption on the architecture."""
    out = outline(backbone, size)
    return int(out.shape[1]), int(out.shape[2])


def outline(backbone: nn.Module, size: tuple[int, int]) -> Float[Tensor, "1 N C"]:
    """A pass that runs shapes only: no arithmetic."""
    was_training = backbone.training
    backbone.eval()
    first = next(backbone.parameters())
    out: Tensor
    if first.device.type == "meta":
        out = backbone(torch.empty(1, 3, *size, device="meta", dtype=first.dtype))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            out = backbone(torch.empty(1, 3, *size, device=first.device, dtype=first.dtype))
    backbone.train(was_training)
    return out


class TimmBackbone(nn.Module):
    """A timm model; grids become rows of tokens."""

    model: Any  # timm's models share their methods by convention, not by a type

    def __init__(self, model: nn.Module, layer: int = -1, class_token: ClassToken = "keep") -> None:
        """`layer`: -1 is the normalised output; another index is the output of that block, without the final norm."""
        super().__init__()
        self.model, self.layer = model, layer
        self.prefix: int = getattr(model, "num_prefix_tokens", 0)
        self.drop = self.prefix if class_token == "drop" else 0

    def reading(self, layer: int, class_token: ClassToken) -> "TimmBackbone":
        """The same network, read elsewhere."""
        return TimmBackbone(self.model, layer, class_token)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N C"]:
        """All tokens of the chosen layer."""
        if self.layer == -1:
            return self._rows(self.model.forward_features(images))[:, self.drop :]
        options: dict[str, Any] = {"return_prefix_tokens": True} if self.prefix else {}
        found = self.model.forward_intermediates(
            images, indices=[self.layer], stop_early=True, intermediates_only=True, output_fmt="NCHW", **options
        )[0]
        grid, prefix = found if self.prefix else (found, None)
        rows = grid.flatten(2).transpose(1, 2)
        return rows if prefix is None or self.drop else torch.cat([prefix, rows], 1)

    def _rows(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return x
        channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return x.flatten(1, 2) if channels_last else x.flatten(2).transpose(1, 2)


class OpenClipBackbone(nn.Module):
    """The image tower of an open_clip model (its own ViT or ResNet)."""

    visual: Any  # open_clip's image towers share their methods by convention, not by a type

    def __init__(self, visual: nn.Module, layer: int = -1, class_token: ClassToken = "keep") -> None:
        """`layer`: -1 is the last block after `ln_post`; another index is that block's raw output (LLaVA: -2)."""
        super().__init__()
        self.visual, self.layer, self.class_token = visual, layer, class_token

    def reading(self, layer: int, class_token: ClassToken) -> "OpenClipBackbone":
        """The same network, read elsewhere."""
        return OpenClipBackbone(self.visual, layer, class_token)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N C"]:
        """Class token first (unless dropped), then the patches."""
        count = len(getattr(getattr(self.visual, "transformer", None), "resblocks", [])) or 5
        found = self.visual.forward_intermediates(
            images,
            indices=[self.layer % count],
            stop_early=True,
            normalize_intermediates=self.layer == -1,
            intermediates_only=True,
            output_fmt="NCHW",
            output_extra_tokens=True,
        )
        rows = found["image_intermediates"][0].flatten(2).transpose(1, 2)
        prefix = found.get("image_intermediates_prefix")
        return rows if prefix is None or self.class_token == "drop" else torch.cat([prefix[0], rows], 1)


def timm_encoder(
    name: str,
    weights: str | None = None,
    layer: int = -1,
    class_token: ClassToken = "keep",
    image_size: int | None = None,
    args: dict[str, Any] | None = None,
    frozen: bool = False,
    dtype: torch.dtype | None = None,
) -> ImageEncoder:
    """An encoder from timm.

    `weights`: None (random), a file, or a pretrained tag of that model (fetched from the hub). `args` go to
    `timm.create_model`. Errors: unknown name (the nearest are listed), a file that does not fit.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=8)
        raise ValueError(f"model.vision.name: timm has no model '{name}'; near: {', '.join(near) or 'none'}")
    tags = [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
    from_file = weights is not None and Path(weights).is_file()
    if weights is not None and not from_file and weights not in ("default", *tags):
        raise ValueError(
            f"model.vision.weights: '{weights}' is neither a file nor a pretrained tag of timm's {architecture} "
            f"({', '.join(tags) or 'it has none'})"
        )
    tagged = name if weights is None or from_file or weights == "default" else f"{architecture}.{weights}"
    model: Any = timm.create_model(
        tagged, pretrained=weights is not None and not from_file, num_classes=0, **(args or {})
    )
    resizable = image_size is not None and hasattr(model, "set_input_size")
    if from_file:
        assert weights is not None
        # A file may hold positions of the model's own size or, when it was trained here, of the size asked for.
        if resizable and not _fits(model, read(Path(weights))):
            model.set_input_size(img_size=(image_size, image_size))
        load_into(model, Path(weights), optional=_classifier_keys(model))
    if resizable:
        model.set_input_size(img_size=(image_size, image_size))
    return ImageEncoder(TimmBackbone(model, layer, class_token), timm_transform(model, image_size), frozen, dtype)


def _fits(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    own = model.state_dict()
    return all(own[name].shape == tensor.shape for name, tensor in weights.items() if name in own)


def _classifier_keys(model: Any) -> tuple[str, ...]:
    names = model.default_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


_RESIZE: dict[str, Resize] = {"center": "shortest", "squash": "squash", "border": "longest"}  # timm's names


def timm_transform(model: Any, image_size: int | None) -> ImageTransform:
    """As the model's data config says; another size is taken whole."""
    config = resolve_model_data_config(model)
    size = config["input_size"][1:] if image_size is None else (image_size, image_size)
    bilinear = config["interpolation"] == "bilinear"
    fill = [round(255 * mean) for mean in config["mean"]]
    return ImageTransform(
        size=(size[0], size[1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize=_RESIZE[config["crop_mode"]],
        interpolation="bilinear" if bilinear else "bicubic",
        crop_fraction=float(config["crop_pct"]) if image_size is None else 1.0,
        fill=(fill[0], fill[1], fill[2]),
    )


def open_clip_encoder(
    name: str,
    weights: str | None = None,
    layer: int = -1,
    class_token: ClassToken = "keep",
    image_size: int | None = None,
    frozen: bool = False,
    dtype: torch.dtype | None = None,
) -> ImageEncoder:
    """The image tower of an open_clip model.

    `weights`: None (random), a file, or a pretrained tag (fetched from the hub). Errors: unknown name or tag.
    """
    if name not in open_clip.list_models():
        near = get_close_matches(name, open_clip.list_models(), n=8)
        raise ValueError(f"model.vision.name: open_clip has no model '{name}'; near: {', '.join(near) or 'none'}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is not None and not Path(weights).is_file() and weights not in tags:
        raise ValueError(
            f"model.vision.weights: '{weights}' is neither a file nor a pretrained tag of open_clip's {name} "
            f"({', '.join(tags) or 'it has none'})"
        )
    file = Path(weights) if weights is not None and weights not in tags else None
    model = open_clip.create_model(
        name,
        pretrained=weights if file is None else None,
        force_image_size=image_size,
        weights_only=True,
        device=torch.get_default_device(),
    )
    if file is not None:
        _load_open_clip(model, file)
    return from_open_clip(model, layer, class_token, frozen, dtype)


def _load_open_clip(model: nn.Module, file: Path) -> None:
    """By open_clip's own loader, which knows older layouts and other image sizes."""
    open_file(file)  # for its errors alone: what is damaged, or could run code
    try:
        open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit this model: {error}") from None


def from_open_clip(
    model: nn.Module,
    layer: int = -1,
    class_token: ClassToken = "keep",
    frozen: bool = False,
    dtype: torch.dtype | None = None,
) -> ImageEncoder:
    """The image tower of an open_clip model that exists already."""
    visual = model.visual
    assert isinstance(visual, nn.Module)
    transform = open_clip_transform(open_clip.get_model_preprocess_cfg(model))
    return ImageEncoder(open_clip_backbone(visual, layer, class_token), transform, frozen, dtype)


def open_clip_transform(config: Mapping[str, Any]) -> ImageTransform:
    """Of a preprocess_cfg; CLIP's where it says nothing."""
    size, grey = config.get("size", 224), config.get("fill_color", 0)
    return ImageTransform(
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=tuple(config.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(config.get("std") or open_clip.OPENAI_DATASET_STD),
        resize=config.get("resize_mode") or "shortest",
        interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
        fill=(grey, grey, grey),
    )


def open_clip_backbone(visual: nn.Module, layer: int = -1, class_token: ClassToken = "keep") -> nn.Module:
    """open_clip's image tower as a backbone: of timm inside, or its own."""
    trunk = getattr(visual, "trunk", None)
    if isinstance(trunk, nn.Module):
        return TimmBackbone(trunk, layer, class_token)
    _sequence_first(visual)
    return OpenClipBackbone(visual, layer, class_token)


def _sequence_first(visual: nn.Module) -> None:
    """Lets a ViT run on N B C, by a switch of open_clip's own: the same results.

    On B N C torch's attention multiplies rows that are not contiguous, which takes CPUs ten times longer in bf16.
    """
    transformer = getattr(visual, "transformer", None)
    blocks = getattr(transformer, "resblocks", ())
    attentions = [block.attn for block in blocks if isinstance(getattr(block, "attn", None), nn.MultiheadAttention)]
    if transformer is None or not attentions or len(attentions) != len(blocks):
        return  # a ResNet, or attention of open_clip's own, which needs B N C
    for module in (transformer, *attentions):
        module.batch_first = False
