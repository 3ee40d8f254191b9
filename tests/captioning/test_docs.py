"""docs/caption.md: its commands run, and it is short."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import folders
from tests.command import Commands
from tests.tiny import pack, picture

PAGE = (Path(__file__).parents[2] / "docs" / "caption.md").read_text(encoding="utf-8")
COMMANDS = [line[2:].split("  #")[0].split(" # ")[0] for line in PAGE.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    folders.blip2(folder / "blip2-opt", "opt")
    for name in ("photos", "shards"):
        (folder / name).mkdir()
    for i, seen in enumerate(folders.photographs(2)):
        seen.save(folder / "photos" / f"{i}.png")
    pack(folder / "shards" / "000.tar", [("a.png", picture("red")), ("a.txt", b"red")])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, place: Path, vlm: Commands) -> None:
    before, _, last = command.rpartition(" | ")
    listed = subprocess.run(
        ["sh", "-c", before or "true"], cwd=place, capture_output=True, text=True, check=True
    ).stdout
    done = vlm(*shlex.split(last)[1:], folder=place, stdin=listed, network="forbidden")
    assert (done.code, done.err) == (0, "")
    assert bool(done.out) == ("sidecar" not in command)


def test_there_are_commands_and_it_is_short() -> None:
    assert len(COMMANDS) >= 6 and len(PAGE.splitlines()) < 100
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and all((Path(__file__).parents[2] / "docs" / link).exists() for link in links)
