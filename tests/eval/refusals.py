"""Files of an evaluation, and commands that are refused."""

from pathlib import Path

from tests.command import Commands

FILES = ["metrics.json", "queries.json", "report.html", "values.safetensors"]


def refused(vlm: Commands, folder: Path, *arguments: object) -> str:
    before = set(folder.rglob("*"))
    done = vlm(*arguments, folder=folder)
    assert (done.code, done.out) == (2, ""), done.err
    assert set(folder.rglob("*")) == before
    return done.err.strip().splitlines()[-1]
