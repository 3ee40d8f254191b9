"""The verbs of `vlm`, and command lines as click understands them."""

import shlex
from collections.abc import Iterator

import click

from vlm.cli import app


def verbs(group: click.Group = app, before: str = "") -> Iterator[str]:
    """Every verb as it is typed, groups too; "" is vlm itself."""
    yield before.strip()
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, f"{before} {name}")
        else:
            yield f"{before} {name}".strip()


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The verb that a command line names, and the words after it. UsageError where there is none."""
    found: click.Command = app
    while isinstance(found, click.Group) and words and not words[0].startswith("-"):
        if words[0] not in found.commands:
            raise click.UsageError(f"No such command '{words[0]}'.")
        found, words = found.commands[words[0]], words[1:]
    return found, words


def parse(command: str) -> click.Context:
    """The context of what stands after `vlm` as click makes it: raises on an unknown verb, option or choice."""
    found, words = find(shlex.split(command))
    return found.make_context(found.name, words)
