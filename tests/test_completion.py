"""Completion as each shell asks for it, in processes of their own: verbs, options, choices, paths; without torch."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.test_imports import HEAVY
from tests.verbs import find, verbs

ROOT = Path(__file__).parent.parent
SHELLS = ("bash", "zsh", "fish")
WATCH = """
import sys
from vlm.cli import main
sys.argv = ["vlm"]
try:
    main()
finally:
    print("loaded:", *sorted({heavy} & set(sys.modules)), file=sys.stderr)
"""


def complete(shell: str, *words: str) -> list[tuple[str, str]]:
    """Kind and value of each completion of the last word, as the shell's script would get them."""
    asked = {
        "COMP_WORDS": " ".join(("vlm", *words)),
        "COMP_CWORD": str(len(words)),
        "_VLM_COMPLETE": f"{shell}_complete",
    }
    if shell == "fish":
        asked["COMP_CWORD"] = words[-1]
    command = [sys.executable, "-c", WATCH.format(heavy=HEAVY)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "loaded:\n")
    lines = done.stdout.splitlines()
    if shell == "zsh":  # three lines each
        return list(zip(lines[::3], lines[1::3], strict=True))
    if shell == "fish":
        lines = [line.partition("\t")[0] for line in lines]
    return [(kind, value) for kind, _, value in (line.partition(",") for line in lines)]


def plain(shell: str, *words: str) -> set[str]:
    found = complete(shell, *words)
    assert {kind for kind, _ in found} <= {"plain"}
    return {value for _, value in found}


@pytest.mark.parametrize("shell", SHELLS)
def test_what_is_completed(shell: str) -> None:
    assert plain(shell, "sha") == {"shards"}
    assert plain(shell, "shards", "pre") == {"preview"}
    assert plain(shell, "train", "x.yaml", "--over") == {"--overwrite", "--overfit"}
    assert plain(shell, "export", "run", "out", "--dtype", "") == {"float32", "float16", "bfloat16"}
    assert plain(shell, "export", "run", "out", "--dtype", "bf") == {"bfloat16"}
    assert plain(shell, "completion", "") == set(SHELLS)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("train", "configs/ti"), "file"),
        (("train", "x.yaml", "--out", "ru"), "dir"),
        (("quickstart", "--out", "ru"), "dir"),
        (("caption", "a.jpg", "--model", "runs/"), "file"),
        (("caption", "pho"), "file"),
        (("evaluate", "sha"), "file"),
        (("export", "ru"), "file"),
        (("export", "run", "ou"), "dir"),
        (("shards", "write", "my_"), "file"),
        (("shards", "check", "a.tar", "--config", "c"), "file"),
        (("shards", "features", "c.yaml", "ou"), "dir"),
        (("config", "configs/"), "file"),
    ],
)
def test_paths_are_left_to_the_shell(shell: str, words: tuple[str, ...], kind: str) -> None:
    assert complete(shell, *words) == [(kind, words[-1])]


def test_what_is_called_a_file_is_completed_as_one() -> None:
    """Parameters whose help says FILE, of any verb; none is left to folders alone."""
    asked = [(verb, one) for verb in verbs() for one in find(verb.split())[0].params if one.metavar == "FILE"]
    assert asked
    for verb, one in asked:
        (item,) = one.type.shell_complete(click.Context(find(verb.split())[0]), one, "")
        assert item.type == "file", f"{verb} {one.opts}"


def test_completing_runs_nothing() -> None:
    """An option that acts when it is given does not while a line is completed."""
    assert complete("bash", "train", "--allow-pipe", "con") == [("file", "con")]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_that_of_the_variable(shell: str) -> None:
    """`vlm completion SHELL` and click's own `_VLM_COMPLETE=SHELL_source vlm` print the same."""
    module = [sys.executable, "-m", "vlm"]
    printed = subprocess.run([*module, "completion", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    environment = {**os.environ, "_VLM_COMPLETE": f"{shell}_source"}
    other = subprocess.run(module, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert printed.stdout == other.stdout and printed.stderr == ""
    assert f"_VLM_COMPLETE={shell}_complete" in printed.stdout


def test_in_a_bash(tmp_path: Path) -> None:
    """The script itself, in the shell that every machine has."""
    vlm = tmp_path / "vlm"
    vlm.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vlm "$@"\n')
    vlm.chmod(0o755)
    lines = [
        'eval "$(vlm completion bash)"',
        "complete -p vlm",
        "COMP_WORDS=(vlm shards w) COMP_CWORD=2",
        "_vlm_completion vlm",
        'echo "${COMPREPLY[@]}"',
    ]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["complete -o nosort -F _vlm_completion vlm", "write"]
