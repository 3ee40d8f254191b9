"""The verbs: arguments only. A verb imports what it runs, so that help and wrong arguments cost no torch.

Results go to stdout, all else to stderr. Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted, 143 terminated.
"""

import os
import sys
from json import dumps
from pathlib import Path
from typing import Literal

import click

from vlm import __version__
from vlm.cli_caption import caption
from vlm.cli_evaluate import compare, evaluate
from vlm.cli_help import Verb, Verbs
from vlm.cli_options import (
    config_argument,
    folder,
    json_option,
    overrides_argument,
    overwrite_option,
    part_option,
    source,
)
from vlm.cli_score import score
from vlm.cli_search import index, search
from vlm.cli_shards import pipe_option, shards


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, message="vlm %(version)s")
def app() -> None:
    """Train, evaluate and use vision-language models."""


@app.command()
@overrides_argument
@click.option("--out", type=folder, default="runs/quickstart", show_default=True, help="The run folder.")
@overwrite_option
def quickstart(overrides: tuple[str, ...], out: Path, overwrite: bool) -> None:
    """Train, evaluate and caption in minutes.

    Uses the pictures that come with the package; writes metrics.json and an HTML report. KEY=VALUE changes a setting of
    all stages, such as train.seed=1; model.language.mixer.kind=retention that of the one with a decoder.
    """
    from vlm.quickstart.run import quickstart as run

    run(out, overwrite=overwrite, overrides=overrides)


class _TrainCommand(Verb):
    """Takes `--resume` with or without `auto` after it: click alone would take any word there for its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        found: list[str] = []
        for word in args[:end]:
            if word == "auto" and found[-1:] == ["--resume=must"]:
                found[-1] = "--resume=auto"
            else:
                found.append("--resume=must" if word == "--resume" else word)
        return super().parse_args(ctx, found + args[end:])


@app.command(cls=_TrainCommand)
@config_argument
@overrides_argument
@click.option("--out", type=folder, help="The run folder; runs/ and the config's name unless given.")
@click.option(
    "--resume",
    type=click.Choice(["must", "auto"]),
    metavar="[auto]",
    help="Go on from the last checkpoint in the run folder; auto: start where there is none.",
)
@overwrite_option
@click.option(
    "--overfit",
    "few",
    type=click.IntRange(1),
    metavar="N",
    help="Only try whether the first N samples can be learned by heart; exit code 1 if not, and no run folder.",
)
@pipe_option
def train(
    config: Path, overrides: tuple[str, ...], out: Path | None, resume: str | None, overwrite: bool, few: int | None
) -> None:
    """Train what a config describes.

    CONFIG is a YAML file; KEY=VALUE changes a setting of it, such as train.steps=100. On several GPUs: torchrun
    --nproc-per-node 8 -m vlm train CONFIG …
    """
    place = out or Path("runs", config.stem)
    if few is not None:
        if resume or overwrite:
            raise click.UsageError("--overfit touches no run folder: give it without --resume and --overwrite")
        from vlm.train.overfit import overfit

        sys.exit(not overfit(config, list(overrides), place, few))
    from vlm.train.run import train as run

    chosen: bool | Literal["auto"] = "auto" if resume == "auto" else resume is not None
    run(config, list(overrides), out=place, resume=chosen, overwrite=overwrite)


@app.command()
@click.argument("model", type=source)
@click.argument("out", type=folder)
@part_option
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the weights; unchanged.")
@click.option(
    "--shard-gb",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Largest file of weights.",
)
@click.option("--adapters", is_flag=True, help="Only the adapters of a run (LoRA), as peft's folder.")
@overwrite_option
def export(
    model: str, out: Path, parts: dict[str, str], dtype: str | None, shard_gb: float, adapters: bool, overwrite: bool
) -> None:
    """Write a model as a folder that transformers opens.

    MODEL is the folder of a run, a published checkpoint, or OWNER/NAME[@REVISION] of the Hugging Face hub. Adapters
    come merged.
    """
    from vlm.export import export as run

    for line in run(model, out, parts, dtype, shard_gb, overwrite, adapters):
        click.echo(line, err=True)
    click.echo(out)


@app.command("config")
@config_argument
@overrides_argument
def show_config(config: Path, overrides: tuple[str, ...]) -> None:
    """Check a config and print all its settings."""
    from vlm.config.load import dump, load
    from vlm.config.schema import Run

    click.echo(dump(load(Run, config, overrides)), nl=False)


@app.command()
@json_option
def models(json: bool) -> None:
    """List the published systems.

    Their configs, whose files of weights are read, and what each was proven equal to.
    """
    from rich import print as show

    from vlm.models import as_json, as_table

    if json:
        click.echo(dumps(as_json(), indent=1))
    else:
        show(as_table())


@app.command()
@json_option
@click.option("--quick", is_flag=True, help="Versions and devices only: nothing is measured.")
def doctor(json: bool, quick: bool) -> None:
    """Look at what is installed and how fast it computes here, and say what to do.

    Versions beside those that are needed, what each extra gives, devices, measured rates of matrix products and of
    decoding, the environment variables that are read; then what is wrong and what is slow, each with its remedy.
    """
    from vlm.doctor.run import doctor as run

    sys.exit(not run(json=json, quick=quick))


@app.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what teaches a shell to complete verbs, options, choices and paths.

    It asks vlm at each press of the tab key, which takes a tenth of a second.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, shell
    click.echo(found(app, {}, "vlm", "_VLM_COMPLETE").source(), nl=False)


for command in (caption, evaluate, compare, score, index, search, shards):
    app.add_command(command)


def main() -> None:
    """Run the verb on the command line; what the user can mend becomes one message instead of a traceback."""
    if sys.stdout is None:
        print("vlm: standard output is closed, and results go there", file=sys.stderr)
        sys.exit(1)
    try:
        sys.exit(app(prog_name="vlm", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("VLM_TRACEBACK"):
            raise
        if message := _message(error):
            print(message, file=sys.stderr)
        sys.exit(1 if isinstance(error, OSError) and not isinstance(error, _WRONG_INPUT) else 2)
    except RuntimeError as error:
        # torch raises it out of a signal handler, so anywhere in the main process: only here is it caught for sure.
        if os.environ.get("VLM_TRACEBACK") or not str(error).startswith("DataLoader worker"):
            raise
        print(_message(OSError(_LOST_WORKER.format(str(error).partition(". ")[0]))), file=sys.stderr)
        sys.exit(1)


_LOST_WORKER = (
    "a process that reads the data has ended ({}). Where the system killed it, memory ran out: lower data.workers or "
    "data.cache_mb. A run goes on from its last checkpoint with --resume"
)
_WRONG_INPUT = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def _message(error: ValueError | OSError) -> str:
    """Of several processes (torchrun) each says what is its own; mistakes in the settings are said by the first."""
    rank = os.environ.get("RANK", "0")
    if hasattr(error, "problems"):  # lines of a ConfigError begin with the file they are about, as a compiler's do
        return str(error) if rank == "0" else ""
    who = "vlm" if rank == "0" else f"vlm, process {rank}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{who}: {error.filename}: {error.strerror}"
    return f"{who}: {error}"
