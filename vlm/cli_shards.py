"""`vlm shards`: the verbs that make and look at data sets. Arguments only, as in `vlm.cli`."""

from pathlib import Path
from typing import Any

import click

from vlm.cli_help import Verbs
from vlm.cli_options import config_argument, file, folder, json_option, overrides_argument, source

FEATURE_DTYPES = ("float16", "bfloat16", "float32")


def _allow_pipes(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given and not context.resilient_parsing:  # completing runs nothing
        from vlm.data.remote import allow_pipes

        context.with_resource(allow_pipes())


pipe_option = click.option(
    "--allow-pipe",
    is_flag=True,
    expose_value=False,
    callback=_allow_pipes,
    help="For shards named pipe:COMMAND, run COMMAND in a shell, with all that you may do; what it prints is the tar.",
)


@click.group(cls=Verbs)
def shards() -> None:
    """Write, check and look at data sets of pictures and captions."""


@shards.command()
@click.argument("source", nargs=-1, required=True, type=source, metavar="SOURCE...")
@click.argument("out", type=folder)
@click.option("--images", type=folder, help="Folder that the paths of pictures are relative to; the file's own if not.")
@click.option("--image-key", metavar="NAME", help="Column with the picture; of tars and folders its suffixes: jpg;png.")
@click.option("--caption-key", metavar="NAME", help="Column, or field of the json beside a picture, with the captions.")
@click.option("--id-key", metavar="NAME", help="Column or json field, equal where the same picture is shown.")
@click.option("--split", metavar="NAMES", help="Splits of Karpathy's JSON, such as train,restval.")
@click.option("--samples-per-shard", type=int, default=10_000, show_default=True, help="At most.")
@click.option("--max-mb", type=int, default=1000, show_default=True, help="Largest shard, in MiB.")
@click.option("--size", type=int, help="Shrink pictures to this shorter side; they become JPEG.")
@click.option("--quality", type=int, help="Re-encode all pictures as JPEG of this quality; 95 for those shrunk if not.")
@click.option("--no-check", is_flag=True, help="Do not decode pictures that are copied.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes that read and encode.")
@click.option(
    "--max-bad-fraction", type=click.FloatRange(0, 1), help="Stop above it; 0.05 of 100 and more if not given."
)
@click.option("--talks", is_flag=True, help="SOURCE is tars of conversations; in JSON and tables they are recognised.")
@click.option("--overwrite", is_flag=True, help="Replace the shards that OUT holds.")
@json_option
@pipe_option
def write(
    source: tuple[str, ...],
    out: Path,
    images: Path | None,
    image_key: str | None,
    caption_key: str | None,
    id_key: str | None,
    split: str | None,
    samples_per_shard: int,
    max_mb: int,
    size: int | None,
    quality: int | None,
    no_check: bool,
    workers: int,
    max_bad_fraction: float | None,
    talks: bool,
    overwrite: bool,
    json: bool,
) -> None:
    """Write any source of pictures and captions as tar shards.

    SOURCE is a folder of pictures with .txt beside them, a table (CSV, TSV, JSON lines, Parquet), COCO captions,
    Karpathy's JSON, Flickr30k's token file, LLaVA's conversations, or tar shards; its layout is recognised and printed.
    A sample is written as its picture, its captions (txt) and the source's further fields (json), nothing else; a
    conversation as its pictures KEY.0.jpg, KEY.1.jpg, … (KEY.jpg where it shows one) and KEY.json, which holds it.
    """
    from vlm.data.pictures import PICTURES
    from vlm.data.write import Recipe
    from vlm.data.write import write as run

    run(
        [f"{name}#{split}" if split else name for name in source],
        out,
        Recipe(samples_per_shard, max_mb, size, quality, not no_check),
        image=image_key or PICTURES,
        caption=f"json:{caption_key}" if caption_key else "txt;json:caption",
        id_field=id_key,
        images=images,
        workers=workers,
        max_bad_fraction=max_bad_fraction,
        overwrite=overwrite,
        json=json,
        talks=talks or None,
    )


@shards.command()
@config_argument
@click.argument("out", type=folder)
@overrides_argument
@click.option(
    "--dtype", type=click.Choice(FEATURE_DTYPES), default="float16", show_default=True, help="What is stored."
)
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes that read pictures.")
@click.option("--overwrite", is_flag=True, help="Replace the features that OUT holds.")
@pipe_option
def features(config: Path, out: Path, overrides: tuple[str, ...], dtype: str, workers: int, overwrite: bool) -> None:
    """Keep what a frozen image encoder gives, to train without it.

    Writes what CONFIG's encoder makes of data.train into OUT/train, of data.val into OUT/val; name them in their place.
    """
    from vlm.train.features import features as run

    run(config, list(overrides), out, dtype, workers, overwrite)  # type: ignore[arg-type]  # click checked the choice


@shards.command("check")
@click.argument("shards", nargs=-1, required=True, type=source, metavar="SHARDS...")
@click.option("--config", type=file, help="A config or run folder: its suffixes, template, tokenizer and limits.")
@click.option("--image", help="Suffixes of the pictures, such as jpg;png.")
@click.option("--caption", help="Where the captions stand, such as json:caption.")
@click.option("--min-side", type=click.IntRange(1), default=1, help="Shortest side of a picture, in pixels.")
@click.option("--tokenizer", type=file, help="A tokenizer, folder or file; counts captions above --max-tokens.")
@click.option("--max-tokens", type=click.IntRange(3), help="Longest text, with its start and end.")
@click.option("--max-bad-fraction", type=click.FloatRange(0, 1), help="Exit with 1 above this share; as in training.")
@click.option("--talks", is_flag=True, help="Conversations, as with data.kind=chats of a config.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes beside this one.")
@json_option
@pipe_option
def check_shards(shards: tuple[str, ...], **options: Any) -> None:
    """Count what is wrong with the samples.

    Errors make a sample unusable in training, notes do not. Exit code 0: healthy, 1: too many errors, 2: wrong input.
    """
    from vlm.eval.doctor import check

    click.get_current_context().exit(0 if check(list(shards), **options) else 1)


@shards.command("preview")
@click.argument("shards", nargs=-1, required=True, type=source, metavar="SHARDS...")
@click.option("--config", type=file, help="A config or run folder: shows tokens and what is supervised.")
@click.option(
    "--out", type=file, default="sheet.png", show_default=True, metavar="FILE", help="The contact sheet, .png or .jpg."
)
@click.option("--count", type=click.IntRange(1), default=12, show_default=True, help="Pictures on the sheet.")
@click.option("--texts", type=click.IntRange(0), default=3, show_default=True, help="Samples printed token by token.")
@pipe_option
def preview_shards(shards: tuple[str, ...], config: Path | None, out: Path, count: int, texts: int) -> None:
    """Show a few samples as the model sees them.

    Prints token, id and whether it is supervised; writes a contact sheet of pictures with their captions.
    """
    from vlm.eval.preview import preview

    preview(list(shards), config, out, count, texts)
