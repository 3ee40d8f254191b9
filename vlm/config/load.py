"""From a YAML file, at most one `base:` and `key=value` overrides to checked settings, and back to YAML.

Mappings merge key by key, but a new `kind` replaces the whole choice. Lists are replaced; an override may reach into
one by index (`losses.0.weight=2`). Values stay in pydantic's lax mode: `1e-4` is text to YAML 1.1.
"""

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vlm.config.explain import explain

M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """Mistakes in the settings; `problems` holds one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def load(model: type[M], path: Path, overrides: Sequence[str] = ()) -> M:
    """Read, merge and check settings.

    `base: FILE` (relative to the file that names it) is laid below the file; a base has no base of its own.
    Raises ConfigError, which names all mistakes in the settings and the overrides at once.
    """
    settings, problems = _override(_read(path), overrides)
    try:
        checked = model.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(problems + [f"{path}: {line}" for line in explain(model, error)]) from None
    if problems:
        raise ConfigError(problems)
    return checked


def dump(run: BaseModel) -> str:
    """All settings as YAML, defaults included, in the order of the schema; `load` reads it back to an equal object."""
    settings = run.model_dump(mode="json")
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _read(path: Path) -> dict[str, Any]:
    settings = _read_one(path)
    if "base" not in settings:
        return settings
    name = settings.pop("base")
    if not isinstance(name, str):
        raise ConfigError([f"{path}: base: expected the name of one file, got {name!r}"])
    base = _read_one(path.parent / name, needed_by=f"{path}: base: ")
    if "base" in base:
        raise ConfigError([f"{path}: base: {name} has a base of its own; only one level is allowed, so merge the two"])
    merged: dict[str, Any] = merge(base, settings)
    return merged


def _read_one(path: Path, needed_by: str = "") -> dict[str, Any]:
    try:
        settings = _parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError([f"{needed_by}cannot read {path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{needed_by}cannot read {path}: it is not UTF-8 text"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{needed_by}{path}: {_reason(error)}"]) from None
    if not isinstance(settings, dict):
        raise ConfigError([f"{needed_by}{path}: expected settings such as 'seed: 0', got {_found(settings)}"])
    return settings


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings key by key unless `kind` changes, anything else replaced. Neither is changed."""
    if not isinstance(base, dict) or not isinstance(over, dict) or _changes_kind(base, over):
        return over
    return base | {key: merge(base[key], value) if key in base else value for key, value in over.items()}


def _changes_kind(base: dict[Any, Any], over: dict[Any, Any]) -> bool:
    return "kind" in base and "kind" in over and base["kind"] != over["kind"]


def _override(settings: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    pairs, problems = [], []
    for text in overrides:
        try:
            pairs.append((text, *_split(text)))
        except ValueError as error:
            problems.append(f"{text}: {error}")
    # A new kind drops the old choice's settings, so kinds come first and the order on the command line is free.
    for text, keys, value in sorted(pairs, key=lambda pair: _depth_of_kind(*pair[1:])):
        try:
            settings = _assign(settings, keys, value)
        except ValueError as error:
            problems.append(f"{text}: {error}")
    return settings, problems


def _depth_of_kind(keys: Sequence[str], value: Any) -> int:
    """How deep an override chooses a kind, itself or in a mapping; those that choose none come last."""
    if keys[-1] == "kind":
        return len(keys)
    return len(keys) + 1 if isinstance(value, dict) and "kind" in value else 1_000


def _split(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ValueError("not an override; write key=value, such as train.steps=100")
    try:
        return keys, _parse(value)
    except yaml.YAMLError as error:
        raise ValueError(f"the value is not YAML ({_reason(error)}); text with {{, [ or : needs quotes") from None


def _assign(node: Any, keys: Sequence[str], value: Any) -> Any:
    """A copy of `node` with the value at the end of the keys replaced, or merged where both are mappings."""
    if not keys:
        return merge(node, value)
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise ValueError(f"no item {key!r} in a list of {len(node)}; items count from 0")
        index = int(key)
        return [*node[:index], _assign(node[index], rest, value), *node[index + 1 :]]
    branch = node if isinstance(node, dict) else {}
    if key == "kind" and not rest and _changes_kind(branch, {"kind": value}):
        return {"kind": value}
    return {**branch, key: _assign(branch.get(key), rest, value)}


def _parse(text: str) -> Any:
    return _Loader(text).get_single_data()


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return " ".join(str(error).split())


def _found(value: Any) -> str:
    return {type(None): "an empty file", list: "a list"}.get(type(value), repr(value))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, where YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is written twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, lists of mappings indented below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_list(self, data: Iterable[Any]) -> yaml.SequenceNode:
        """A list of plain values in brackets, any other list one item a line."""
        nested = any(isinstance(item, list | dict) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=not nested)

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out in full: anchors are hard to read."""
        return True


_Dumper.add_representer(list, _Dumper.represent_list)
