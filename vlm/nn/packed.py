"""Linear layers in the order in which oneDNN reads them, packed once and not in every product: CPUs, inference alone.

Letters: D width in, E width out.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.nn.backend import FEW, bfloat16_is_fast, onednn_is_exact

ROWS = 64  # for products of so many rows weights are packed: good for one and for hundreds too


class PackedLinear(nn.Module):
    """A linear layer without gradients and without a place in `state_dict`."""

    def __init__(self, weight: Float[Tensor, "E D"], bias: Float[Tensor, "E"] | None = None) -> None:
        """Copies the weight."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = _operations()._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        """The product in the weight's type, which `x` must have."""
        out: Tensor = _operations()._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


def pack_for_decoding(module: nn.Module, rows: int) -> bool:
    """Replaces the linear layers of a module by packed ones, if products of so many rows are then faster.

    They are in bf16 (1.2 to 1.9 times) and in fp32 for more than a few rows (1.1 to 1.3 times). Memory is taken for one
    layer at a time. Afterwards the module has no such parameters, and no gradients.
    """
    weights = [part.weight for part in module.modules() if type(part) is nn.Linear]
    if not weights or not all(_pays(weight, rows) for weight in weights):
        return False
    for owner in list(module.modules()):
        for name, part in list(owner.named_children()):
            if type(part) is nn.Linear:
                setattr(owner, name, PackedLinear(part.weight, part.bias))
    return True


def _pays(weight: Tensor, rows: int) -> bool:
    if weight.device.type != "cpu" or not hasattr(_operations(), "_linear_pointwise"):
        return False
    if weight.dtype == torch.float32:
        return rows > FEW and onednn_is_exact()
    return weight.dtype == torch.bfloat16 and bfloat16_is_fast(weight.device)


def _operations() -> Any:
    """Those that torch's own compiler uses, which has no public name for them."""
    return torch.ops.mkldnn
