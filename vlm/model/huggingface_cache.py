"""Our memory of past tokens as the cache that models of `transformers` write to; imported only where they are used."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from vlm.nn.state import Branched, KeyValue, LayerState


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers' classes are Any to the type checker
    """Keys and values of one block, in our storage."""

    def __init__(self, memory: KeyValue | None) -> None:
        super().__init__()
        self.memory = memory
        if memory is not None:
            self._show(memory)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last; what was given at first is left as it was."""
        grown = KeyValue(key_states, value_states)
        return self._show(grown if self.memory is None else self.memory.extend(key_states, value_states))

    def _show(self, memory: KeyValue) -> tuple[Tensor, Tensor]:
        self.memory, self.is_initialized = memory, True
        self.keys, self.values, self.device = memory.key, memory.value, memory.key.device
        return self.keys, self.values


class Memory(Cache):  # type: ignore[misc]  # as above
    """A cache that begins with what a `State` remembers."""

    def __init__(self, past: Sequence[LayerState] | None, layers: int) -> None:
        """`past`: None at first. ValueError: of a model with other layers."""
        written_out = [layer.whole() if isinstance(layer, Branched) else layer for layer in past or ()]
        given = [layer for layer in written_out if isinstance(layer, KeyValue)]
        if past is not None and (len(given), len(past)) != (layers, layers):
            raise ValueError(f"this state is of another model: {len(past)} layers, not {layers} of keys and values")
        super().__init__(layers=[_Layer(given[i] if given else None) for i in range(layers)])

    def remembered(self) -> tuple[LayerState, ...]:
        """What every layer remembers now. ValueError: a layer of the model keeps nothing here."""
        found = [layer.memory for layer in self.layers]
        if any(layer is None for layer in found):
            raise ValueError("this model of transformers does not keep keys and values of every layer in its cache")
        return tuple(layer for layer in found if layer is not None)


def kinds_of_memory(config: Any) -> list[str]:
    """What each layer of such a model remembers, by the name of transformers' class."""
    return [type(layer).__name__ for layer in DynamicCache(config=config).layers]
