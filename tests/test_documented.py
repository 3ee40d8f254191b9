"""Every documented command runs: those of README.md and docs/ on tiny stand-ins, or it is named here with a reason."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path

import click
import pytest

from tests.command import Commands, Done
from tests.documented import FEW, PAGES, ROOT, Shown, copy, shown, world
from tests.verbs import find, parse
from vlm.doctor.packages import GIVES

# What a command starts with, and why it is not run here; a test that runs it elsewhere is named as file::function.
EXCEPTIONS = {
    "git clone": "needs the network; tests/test_quickstart.py::test_quickstart",
    "make demo-llava": "needs weights of a package registry; tests/test_demos.py::test_llava runs it on stand-ins",
    "pip install": "needs the network; the extra is looked up here",
    "du -h": "sizes of a run of 120 steps",
    "python demos/train_adapter.py": "tests/test_demos.py::test_train_adapter",
    "vlm evaluate coco.json": "5,000 pictures of COCO; tests/eval/test_protocol.py::test_another_size",
    "vlm evaluate dataset_coco.json": "5,000 pictures of COCO; tests/eval/test_protocol.py::test_another_size",
    "vlm evaluate wds_": "a benchmark's shards; tests/eval/test_protocol.py::test_another_split_of_a_folder",
    "vlm evaluate pictures.tar": "its model is any; tests/eval/test_zeroshot.py::test_numbers_without_names",
    "jq ": "a program of its own; what it reads: tests/eval/test_evaluate.py::test_figures_follow_from_the_values",
    "vlm search photos/.index --image cat.jpg": "in front of jq; tests/search/test_query.py::test_threshold_and_top",
}
# Whole pages that a test of their own runs, output and all.
ELSEWHERE = {"docs/published.md": "tests/test_published.py::test_the_page_s_commands_print_what_it_shows"}
# What stands for a machine that no test has.
SMALLER = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--nnodes 64": "--nnodes 2",
    "train.accumulate=8": "train.accumulate=2",
    "train.accumulate=512": "train.accumulate=4",
}
SHOWN = list(shown())
RUN = [one for one in SHOWN if one.page not in ELSEWHERE]
BLOCKS = [list(block) for _, block in groupby(RUN, key=lambda one: (one.page, one.block))]


def exception(command: str) -> str | None:
    return next((reason for start, reason in EXCEPTIONS.items() if command.startswith(start)), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, vlm: Commands) -> Path:
    folder = tmp_path_factory.mktemp("world") / "place"
    folder.mkdir()
    return world(folder, vlm)


def few(words: list[str]) -> list[str]:
    """The same with two small steps, if it trains."""
    return [*words, *FEW] if words[0] == "train" else words


def clear(words: list[str], folder: Path) -> None:
    """What the command is going to write is not there yet, though others were given it."""
    out = parse(shlex.join(words)).params.get("out")
    if out is None and words[0] == "train":
        out = Path("runs", Path(words[1]).stem)
    if out is None:
        return
    path = folder / out
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def run(command: str, folder: Path, vlm: Commands) -> list[Done]:
    """As it stands but for SMALLER and for fewer steps; of several processes, each."""
    for large, small in SMALLER.items():
        command = command.replace(large, small)
    if command.startswith("eval ") or re.search(r" [|<>] ", command):
        return [in_bash(command, folder)]
    words = shlex.split(command)
    if words[0] == "vlm":
        clear(words[1:], folder)
        return [vlm(*few(words[1:]), folder=folder, network="forbidden")]
    if words[0] == "torchrun":
        return torchrun(words, folder, vlm)
    words = [sys.executable if word == "python" else word for word in words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return [Done(done.returncode, done.stdout, done.stderr)]


def in_bash(command: str, folder: Path) -> Done:
    """What a shell has to take apart, at home in `folder`."""
    program = folder / "bin" / "vlm"
    for place in (program.parent, folder / ".zfunc", folder / ".config" / "fish" / "completions"):
        place.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vlm "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    own = {"HOME": str(folder), "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    shell = ["bash", "--norc", "-ec", command]
    done = subprocess.run(shell, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def torchrun(words: list[str], folder: Path, vlm: Commands) -> list[Done]:
    """Its processes as it would start them (tests/train/test_engine.py starts torchrun itself)."""
    own, inner = words[: words.index("-m")], words[words.index("-m") + 2 :]
    numbers = {name: int(value) for name, value in pairwise(own) if name in ("--nnodes", "--nproc-per-node")}
    machines = numbers.get("--nnodes", 1)
    clear(inner, folder)
    return vlm.together(machines * numbers["--nproc-per-node"], *few(inner), folder=folder, machines=machines)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0].page}-{block[0].block}")
def test_it_runs(block: list[Shown], place: Path, tmp_path: Path, vlm: Commands) -> None:
    """The commands of a block one after another in one folder, which holds a stand-in for all that they name."""
    folder = copy(place, tmp_path / "here")
    for one in block:
        if exception(one.command) is not None:
            continue
        for done in run(one.command, folder, vlm):
            assert "Traceback" not in done.err
            assert done.code == (2 if one.refused else 0), f"{one.command}\n{done.err}"
            if one.refused:
                assert done.err.splitlines() == list(one.printed)


def test_exceptions_are_few_and_true() -> None:
    """Each is of a command that there is; the test that it speaks of exists."""
    assert [start for start in EXCEPTIONS if not any(one.command.startswith(start) for one in SHOWN)] == []
    assert set(ELSEWHERE) <= {one.page for one in SHOWN}
    reasons = [*EXCEPTIONS.values(), *ELSEWHERE.values()]
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", " ".join(reasons)):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
    excepted = [one for one in RUN if exception(one.command) is not None]
    assert len(RUN) >= 28 and len(excepted) <= len(RUN) / 3


def test_extras_that_are_named_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"vlm\[(\w+)\]", text))
    assert len(named) >= 4 and named <= set(GIVES)


INLINE = re.compile(r"(?<!`)`(?:\$ )?(vlm [^`]+|make [a-z-]+[^`]*|python -m tests[\w.]*[^`]*)`(?!`)")


def inline() -> list[tuple[str, str]]:
    """Commands in the midst of sentences."""
    return [
        (page.name, found)
        for page in PAGES
        for found in INLINE.findall(page.read_text(encoding="utf-8").replace("\n", " "))
    ]


@pytest.mark.parametrize(("page", "command"), inline())
def test_commands_in_sentences_are_of_verbs_and_options_that_exist(page: str, command: str) -> None:
    words = command.replace("|", " ").split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), command
        return
    if words[0] == "python":
        assert (ROOT / Path(*words[2].split(".")).with_suffix(".py")).is_file(), command
        return
    verb, _ = find(words[1:])
    known = {"--help"} | {option for parameter in verb.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, command


def test_a_wrong_command_in_a_sentence_would_be_noticed() -> None:
    assert len(inline()) > 30
    with pytest.raises(click.UsageError):
        find(["evaluat", "x"])
