"""The image transform that comes with a checkpoint: preprocessor_config.json of Hugging Face."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlm.data.image import ImageTransform, Resize
from vlm.model.published.part import Settings
from vlm.model.published.vit import CLIP_MEAN, CLIP_STD, HALF

_SHORTEST = {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "resample": 3, "square": False}
_SQUARE = {"size": 224, "do_center_crop": False, "crop_size": 224, "resample": 3, "square": True}
_CLIP = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
_HALF = {"image_mean": HALF, "image_std": HALF}
_ALL = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_pad": False}

# What the processors take where the file says nothing; "square" is how they read a size that is one number.
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": {**_ALL, **_SHORTEST, **_CLIP},
    "Llava": {**_ALL, **_SHORTEST, **_CLIP},
    "Siglip": {**_ALL, **_SQUARE, **_HALF},
    "Blip": {**_ALL, **_SQUARE, **_CLIP, "size": 384},
    "ViT": {**_ALL, **_SQUARE, **_HALF, "resample": 2},
}
ENDINGS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")
INTERPOLATION = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def image_transform(values: Mapping[str, Any], where: str, pad: bool = False) -> ImageTransform:
    """The transform that a preprocessor_config.json describes (or the part of a processor_config.json that is one).

    `pad`: LLaVA's image_aspect_ratio=pad, which its own files keep in another place: pictures are padded to a square
    with the mean colour first. Pixels are those of the processors to 1 of 255 levels, seldom 2, with Pillow up to 12:
    Pillow 13 resizes tall pictures in another order, which moves a fifth of their values by a few levels.
    ValueError: a processor or settings that are not known.
    """
    values = values.get("image_processor", values)
    kind = str(values.get("image_processor_type", values.get("feature_extractor_type")))
    ending = next((ending for ending in ENDINGS if kind.endswith(ending)), "")
    if not ending or (family := kind.removesuffix(ending)) not in PROCESSORS:
        known = ", ".join(f"{name}ImageProcessor" for name in PROCESSORS)
        raise ValueError(f"{where}: image_processor_type={kind!r} is no image processor known here ({known})")
    s = Settings(values, where, PROCESSORS[family])
    s.expect(do_resize=(True,), do_rescale=(True,), resample=tuple(INTERPOLATION))
    if abs(s["rescale_factor"] * 255 - 1) > 1e-6:
        raise ValueError(f"{where}: rescale_factor={s['rescale_factor']}: pixels of 0..1 are known alone (1/255)")
    pad = pad or bool(s["do_pad"])
    if pad and family not in ("CLIP", "Llava"):
        raise ValueError(f"{where}: do_pad={s['do_pad']}: known of CLIP's and LLaVA's processors alone")
    mean, std = (_three(s, "image_mean"), _three(s, "image_std")) if s["do_normalize"] else ((0.0,) * 3, (1.0,) * 3)
    resize, edges = _edges(s)
    size = _crop(s, edges) if s["do_center_crop"] else edges
    return ImageTransform(
        size=size,
        mean=mean,
        std=std,
        resize="padded" if pad else resize,
        interpolation="bilinear" if INTERPOLATION[s["resample"]] == "bilinear" else "bicubic",
        # Half a pixel more than the edge, because the transform cuts the fraction off.
        crop_fraction=1.0 if size == edges else size[0] / (edges[0] + 0.5),
        fill=_colour(mean) if pad else (0, 0, 0),
        floored=True,
    )


def padded(transform: ImageTransform) -> ImageTransform:
    """The same with pictures padded to a square first, in the mean colour (LLaVA-1.5)."""
    return replace(transform, resize="padded", fill=_colour(transform.mean))


def _edges(s: Settings) -> tuple[Resize, tuple[int, int]]:
    """How a picture is resized, and the height and width before the middle is cut out."""
    match s["size"]:
        case int(edge):
            return "squash" if s["square"] else "shortest", (edge, edge)
        case {"shortest_edge": int(edge), **rest} if not any(rest.values()):
            if not s["do_center_crop"]:
                raise ValueError(f"{s.where}: size={s['size']} without do_center_crop: pictures of different sizes")
            return "shortest", (edge, edge)
        case {"height": int(height), "width": int(width), **rest} if not any(rest.values()):
            return "squash", (height, width)
        case other:
            raise ValueError(f"{s.where}: size={other}: known are shortest_edge, height and width, or one number")


def _crop(s: Settings, edges: tuple[int, int]) -> tuple[int, int]:
    match s["crop_size"]:
        case int(side):
            size = (side, side)
        case {"height": int(height), "width": int(width)}:
            size = (height, width)
        case other:
            raise ValueError(f"{s.where}: crop_size={other}: known are height and width, or one number")
    if size[0] > edges[0] or size[1] > edges[1] or size[0] * edges[1] != size[1] * edges[0]:
        raise ValueError(f"{s.where}: crop_size={s['crop_size']} is no smaller copy of size={s['size']}")
    return size


def _three(s: Settings, name: str) -> tuple[float, float, float]:
    first, second, third = s[name]
    return float(first), float(second), float(third)


def _colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    return int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)


def processor_values(t: ImageTransform) -> dict[str, Any]:
    """preprocessor_config.json of a transform, the way back of `image_transform`.

    Where the middle lies between two pixels, transformers takes the first of them (`floored`), whatever ours does.
    ValueError: pictures fitted by their longer side, which no published processor does.
    """
    if t.resize == "longest":
        raise ValueError("pictures are fitted by their longer side (resize=longest), which no image processor does")
    height, width = (int(side / t.crop_fraction) for side in t.size)
    edges = {"height": height, "width": width} if t.resize == "squash" else {"shortest_edge": height}
    if t.resize != "squash" and height != width:
        raise ValueError(f"pictures of {t.size} cut from the middle: image processors cut squares alone")
    return {
        "image_processor_type": "LlavaImageProcessor" if t.resize == "padded" else "CLIPImageProcessor",
        "do_resize": True,
        "size": edges,
        "resample": 2 if t.interpolation == "bilinear" else 3,
        "do_center_crop": True,
        "crop_size": {"height": t.size[0], "width": t.size[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(t.mean),
        "image_std": list(t.std),
        **({"do_pad": True} if t.resize == "padded" else {}),
        "do_convert_rgb": True,
    }
