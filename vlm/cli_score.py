"""The verb `vlm score`: arguments only."""

from pathlib import Path

import click

from vlm.cli_help import Verb
from vlm.cli_options import file, folder, json_option, part_option, source


@click.command(cls=Verb)
@click.argument("results", type=file)
@click.argument("references", type=file)
@click.option(
    "--task", type=click.Choice(["captions", "vqa"]), default="captions", show_default=True, help="What RESULTS are."
)
@click.option("--partial", is_flag=True, help="Score what is there where some results are missing.")
@click.option(
    "--corpus",
    type=file,
    metavar="FILE",
    help="References of a larger set, whose document frequencies CIDEr-D takes: for one image, or a few.",
)
@click.option("--no-java", is_flag=True, help="Leave METEOR and SPICE out, which take a Java runtime.")
@click.option(
    "--model", "-m", type=source, metavar="MODEL", help="An encoder for CLIPScore: as --model of vlm evaluate."
)
@click.option("--images", type=folder, metavar="FOLDER", help="Where the pictures are that REFERENCES names.")
@part_option
@json_option
def score(
    results: Path,
    references: Path,
    task: str,
    partial: bool,
    corpus: Path | None,
    no_java: bool,
    model: str | None,
    images: Path | None,
    parts: dict[str, str],
    json: bool,
) -> None:
    """Score captions or answers that any tool wrote.

    RESULTS is COCO's result file, a list of {image_id, caption}, or JSON lines of it; REFERENCES its annotations of
    captions. With --task vqa: {question_id, answer}, and VQA's annotations or JSON lines of question and answers.
    """
    from vlm.eval.score import score_results, score_vqa

    if task == "captions":
        score_results(results, references, json, partial, corpus, not no_java, model, images, parts)
    elif corpus or model or images:
        raise click.UsageError("--corpus, --model and --images are for captions, not for --task vqa")
    else:
        score_vqa(results, references, json, partial)
