"""How weights lie in memory: for decoding, side by side where layers read the same input, and column by column.

Letters: B batch, S sequence, D width in, E width out of all layers.
"""

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.nn.route import call
from vlm.nn.tokens import Tokens


@runtime_checkable
class Readers(Protocol):
    """A module some of whose layers read the same input."""

    def readers(self) -> Sequence[nn.Module]:
        """These layers."""
        ...


def project(layers: Sequence[nn.Module], x: Float[Tensor, "*B D"], tokens: Tokens | None = None) -> Sequence[Tensor]:
    """What each layer makes of `x`; `tokens` for those that are `PerRoute`."""
    weights = _plain(layers)
    whole = None if weights is None else joined(weights)
    if weights is None or whole is None:
        return [layer(x) if tokens is None else call(layer, x, tokens) for layer in layers]
    return nn.functional.linear(x, whole).split_with_sizes([weight.shape[0] for weight in weights], -1)


def _plain(layers: Sequence[nn.Module]) -> list[Tensor] | None:
    """The layers' matrices where nothing but these matters: linear, no bias, no gradients recorded."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    weights: list[Tensor] = []
    for layer in layers:
        # The very class: one made from it may do more than the product.
        if type(layer) is not nn.Linear or cast("Tensor | None", layer.bias) is not None:
            return None
        weights.append(layer.weight)
    return weights


def joined(weights: Sequence[Tensor]) -> Float[Tensor, "E D"] | None:
    """All matrices as one, without a copy, if they stand side by side in one storage as `join` puts them."""
    first = weights[0]
    step = first.stride()
    if step[0] != 1 or step[1] <= first.shape[0]:
        return None
    place, size = first.data_ptr(), first.element_size()
    end = place + step[1] * size
    # A matrix that was moved or replaced since then is elsewhere, for the storage of the others is still taken.
    for weight in weights:
        if weight.data_ptr() != place:
            return None
        place += weight.shape[0] * size
    return first.as_strided((step[1], first.shape[1]), step) if place == end else None


def join(layers: Sequence[nn.Module]) -> bool:
    """Stores the layers' weights side by side, column by column, in place; values and names stay. False: they differ.

    Layers with a bias, of other dtypes or of other inputs stay as they are.
    """
    with torch.no_grad():
        weights = _plain(layers)
    if weights is None or len({(weight.shape[1], weight.dtype, weight.device) for weight in weights}) != 1:
        return False
    columns = torch.cat([weight.detach().T for weight in weights], 1)
    for weight, part in zip(weights, columns.split([len(weight) for weight in weights], 1), strict=True):
        weight.data = part.T
    return True


def lay_out_for_decoding(module: nn.Module) -> None:
    """Stores matrices that read the same input side by side, and wide ones (the vocabulary too) column by column.

    In place, without gradients from then on; names, shapes and values stay. One token times such a matrix is read 1.2
    to 1.6 times faster on CPUs. Memory is taken only for the matrices of one module at a time.
    """
    done: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, Readers) and join(part.readers()):
            done.update(part.readers())
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding) and part not in done:
            rows, columns = part.weight.shape
            if rows > columns:
                part.weight.data = part.weight.data.T.contiguous().T
