"""No file, name or setting of a stranger runs anything, whatever verb meets it; each ends as it should, in words."""

import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.command import Commands, commands
from tests.faults.attacks import COMMAND, FILES, PICKLE, RUNS, SHARDS, YAML, Attack
from tests.tiny import settings, squares, write_config

pytestmark = pytest.mark.slow
ATTACKS = SHARDS | FILES | RUNS


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GOPEN_REWRITE", "s.tar=pipe:touch marker;cat s.tar")  # webdataset would rewrite names by it
        patch.setenv("GOPEN_PIPE", "1")
        with commands(tmp_path_factory.mktemp("commands")) as runner:
            yield runner


@pytest.fixture(scope="module")
def ready(vlm: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard, a config and a finished run."""
    folder = tmp_path_factory.mktemp("ready")
    squares(folder / "s.tar")
    write_config(folder / "c.yaml", settings("qformer", Path("s.tar")))
    assert vlm("train", "c.yaml", "--out", "run", folder=folder).code == 0
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_executed(vlm: Commands, ready: Path, tmp_path: Path, name: str) -> None:
    attack: Attack = ATTACKS[name]
    for number, words in enumerate(attack.commands):
        place = tmp_path / str(number)
        shutil.copytree(ready, place)
        attack.make(place)
        done = vlm(*words, folder=place)
        assert "Traceback" not in done.err, (words, done.err)
        expected = (attack.code, 1) if words[:2] == ("shards", "check") else (attack.code,)  # 1: something to report
        assert done.code in expected, (words, done.code, done.err)
        assert attack.told in done.err + done.out, (words, done.err)
        assert [path.name for path in tmp_path.rglob("marker*")] == [], words


def test_there_are_many() -> None:
    assert len(ATTACKS) >= 25


def test_the_attacks_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vlm refuses does run where it is taken."""
    monkeypatch.chdir(tmp_path)
    for way in (
        lambda: pickle.loads(PICKLE),
        lambda: yaml.unsafe_load(YAML),
        lambda: subprocess.run(["sh", "-c", COMMAND], check=True),
    ):
        way()
        assert os.listdir() == ["marker"]
        os.remove("marker")
