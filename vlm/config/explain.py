"""Pydantic's list of errors in plain words: the path as the user wrote it, what was expected, what was found."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "the name of a file or folder",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a mapping",
    "none": "nothing",
}
_BOUND = {
    "greater_than": ("gt", "be more than {:g}"),
    "greater_than_equal": ("ge", "be at least {:g}"),
    "less_than": ("lt", "be less than {:g}"),
    "less_than_equal": ("le", "be at most {:g}"),
    "multiple_of": ("multiple_of", "be a multiple of {:g}"),
    "too_short": ("min_length", "have at least {} items"),
    "too_long": ("max_length", "have at most {} items"),
    "string_too_short": ("min_length", "have at least {} characters"),
    "string_too_long": ("max_length", "have at most {} characters"),
}


def explain(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line `path: mistake` for each mistake, in pydantic's order.

    What one value violates shares its line; a check of our own may have found several mistakes, one a line.
    """
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        path, message = _line(model, item)
        if message not in lines.setdefault(path, []):
            lines[path].append(message)
    return [
        ": ".join(filter(None, (path, line)))
        for path, messages in lines.items()
        for line in "; or ".join(messages).splitlines()
    ]


def nearest(name: object, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the name most like it, or nothing."""
    found = get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _line(model: type[BaseModel], item: ErrorDetails) -> tuple[str, str]:
    path, annotation = _locate(model, item["loc"])
    match item["type"]:
        case "extra_forbidden":
            return path, _unknown(item["loc"][-1], _fields(_locate(model, item["loc"][:-1])[1]))
        case "union_tag_invalid":
            kinds, tag = _kinds(annotation), item["ctx"]["tag"]
            return _join(path, "kind"), f"no kind {tag!r}{nearest(tag, kinds)}; there are: {', '.join(kinds)}"
        case "union_tag_not_found":
            return _join(path, "kind"), f"not set; choose one of: {', '.join(_kinds(annotation))}"
        case "invalid_key":
            return _locate(model, item["loc"][:-1])[0], f"the key {_show(item['input'])} is not text; put it in quotes"
        case "missing":
            return path, "not set, and it has no default"
        case _:
            return path, _words(item, annotation)


def _words(item: ErrorDetails, annotation: Any) -> str:
    kind, found, context = item["type"], _show(item["input"]), item.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return "\n".join(" ".join(line.split()) for line in str(context["error"]).splitlines())
    if kind in ("literal_error", "enum"):
        return f"expected {context['expected']}, got {found}{nearest(item['input'], _literals(annotation))}"
    if kind in _BOUND:
        limit, words = _BOUND[kind]
        return f"must {words.format(context[limit])}, got {context.get('actual_length', found)}"
    if kind != "string_pattern_mismatch" and (expected := _EXPECTED.get(kind.split("_")[0])):
        return f"expected {expected}, got {found}"
    return f"{item['msg'][:1].lower()}{item['msg'][1:]}, got {found}"


def _unknown(name: object, names: Sequence[str]) -> str:
    return f"no such setting{nearest(name, names) or '; there are: ' + ', '.join(names)}"


def _locate(model: type[BaseModel], location: Sequence[int | str]) -> tuple[str, Any]:
    """The dotted path as the user writes it, without pydantic's names of union members, and the type found there."""
    path, annotation = "", model
    for step in (step for step in location if step != "[key]"):
        shown, annotation = _descend(annotation, step)
        path = _join(path, str(step)) if shown else path
    return path, annotation


def _descend(annotation: Any, step: int | str) -> tuple[bool, Any]:
    """Whether the user sees this step, and the type below it (Any where it is not known)."""
    members = _members(annotation)
    if len(members) > 1:
        return False, next(
            (member for member in members if step in (*_kind(member), _tag(member) or _name(member))), Any
        )
    only, arguments = members[0], get_args(members[0])
    if _is_model(only):
        field = only.model_fields.get(str(step))
        return True, field.annotation if field else Any
    origin = get_origin(only)
    if origin is tuple and isinstance(step, int) and Ellipsis not in arguments:
        return True, arguments[step] if step < len(arguments) else Any
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return True, arguments[1]
    return isinstance(step, int) or only is Any, arguments[0] if arguments else Any


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a type, without None, those with a tag whole; the type alone when it is no union."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    alternatives = [member for member in get_args(annotation) if member is not type(None)]
    return [part for member in alternatives for part in ([member] if _tag(member) else _members(member))]


def _tag(annotation: Any) -> str:
    return next((part.tag for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Tag)), "")


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f"literal[{','.join(map(repr, get_args(annotation)))}]"
    return str(getattr(annotation, "__name__", annotation))


def _fields(annotation: Any) -> list[str]:
    return [name for member in _members(annotation) if _is_model(member) for name in member.model_fields]


def _kind(member: Any) -> tuple[str, ...]:
    field = member.model_fields.get("kind") if _is_model(member) else None
    return tuple(_literals(field.annotation)) if field else ()


def _kinds(annotation: Any) -> list[str]:
    return [kind for member in _members(annotation) for kind in _kind(member)]


def _literals(annotation: Any) -> list[str]:
    members = [member for member in _members(annotation) if get_origin(member) is Literal]
    return [str(value) for member in members for value in get_args(member)]


def _join(path: str, step: str) -> str:
    return f"{path}.{step}" if path else step


def _show(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = {"None": "nothing", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
