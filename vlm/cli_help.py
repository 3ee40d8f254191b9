"""Verbs whose help is a manual page: examples and exit status below the options. And paths that a shell completes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vlm.cli_examples import EXAMPLES, EXIT
from vlm.doctor.variables import VARIABLES


class Verb(click.Command):
    """Its help ends with what `vlm.cli_examples` has for it, and its exit status."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """After the options."""
        write_sections(ctx, formatter)
        super().format_epilog(ctx, formatter)


class Verbs(click.Group):
    """A group of such verbs: `command()` makes them, and its own help has the same sections."""

    command_class = Verb

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """After the verbs."""
        write_sections(ctx, formatter)
        super().format_epilog(ctx, formatter)


def write_sections(ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Examples, each a line to copy with its explanation below; then the exit codes and, of vlm, the variables."""
    verb = ctx.command_path.partition(" ")[2]
    if verb in EXAMPLES:
        with formatter.section("Examples"):
            for example in EXAMPLES[verb]:
                formatter.write(f"{'':>{formatter.current_indent}}$ {example.command}\n")
                with formatter.indentation(), formatter.indentation():
                    formatter.write_text(example.meaning)
    codes = {**EXIT[""], **EXIT.get(verb, {})}
    with formatter.section("Exit status"):
        formatter.write_dl([(str(code), codes[code]) for code in sorted(codes)])
    if not verb:
        with formatter.section("Environment"):
            formatter.write_dl(list(VARIABLES.items()))


class File(click.types.StringParamType):
    """A path as it was typed, which the verb itself checks; a shell completes files and folders."""

    name, completes = "path", "file"

    def __init__(self, make: Callable[[str], Any] = Path) -> None:
        """`make`: of what was typed; `str` where other things than paths are allowed, such as addresses."""
        self.make = make

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Nothing is looked up."""
        return self.make(super().convert(value, param, ctx))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Asks the shell for its own paths."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type=self.completes)]


class Folder(File):
    """The same where only a folder makes sense."""

    completes = "dir"
