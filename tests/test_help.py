"""The help of every verb is a page with examples that parse and an exit status; a mistyped verb finds the nearest."""

import shlex

import click
import pytest
from click.testing import CliRunner

from tests.verbs import find, parse, verbs
from vlm.cli import app
from vlm.cli_examples import EXAMPLES, EXIT, Example
from vlm.doctor.variables import VARIABLES

VERBS = list(verbs())
COMMANDS = [(verb, example.command) for verb in VERBS for example in EXAMPLES.get(verb, ())]


def page(verb: str) -> str:
    found = CliRunner().invoke(app, [*verb.split(), "--help"], prog_name="vlm", env={"COLUMNS": "80"})
    assert found.exit_code == 0
    return found.output


def test_every_verb_has_examples() -> None:
    assert [verb for verb in VERBS if not EXAMPLES.get(verb)] == []
    assert set(EXIT) <= set(EXAMPLES)


@pytest.mark.parametrize(("verb", "command"), COMMANDS)
def test_examples_parse(verb: str, command: str) -> None:
    """Of a line for a shell, the part that runs vlm; it is of the verb that it stands with."""
    inner = command
    if inner.startswith('eval "$('):
        inner = inner.removeprefix('eval "$(').removesuffix(')"')
    words = shlex.split(inner, comments=True)
    end = next((i for i, word in enumerate(words) if word in (">", "&&", "|") and "vlm" in words[:i]), len(words))
    start = words.index("vlm")
    try:
        parse(shlex.join(words[start + 1 : end]))
    except click.exceptions.Exit as done:  # --help
        assert done.exit_code == 0
    typed = " ".join(words[start + 1 : end])
    others = [other for example in EXAMPLES[verb] for other in [example.command] if f"vlm {verb}" in other]
    assert typed.startswith(verb) or (others and command not in others)


@pytest.mark.parametrize("verb", VERBS)
def test_the_page(verb: str) -> None:
    text = page(verb)
    for example in EXAMPLES[verb]:
        assert f"\n  $ {example.command}\n      {example.meaning.split()[0]}" in text, "copied as it stands, explained"
    status = text.partition("\nExit status:\n")[2]
    assert [code for code in ("0", "1", "2", "130") if f"  {code} " not in status] == []
    assert max(map(len, text.splitlines())) <= 80
    before, options, after = text.partition("\nOptions:\n")
    assert before.startswith(f"Usage: vlm {verb}".rstrip()) and options and "\nExamples:\n" in after


def test_the_first_page_names_the_variables() -> None:
    text = page("")
    assert all(name in text.partition("\nEnvironment:\n")[2] for name in VARIABLES)


def test_every_option_is_explained() -> None:
    silent = []
    for verb in VERBS:
        command, _ = find(verb.split())
        options = [one for one in command.params if isinstance(one, click.Option)]
        silent += [(verb, one.opts[0]) for one in options if not one.help]
    assert silent == []


@pytest.mark.parametrize(
    ("typed", "meant"), [("trian", "train"), ("docter", "doctor"), ("shards wite", "write"), ("modles", "models")]
)
def test_a_mistyped_verb(typed: str, meant: str) -> None:
    found = CliRunner().invoke(app, typed.split(), prog_name="vlm")
    assert found.exit_code == 2
    assert f"No such command '{typed.split()[-1]}'. Did you mean '{meant}'?" in found.stderr


def test_a_wrong_example_would_be_noticed() -> None:
    for wrong in ("evaluat x.tar", "evaluate x.tar -m run --no-such-option", "completion tcsh", "export run"):
        with pytest.raises(click.UsageError):
            parse(wrong)
    assert max(len(one.command) for page in EXAMPLES.values() for one in page) <= 76
    assert all(
        isinstance(one, Example) and one.meaning.endswith((".", ":", "?")) for p in EXAMPLES.values() for one in p
    )
