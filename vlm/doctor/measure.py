"""How fast this machine multiplies matrices and decodes pictures: a few hundred milliseconds for each figure.

Products by the clock with the threads that vlm would use; pictures by the processor time of one thread.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from PIL import Image
from torch import Tensor

from vlm.data.image import decode
from vlm.doctor.facts import Decoding, Rate
from vlm.nn.backend import fast_float32, onednn_is_exact

SIDE, GPU_SIDE = 1024, 4096  # of the matrices
SMALL, SLOW = 256, 0.01  # a side, and seconds of its product, above which the larger ones are not tried
EXACT_ROWS = 32  # of the product that are compared with fp64
PICTURE, SHRUNK = (2000, 1500), 224  # pixels of the JPEG; what its shorter side must keep when it is decoded scaled
FLOAT32, ONEDNN, BFLOAT16, FLOAT16 = "fp32", "fp32, oneDNN", "bf16", "fp16"


def products(device: torch.device, seconds: float = 0.3) -> Iterator[Rate]:
    """One after the other; the way of oneDNN only where it is exact, as vlm takes it only there."""
    side = SIDE if device.type == "cpu" else GPU_SIDE
    yield product(device, FLOAT32, side, seconds)
    if device.type == "cpu" and onednn_is_exact():
        yield product(device, ONEDNN, side, seconds, context=fast_float32)
    yield product(device, BFLOAT16, side, seconds, torch.bfloat16)
    yield product(device, FLOAT16, side, seconds, torch.float16)


def product(
    device: torch.device,
    kind: str,
    side: int,
    seconds: float,
    dtype: torch.dtype = torch.float32,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Rate:
    """Repeated for that long, three times at least; the median. Of smaller matrices where the device only emulates."""
    maker = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, side, generator=maker) for _ in range(2))
    a, b = left.to(device, dtype), right.to(device, dtype)
    with context(), torch.inference_mode():
        little = a[:SMALL, :SMALL].contiguous()
        if side > SMALL and median_seconds(lambda: _finished(little @ little), 0.0) > SLOW:
            return product(device, kind, SMALL, seconds, dtype, context)
        found = _finished(a @ b)[:EXACT_ROWS].double().cpu()
        once = median_seconds(lambda: _finished(a @ b), seconds)
    exact = left[:EXACT_ROWS].double() @ right.double()
    error = float((found - exact).norm() / exact.norm())
    return Rate(device.type, kind, side, 2 * side**3 / once / 1e9, error)


def _finished(result: Tensor) -> Tensor:
    """A GPU's is ready when it has been waited for."""
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)
    elif result.device.type == "mps":
        torch.mps.synchronize()
    return result


def median_seconds(work: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call, on that clock."""
    found: list[float] = []
    while sum(found) < seconds or len(found) < 3:
        start = clock()
        work()
        found.append(clock() - start)
    return statistics.median(found)


def decoding(seconds: float = 0.3) -> Decoding:
    """Of a JPEG of a camera's kind, as vlm reads it."""
    data = photograph()

    def rate(work: Callable[[], object]) -> float:
        return 1 / median_seconds(work, seconds, time.process_time)

    width, height = PICTURE
    scaled = rate(lambda: decode(data, least=lambda *_: SHRUNK))
    return Decoding(width * height / 1e6, rate(lambda: decode(data)), scaled)


def photograph() -> bytes:
    """Soft shapes under fine noise, which takes about the bytes of a photograph: 0.3 a pixel."""
    width, height = PICTURE
    maker = torch.Generator().manual_seed(0)
    shapes = torch.rand(1, 3, 24, 32, generator=maker) * 255
    smooth = torch.nn.functional.interpolate(shapes, (height, width), mode="bicubic")[0]
    noisy = smooth + torch.randn(1, height, width, generator=maker) * 6
    pixels = noisy.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "JPEG", quality=90)
    return out.getvalue()
