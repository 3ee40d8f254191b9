"""`vlm index` and `vlm search` as processes: pipes, kills at any moment, two at once, and what they refuse."""

import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import Commands, commands
from tests.tiny import picture
from vlm.search.manifest import opened
from vlm.search.store import Store
from vlm.search.update import form_of

KILLS = int(os.environ.get("VLM_TEST_KILLS", "5"))
Put = Callable[..., Path]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ready(vlm: Commands, runs: Path, tmp_path_factory: pytest.TempPathFactory, put: Put) -> Path:
    """Pictures and an index of them by `clip`."""
    folder = tmp_path_factory.mktemp("ready")
    put(folder / "pictures", {f"{colour}.png": picture(colour) for colour in ("red", "green", "blue", "cyan")})
    done = vlm("index", "pictures", "index", "--model", runs / "clip", folder=folder)
    assert (done.code, done.out) == (0, "index: 4 files, 4 different pictures; 4 added, 4 encoded\n"), done.err
    return folder


def refused(vlm: Commands, folder: Path, *arguments: object, stdin: str = "") -> str:
    """The one message of a refusal that leaves everything as it was."""
    before = snapshot(folder)
    done = vlm(*arguments, folder=folder, stdin=stdin)
    assert (done.code, done.out) == (2, "") and "Traceback" not in done.err, done.err
    assert snapshot(folder) == before
    return done.err.strip()


def test_a_pipeline(vlm: Commands, ready: Path) -> None:
    done = vlm("search", "index", "a blue square", "--top", 2, "-0", folder=ready)
    assert done.code == 0 and done.err == ""
    found = done.out.split("\0")
    assert len(found) == 3 and found[2] == "" and all((ready / path).is_file() for path in found[:2])
    lines = vlm("search", "index", "-", "--json", "--top", 1, folder=ready, stdin="a red square\na cyan square\n").out
    assert [json.loads(line)["query"] for line in lines.splitlines()] == ["a red square", "a cyan square"]


# --- kills -----------------------------------------------------------------------------------------------------------


def stored(index: Path) -> int:
    """Vectors in an index, however it was left; a connection of its own rolls back what was not committed."""
    if not (index / "index.sqlite").exists():
        return 0
    with opened(index, write=True) as manifest:
        store = Store(index, manifest, form_of(manifest.meta()))
        rows = sum(len(piece) for piece in store.read(manifest.parts()))
        assert rows == store.rows()
        return rows


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_lost(vlm: Commands, runs: Path, tmp_path: Path, put: Put) -> None:
    count = 400 * KILLS
    pictures = {f"{i % 7}/{i:05d}.png": picture(f"#{i * 40503 % 2**24:06x}", 600) for i in range(count)}
    put(tmp_path / "pictures", {**pictures, "0/bad.png": b"no picture"})
    draw, index, before, grown = random.Random(6), tmp_path / "index", 0, 0
    arguments = ("index", "pictures", "index", "--model", runs / "clip", "--json")

    def kill(process: int, _: Path) -> None:
        wanted, end = before + draw.randint(0, 100), time.monotonic() + 300
        while seen() <= wanted and time.monotonic() < end and os.path.exists(f"/proc/{process}/stat"):
            os.sched_yield()
        time.sleep(draw.uniform(0, 0.2))  # the moment itself: somewhere within what comes next
        os.kill(process, signal.SIGKILL)

    def seen() -> int:
        """What the index holds by its files, without disturbing it."""
        return sum(file.stat().st_size for file in index.glob("vectors-*")) // (16 * 2)

    for _ in range(KILLS):
        done = vlm(*arguments, folder=tmp_path, meanwhile=kill)
        assert done.code == -signal.SIGKILL, done.err
        now = stored(index)
        assert now >= before
        before, grown = now, grown + (now > before)
    assert grown > 0 and before < count
    last = vlm(*arguments, folder=tmp_path)
    told = json.loads(last.out)
    assert last.code == 1 and told["bad"] == 1 and "0/bad.png: not an image" in last.err
    assert told["encoded"] == count - before and told["files"] == count == stored(index)
    assert vlm("index", "pictures", "whole", *arguments[3:], folder=tmp_path).code == 1
    query = ("a red square", "--top", count, "--json")
    ours, theirs = (vlm("search", name, *query, folder=tmp_path).out.splitlines() for name in ("index", "whole"))
    assert len(ours) == count
    scores = [{json.loads(line)["path"]: json.loads(line)["score"] for line in lines} for lines in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert not list(index.glob(".*.tmp"))


@pytest.mark.slow
def test_two_writers(vlm: Commands, runs: Path, tmp_path: Path, put: Put) -> None:
    put(tmp_path / "pictures", {f"{i:04d}.png": picture(f"#{i * 40503 % 2**24:06x}", 40) for i in range(300)})
    (tmp_path / "other").mkdir()
    arguments = ("index", "pictures", "index", "--model", runs / "clip")
    with commands(tmp_path / "other") as other:
        answers = []

        def meanwhile(process: int, errors: Path) -> None:
            end = time.monotonic() + 120
            while not (tmp_path / "index" / "index.sqlite").exists():
                assert time.monotonic() < end, errors.read_text()
                os.sched_yield()
            os.kill(process, signal.SIGSTOP)  # it lives, and holds the folder for as long as this takes
            answers.append((process, other(*arguments, folder=tmp_path)))
            os.kill(process, signal.SIGCONT)

        assert vlm(*arguments, folder=tmp_path, meanwhile=meanwhile).code == 0
    ((owner, answer),) = answers
    assert answer.code == 2
    assert answer.err == f"vlm: index is in use by another job (process {owner}): wait for it, or stop it\n"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_no_index(vlm: Commands, ready: Path) -> None:
    make = "make one with vlm index FOLDER... INDEX --model MODEL"
    assert refused(vlm, ready, "search", "nowhere", "x") == f"vlm: nowhere: no such folder; {make}"
    assert refused(vlm, ready, "search", "pictures", "x") == f"vlm: pictures: no index (it has no index.sqlite); {make}"
    assert refused(vlm, ready, "index", "pictures") == (
        "vlm: pictures: no index (it has no index.sqlite); to make one: vlm index FOLDER... pictures --model MODEL"
    )


def test_an_index_that_cannot_be_made(vlm: Commands, ready: Path, runs: Path) -> None:
    model = ("--model", runs / "clip")
    assert refused(vlm, ready, "index", "pictures", "new") == "vlm: new: no index yet; a new one needs --model MODEL"
    assert refused(vlm, ready, "index", "pcitures", "new", *model) == "vlm: pcitures: no such folder of pictures"
    assert refused(vlm, ready, "index", "pictures", "pictures", *model) == (
        "vlm: pictures: is there and is no index; name a folder that is new or empty"
    )
    decoder = runs / "decoder"
    assert refused(vlm, ready, "index", "pictures", "new", "--model", decoder) == (
        f"vlm: {decoder} was trained without itc, so it cannot say how near a picture is to words"
    )
    assert refused(vlm, ready, "index", "index", "--dtype", "float32") == (
        "vlm: --dtype float32: index holds float16; encode all pictures again with --rebuild"
    )


def test_nothing_to_look_for(vlm: Commands, ready: Path) -> None:
    assert refused(vlm, ready, "search", "index") == (
        "vlm: nothing to look for: give words, --image FILE, or - for queries on standard input"
    )
    assert refused(vlm, ready, "search", "index", " ") == refused(vlm, ready, "search", "index")
    assert refused(vlm, ready, "search", "index", "-", stdin="x\n") == (
        "vlm: - reads many queries: paths alone would not say which of them they answer; add --json"
    )
    assert refused(vlm, ready, "search", "index", "-", "--json", "--open") == (
        "vlm: --open shows what one query finds, and - reads many: leave one of them away"
    )
    assert "--null ends paths, and --json prints records" in refused(vlm, ready, "search", "index", "x", "-0", "--json")


def test_a_model_without_a_matching_head(vlm: Commands, ready: Path, runs: Path) -> None:
    assert refused(vlm, ready, "search", "index", "x", "--rerank", 3) == (
        f"vlm: --rerank: {runs / 'clip'} was trained without itm, so it has no matching head"
    )
    assert refused(vlm, ready, "search", "index", "--image", "pictures/red.png", "--rerank", 3) == (
        "vlm: --rerank asks how well words and pictures match: give words"
    )


def test_a_query_picture_that_is_none(vlm: Commands, ready: Path) -> None:
    assert refused(vlm, ready, "search", "index", "--image", "x.jpg") == "vlm: x.jpg: No such file or directory"
    found = refused(vlm, ready, "search", "index", "--image", "index/index.sqlite")
    assert found.startswith("vlm: --image index/index.sqlite: not an image (no JPEG, PNG")


def test_another_model(vlm: Commands, ready: Path, runs: Path) -> None:
    other = runs / "other"
    message = (
        f"vlm: index: {other} has other weights than the model it was made with; name that one, or encode all pictures "
        f"again: vlm index index --model {other} --rebuild"
    )
    assert refused(vlm, ready, "search", "index", "x", "--model", other) == message
    assert refused(vlm, ready, "index", "index", "--model", other) == message


def test_a_model_that_was_moved(vlm: Commands, ready: Path, runs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (runs / "clip").rename(moved)
    try:
        lines = refused(vlm, ready, "search", "index", "x").splitlines()
        assert lines[-1] == "index was made with it; if it is elsewhere now, say where: --model MODEL"
        assert vlm("search", "index", "a red square", "--model", moved, folder=ready).code == 0
    finally:
        moved.rename(runs / "clip")


def damaged(index: Path, how: str) -> None:
    part, table = next(index.glob("vectors-*")), index / "index.sqlite"
    if how == "cut":
        part.write_bytes(part.read_bytes()[:-3])
    elif how == "missing":
        part.unlink()
    elif how == "noise":
        part.write_bytes(os.urandom(part.stat().st_size))
    elif how == "table":
        table.write_bytes(b"SQLite format 3\0" + bytes(200) + os.urandom(4000))
    else:
        with sqlite3.connect(table) as sql:
            sql.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "damaged (cut off, or other vectors): encode all pictures again with vlm index INDEX --rebuild"),
        ("missing", "missing: encode all pictures again with vlm index INDEX --rebuild"),
        ("noise", "damaged ("),
        ("table", "damaged (file is not a database); delete the index and make it anew"),
        ("version", "an index of version 99, not 1: delete it and make it anew"),
    ],
)
def test_a_damaged_index(vlm: Commands, runs: Path, tmp_path: Path, put: Put, how: str, message: str) -> None:
    put(tmp_path / "pictures", {"red.png": picture("red"), "blue.png": picture("blue")})
    assert vlm("index", "pictures", "index", "--model", runs / "clip", folder=tmp_path).code == 0
    damaged(tmp_path / "index", how)
    assert message in refused(vlm, tmp_path, "search", "index", "a red square")
    if how in ("cut", "missing", "noise"):
        again = vlm("index", "index", "--rebuild", folder=tmp_path)
        assert again.code == 0 and vlm("search", "index", "a red square", folder=tmp_path).code == 0
