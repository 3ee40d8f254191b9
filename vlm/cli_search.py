"""`vlm index` and `vlm search`: arguments only, as in `vlm.cli`."""

from pathlib import Path

import click

from vlm.cli_help import Verb
from vlm.cli_options import file, folder, json_option, part_option, source

_MODEL = "The folder of a finished run, a published checkpoint, or OWNER/NAME[@REVISION] of the Hugging Face hub"


@click.command(cls=Verb)
@click.argument("folders", nargs=-1, type=folder, metavar="[FOLDER]...")
@click.argument("index", type=folder)
@click.option("--model", "-m", type=source, metavar="MODEL", help=f"{_MODEL}; INDEX remembers it.")
@part_option
@click.option("--dtype", type=click.Choice(["float16", "float32"]), help="Of the vectors; float16 in a new index.")
@click.option("--hidden/--no-hidden", default=None, help="Also pictures whose name, or a folder's, begins with a dot.")
@click.option(
    "--workers", type=click.IntRange(1), help="Threads that read pictures; one a core, at most 8, if not given."
)
@click.option("--rebuild", is_flag=True, help="Encode all pictures again, maybe with another model.")
@json_option
def index(
    folders: tuple[Path, ...],
    index: Path,
    model: str | None,
    parts: dict[str, str],
    dtype: str | None,
    hidden: bool | None,
    workers: int | None,
    rebuild: bool,
    json: bool,
) -> None:
    """Make an index of folders of pictures, or bring it up to date.

    The same command does both: only pictures that are new or have changed are encoded, those that were moved or copied
    are not. INDEX alone looks at the folders that it is of; FOLDER... are those that it is of from now on. A run that
    was stopped in any way goes on where it was. Exit code 1: some pictures cannot be read.
    """
    from vlm.search.update import Options
    from vlm.search.update import index as run

    whole = run(list(folders), index, Options(model, parts, dtype, hidden, workers, rebuild, json))
    click.get_current_context().exit(0 if whole else 1)


@click.command(cls=Verb)
@click.argument("index", type=folder)
@click.argument("words", nargs=-1)
@click.option("--image", type=file, metavar="FILE", help="Find pictures like this one; with words, both count.")
@click.option(
    "--weight", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Share of the words beside --image."
)
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, metavar="K", help="Paths at most.")
@click.option("--threshold", type=float, metavar="S", help="Only pictures of at least this score (a cosine).")
@click.option("--rerank", type=click.IntRange(1), metavar="K", help="Put the best K in order by ITM.")
@click.option("--exact", is_flag=True, help="Look at each vector, also in an index of more than a million.")
@click.option("--model", "-m", type=source, metavar="MODEL", help="Where the model of INDEX is now, if it was moved.")
@click.option("-0", "--null", is_flag=True, help="A NUL behind each path, for xargs -0.")
@json_option
@click.option("--open", "sheet", is_flag=True, help="Show a contact sheet; without a screen tell where it is.")
def search(
    index: Path,
    words: tuple[str, ...],
    image: Path | None,
    weight: float,
    top: int,
    threshold: float | None,
    rerank: int | None,
    exact: bool,
    model: str | None,
    null: bool,
    json: bool,
    sheet: bool,
) -> None:
    """Find pictures by words, by a picture, or by both.

    Prints the paths of the nearest ones, best first. INDEX is what `vlm index` has made. WORDS may be - for many
    queries on standard input, one a line, answered in order with --json.
    """
    if null and json:
        raise click.UsageError("--null ends paths, and --json prints records: leave one of them away")
    from vlm.search.query import Options, find

    find(index, words, Options(image, weight, top, threshold, rerank, exact, model, null, json, sheet))
