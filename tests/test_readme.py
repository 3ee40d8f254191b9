"""The README keeps its word: its commands parse, its error example is what is printed, its files exist, it is short."""

import re
import shlex
from pathlib import Path

import click
import pytest

from vlm.cli import app
from vlm.config.load import ConfigError, load
from vlm.config.schema import Run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.startswith("$ vlm ")]
COMMANDS = [re.split(r"  #| [|<>] ", line[2:])[0] for line in LINES]


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) < 200


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    verb, *arguments = shlex.split(command)[1:]
    found: click.Command = app.commands[verb]
    if isinstance(found, click.Group):
        verb, *arguments = arguments
        found = found.commands[verb]
    given = found.make_context(verb, arguments).params  # raises on an unknown option or a missing argument
    if verb in ("train", "config"):
        assert Path(given["config"]).suffix == ".yaml" and (ROOT / given["config"]).is_file()


def test_commands_of_the_error_example_print_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    block = next(block for block in BLOCKS if "no such setting" in block)
    command, *printed = block.splitlines()
    config, *overrides = shlex.split(command)[3:]
    with pytest.raises(ConfigError) as caught:
        load(Run, Path(config), overrides)
    assert caught.value.problems == printed


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(click.UsageError):
        app.commands["evaluate"].make_context("evaluate", ["x.tar", "--model", "run", "--no-such-option"])


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and all((ROOT / link).exists() for link in links if "://" not in link)
