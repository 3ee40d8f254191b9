"""`vlm caption`: arguments only, as in `vlm.cli`."""

from pathlib import Path
from typing import Any

import click

from vlm.cli_help import Verb
from vlm.cli_options import file, folder, model_option, part_option, source

FORMATS = ("text", "jsonl", "csv", "coco", "sidecar")
DTYPES = ("auto", "float32", "bfloat16", "float16")
WRITING = (
    *("prompt", "ask", "captions", "beams", "length_penalty", "temperature", "top_k", "top_p", "max_new", "min_new"),
    *("no_repeat_ngram", "repetition_penalty", "seed"),
)


@click.command(cls=Verb)
@click.argument("images", nargs=-1, type=source, metavar="IMAGE...")
@model_option
@part_option
@click.option(
    "--null", "-0", is_flag=True, help="The list on standard input is separated by zero bytes (find -print0)."
)
@click.option("--allow-url", is_flag=True, help="Fetch IMAGEs that are http:// or https:// addresses.")
@click.option("--watch", type=folder, metavar="FOLDER", help="Go on with pictures that arrive there, until Ctrl-C.")
@click.option(
    "--format", type=click.Choice(FORMATS), help="text (unless given): IMAGE, tab, caption; sidecar: IMAGE.txt."
)
@click.option("--json", is_flag=True, help="Short for --format jsonl.")
@click.option("--output", "-o", type=file, metavar="FILE", help="Write there, not to standard output.")
@click.option("--skip-existing", is_flag=True, help="Leave out what FILE has captions of, or what has a sidecar.")
@click.option("--overwrite", is_flag=True, help="Replace FILE, or sidecars.")
@click.option("--ask", metavar="QUESTION", help="What to answer about each image, by a model that answers questions.")
@click.option("--prompt", default="", metavar="TEXT", help="What every caption begins with.")
@click.option(
    "--num-captions", "captions", type=int, default=1, metavar="N", help="Of each image: drawn, or best beams."
)
@click.option("--max-new", type=int, help="Tokens of the longest caption; the model's own limit unless given.")
@click.option("--min-new", type=int, default=0, help="Tokens of the shortest caption.")
@click.option("--beams", type=int, metavar="N", help="Search with N beams.")
@click.option("--length-penalty", type=float, help="Of beams: above 0 favours long captions, below 0 short ones.")
@click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token; above 0 draws.")
@click.option("--top-k", type=int, help="Draw among the k likeliest tokens.")
@click.option("--top-p", type=float, help="Draw among the likeliest tokens that reach this probability.")
@click.option("--seed", type=int, default=0, help="Of the draws.")
@click.option("--no-repeat-ngram", type=int, default=0, metavar="N", help="Never write the same N tokens twice.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 makes used tokens less likely.")
@click.option("--batch-size", type=int, metavar="N", help="Images captioned together; as many as fit unless given.")
@click.option("--workers", type=int, metavar="N", help="Threads that decode images; one a core, up to 8, unless given.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; the best unless given.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", help="auto: bf16 for large models where it is fast."
)
@click.option("--exact", is_flag=True, help="Decode every JPEG at full size, however small the model's pictures are.")
@click.option(
    "--quiet", "-q", is_flag=True, help="Say nothing on standard error of single images; the exit code tells."
)
def caption(
    model: str, images: tuple[str, ...], parts: dict[str, str], json: bool, format: str | None, **options: Any
) -> None:
    """Describe images, or answer a question about each.

    IMAGE is a file, a folder, a quoted pattern ('photos/**/*.jpg'), a tar shard, an address (--allow-url), or - for a
    list on standard input. Captions come in order, as soon as they are there. Images that fail are
    named and counted on standard error; the rest is done.
    """
    watch: Path | None = options["watch"]
    if not images and watch is None:
        raise click.UsageError("Missing argument 'IMAGE...'.")
    if json and format not in (None, "jsonl"):
        raise click.UsageError(f"--json is --format jsonl: leave it out, or --format {format}")
    from vlm.captioning.wishes import Words, Work

    words = Words(**{name: options.pop(name) for name in WRITING})
    work = Work(format="jsonl" if json else format or "text", **options)  # type: ignore[arg-type]  # click checked it
    from vlm.captioning.run import caption as describe

    describe(model, list(images), words, work, parts)
