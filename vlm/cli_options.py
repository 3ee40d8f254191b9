"""Options that several verbs share."""

import click

from vlm.cli_help import File, Folder

file, folder = File(), Folder()
source = File(str)  # a path, an address, a pattern, a name on the hub
config_argument = click.argument("config", type=file)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
model_option = click.option(
    "--model",
    "-m",
    required=True,
    type=source,
    metavar="MODEL",
    help="The folder of a finished run, a published checkpoint (a folder or a file), or OWNER/NAME[@REVISION] of the "
    "Hugging Face hub.",
)


def _parts(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """NAME=SOURCE as a table."""
    pairs = [part.partition("=") for part in given]
    for part, (name, _equals, source) in zip(given, pairs, strict=True):
        if not name or not source:
            raise click.BadParameter(f"'{part}' is not NAME=SOURCE, such as vision=eva_vit_g.pth")
    names = [name for name, *_rest in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise click.BadParameter(f"{twice} is given {names.count(twice)} times")
    return {name: source for name, _equals, source in pairs}


part_option = click.option(
    "--part",
    "parts",
    multiple=True,
    callback=_parts,
    metavar="NAME=SOURCE",
    help="A part of a published checkpoint (vision, qformer, language) that lies elsewhere; may be repeated.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what the folder holds.")
json_option = click.option("--json", is_flag=True, help="Print JSON.")
