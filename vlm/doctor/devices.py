"""What torch, torchvision and Pillow can do here, found out by using them; what cannot be is told."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from vlm.doctor.facts import Facts, Gpu, Pictures, Torch

# What a broken installation raises: a missing library, an operator that another torch has, a half-removed package.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError)


Found = TypeVar("Found")


def with_devices(facts: Facts) -> Facts:
    """The same with what was found; `failed` tells of what could not be used."""
    failed = dict(facts.failed)
    torch = _tried(failed, "torch", _torch)
    if torch is not None:
        _tried(failed, "torchvision", _torchvision)
    pictures = _tried(failed, "pillow", _pictures)
    return replace(facts, torch=torch, pictures=pictures, cache=_cache(), failed=failed)


def _tried(failed: dict[str, str], name: str, use: Callable[[], Found]) -> Found | None:
    try:
        return use()
    except BROKEN as error:
        failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return None


def _torch() -> Torch:
    import torch

    from vlm.nn.backend import bfloat16_is_fast, onednn_is_exact

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Torch(
        threads=torch.get_num_threads(),
        onednn=torch.backends.mkldnn.is_available(),
        exact=onednn_is_exact(),
        bf16=bfloat16_is_fast(torch.device("cpu")),
        cuda=torch.version.cuda,
        gpus=tuple(_gpu(number) for number in range(count)),
        mps=torch.backends.mps.is_available(),
    )


def _gpu(number: int) -> Gpu:
    import torch

    found = torch.cuda.get_device_properties(number)
    with torch.cuda.device(number):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(found.name, found.total_memory, f"{found.major}.{found.minor}", bool(bf16))


def _torchvision() -> None:
    """One operator of its own: it is absent where torchvision was built for another torch."""
    import torch
    from torchvision.ops import nms

    nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)


def _pictures() -> Pictures:
    from PIL import features

    turbo = features.version_feature("libjpeg_turbo") if features.check("libjpeg_turbo") else None
    return Pictures(bool(features.check("jpg")), turbo, bool(features.check("webp")))


def _cache() -> str | None:
    """Why no file can be made in the folder of the cache, or in the one that it would be made in."""
    from vlm.data.cache import default_folder

    folder = default_folder().absolute()
    try:
        with tempfile.TemporaryFile(dir=next(place for place in (folder, *folder.parents) if place.exists())):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror}"
