"""Retention by the Triton kernels of flash-linear-attention, an extra for GPUs: a form like those of `retain`.

Its own `chunk_retention` knows one decay schedule, no padding and no row sum, so its layout does not agree with ours.
Its `chunk_simple_gla` takes a decay for each token and a memory to go on from, which is all that the definition in
`retain` asks: padding gets decay 1 and a key of 0, and the column of ones makes the row sums.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from vlm.nn.retain import Fading, Retained, divided, prepared

Kernel = Callable[..., tuple[Tensor, Tensor]]


class FlaChunks:
    """Chunks of 64 tokens in parallel on a GPU, with fla's backward pass."""

    def __init__(self, kernel: Kernel | None = None) -> None:
        """`kernel`: takes what `fla.ops.simple_gla.chunk_simple_gla` takes, which it is unless given.

        ValueError: flash-linear-attention is not installed.
        """
        self._given = kernel
        self.kernel: Kernel = _published() if kernel is None else kernel

    def __call__(
        self,
        query: Float[Tensor, "B S H K"],
        key: Float[Tensor, "B S H K"],
        value: Float[Tensor, "B S H V"],
        fading: Fading,
        past: Float[Tensor, "B H K W"] | None = None,
    ) -> Retained:
        """As the other forms. ValueError: tensors that are not on a GPU."""
        if self._given is None and query.device.type != "cuda":
            raise ValueError(
                f"mixer.kernel=fla: its kernels run on NVIDIA GPUs, not on {query.device.type}; use kernel=torch"
            )
        q, k, v = (x.to(query.dtype) for x in prepared(query, key, value, fading))
        log_fade = fading.fade.log().transpose(1, 2).expand(len(q), -1, -1)
        full, total = self.kernel(q, k, v, g=log_fade, scale=1.0, initial_state=past, output_final_state=True)
        out = divided(full.transpose(1, 2), fading.scale).transpose(1, 2)
        return Retained(out.to(query.dtype), total)


def _published() -> Kernel:
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        raise ValueError("mixer.kernel=fla needs flash-linear-attention: pip install 'vlm[fla]'") from None
    kernel: Kernel = chunk_simple_gla
    return kernel
