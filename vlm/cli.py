"""The verbs: arguments only. A verb imports what it runs, so that help and wrong arguments cost no torch.

Results go to stdout, all else to stderr. Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlm import __version__

app = typer.Typer(
    name="vlm",
    help="Train, evaluate and use vision-language models.",
    epilog="VLM_TRACEBACK=1 shows where in the code an error arose.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A settings file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as train.steps=100.", show_default=False),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"vlm {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/quickstart"),
    overwrite: Overwrite = False,
) -> None:
    """Train, evaluate and caption in minutes.

    Uses the pictures that come with the package; writes metrics.json and an HTML report.
    """
    from vlm.quickstart.run import quickstart as run

    run(out, overwrite=overwrite)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/ and the config's name")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train what a config describes."""
    from vlm.train.run import train as run

    run(config, overrides or [], out=out or Path("runs", config.stem), resume=resume, overwrite=overwrite)


@app.command()
def caption(
    run: RunFolder,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, or - for a list on standard input.")
    ],
    json: Json = False,
) -> None:
    """Describe images."""
    from vlm.eval.run import caption as describe

    describe(run, images, json=json)


@app.command()
def evaluate(
    run: RunFolder,
    shards: Annotated[
        list[str],
        typer.Argument(metavar="SHARDS...", help="Tar files, folders of them, or patterns such as {000..003}.tar."),
    ],
    json: Json = False,
) -> None:
    """Measure image-text retrieval.

    Recall at 1, 5 and 10, text to image and image to text.
    """
    from vlm.eval.run import evaluate as measure

    measure(run, shards, json=json)


@app.command("config")
def show_config(config: Config, overrides: Overrides = None) -> None:
    """Check a config and print all its settings."""
    from vlm.config.load import dump, load
    from vlm.config.schema import Run

    typer.echo(dump(load(Run, config, overrides or [])), nl=False)


def main() -> None:
    """Run the verb on the command line; what the user can mend becomes one message instead of a traceback."""
    try:
        app(prog_name="vlm")
    except (ValueError, OSError) as error:
        if os.environ.get("VLM_TRACEBACK"):
            raise
        print(_message(error), file=sys.stderr)
        sys.exit(1 if isinstance(error, OSError) and not isinstance(error, _WRONG_INPUT) else 2)


_WRONG_INPUT = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def _message(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"vlm: {error.filename}: {error.strerror}"
    # Lines of a ConfigError begin with the file they are about, as a compiler's do.
    return str(error) if hasattr(error, "problems") else f"vlm: {error}"
