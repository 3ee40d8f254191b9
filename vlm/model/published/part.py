"""A published module as one of ours, and the settings that a config.json gives it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from vlm.model.weights.table import Table


class Part(NamedTuple):
    """A module of ours, built on the default device (meta: without memory), and the table of its published weights."""

    module: nn.Module
    table: Table


@dataclass(frozen=True)
class Settings(Mapping[str, Any]):
    """The part of a config.json that describes one module; what the file leaves out has its family's default."""

    given: Mapping[str, Any]
    where: str  # for messages: the file, and the section inside it
    defaults: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """ValueError where neither the file nor the family says it."""
        for source in (self.given, self.defaults):
            if name in source:
                return source[name]
        raise ValueError(f"{self.where}: has no '{name}', and this family has no default for it")

    def __contains__(self, name: object) -> bool:
        return name in self.given or name in self.defaults

    def get(self, name: str, default: Any = None) -> Any:
        """`default` where neither the file nor the family says it."""
        return {**self.defaults, **self.given}.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter({**self.defaults, **self.given})

    def __len__(self) -> int:
        return len({**self.defaults, **self.given})

    def section(self, name: str, defaults: Mapping[str, Any]) -> "Settings":
        """The settings of a part, such as text_config; all defaults where the file has no such section."""
        found = self.given.get(name) or {}
        if not isinstance(found, Mapping):
            raise ValueError(f"{self.where}: {name} is no table of settings: {found!r}")
        return Settings(found, f"{self.where}: {name}", defaults)

    def expect(self, **known: Any) -> None:
        """Refuses settings that our parts do not have: each must be one of the values given (a tuple), if it is set.

        ValueError naming the setting, its value and what is known.
        """
        wrong = [
            f"{name}={self[name]!r} (known: {', '.join(map(repr, values))})"
            for name, values in known.items()
            if name in self and self[name] not in values
        ]
        if wrong:
            raise ValueError(f"{self.where}: settings that vlm does not have: {'; '.join(wrong)}")
