"""Adapters of low rank beside linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685), found again in a model.

`peft` builds them (`vlm.model.lora`); nothing here imports it. Letters: R rank, I width in, O width out.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

NAME = "default"  # peft's for the only set of adapters
_OWN = re.compile(r"(.*\.)?lora_[AB]\.default\.weight")


@dataclass(frozen=True)
class Adapter:
    """What stands in place of a linear layer: base(x) + scale * up(down(dropout(x)))."""

    base: nn.Linear
    down: nn.Linear
    up: nn.Linear
    scale: float
    dropout: nn.Module

    def change(self) -> Float[Tensor, "O I"]:
        """What is added to the base's matrix, in fp32 at least.

        Summed up rank by rank, product and sum apart: the same bits on every machine, for merged parts are hashed.
        """
        dtype = torch.promote_types(self.up.weight.dtype, torch.float32)
        down, up = self.down.weight.to(dtype), self.up.weight.to(dtype)
        total = torch.zeros_like(self.base.weight, dtype=dtype)
        for i in range(len(down)):
            total += up[:, i, None] * down[i]
        return total * self.scale


def adapters(module: nn.Module) -> dict[str, Adapter]:
    """All adapters by the names of the layers in whose place they stand."""
    found = {}
    for name, part in module.named_modules():
        if hasattr(part, "base_layer") and hasattr(part, "lora_A") and hasattr(part, "scaling"):
            base, down, up = part.base_layer, part.lora_A[NAME], part.lora_B[NAME]
            assert isinstance(base, nn.Linear) and isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
            found[name] = Adapter(base, down, up, float(part.scaling[NAME]), part.lora_dropout[NAME])
    return found


def is_adapter(name: str) -> bool:
    """Is it the name of an adapter's own parameter?"""
    return _OWN.fullmatch(name) is not None


def plain(name: str) -> str:
    """The name that a tensor of the base has without the adapters around it."""
    return name.replace(".base_layer.", ".")


def train_dropout(module: nn.Module, mode: bool) -> None:
    """Switches the dropout of the adapters alone, for a frozen part that stays in evaluation mode otherwise."""
    for adapter in adapters(module).values():
        adapter.dropout.train(mode)
