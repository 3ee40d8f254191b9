"""`vlm caption` as a process: pipes, signals, files it leaves, exit codes, and every message of a wrong call."""

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.captioning.conftest import pictures
from tests.command import Commands, Done, wait_for
from tests.data.web import serving
from tests.tiny import COLOURS, picture, squares

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NAMES = ["black", "blue", "green", "more/cyan", "more/purple", "orange", "red", "yellow"]


@pytest.fixture
def place(runs: Path, tmp_path: Path) -> Path:
    """A folder of its own with pictures and a model."""
    pictures(tmp_path / "p")
    for name, kind in (("run", "decoder"), ("clip", "clip")):  # whose encoder it took up
        (tmp_path / name).symlink_to(runs / kind)
    return tmp_path


def run(vlm: Commands, place: Path, line: str, stdin: str = "") -> Done:
    return vlm("caption", *shlex.split(line), "-m", "run", folder=place, stdin=stdin, network="forbidden")


def colours(text: str) -> list[str]:
    """Which pictures lines of text are about."""
    return [line.split("\t")[0].removeprefix("p/").removesuffix(".png") for line in text.splitlines()]


def test_every_way_to_name_pictures(vlm: Commands, place: Path) -> None:
    squares(place / "s.tar", 4)
    whole = run(vlm, place, "p")
    assert (whole.code, whole.err, colours(whole.out)) == (0, "", NAMES)
    texts = [line.split("\t")[1] for line in whole.out.splitlines()]
    assert sum(text == f"a {Path(name).name} square" for name, text in zip(NAMES, texts, strict=True)) >= 6
    assert run(vlm, place, "'p/**/*.png'").out.splitlines() == sorted(whole.out.splitlines())
    listed = "\n".join(f"p/{name}.png" for name in NAMES)
    assert run(vlm, place, "-", listed).out == whole.out
    assert run(vlm, place, "- -0", listed.replace("\n", "\0")).out == whole.out
    both = run(vlm, place, "p/red.png - s.tar --batch-size 3", "p/blue.png\n").out
    assert [line.split("\t")[0] for line in both.splitlines()] == [
        "p/red.png",
        "p/blue.png",
        *(f"s.tar/{i:04d}.png" for i in range(4)),
    ]


def test_every_format(vlm: Commands, place: Path) -> None:
    texts = dict(line.split("\t") for line in run(vlm, place, "p").out.splitlines())
    records = [json.loads(line) for line in run(vlm, place, "p --json").out.splitlines()]
    assert {one["image"]: one["caption"] for one in records} == texts
    assert {key for one in records for key in one} == {"image", "caption", "finish_reason", "tokens"}
    rows = list(csv.reader(io.StringIO(run(vlm, place, "p --format csv").out)))
    assert [row[:2] for row in rows[1:]] == [list(pair) for pair in texts.items()]
    coco = json.loads(run(vlm, place, "p --format coco").out)
    assert [one["caption"] for one in coco] == list(texts.values()) and coco[0]["image_id"] == "black"
    beside = run(vlm, place, "p --format sidecar")
    assert (beside.code, beside.out, beside.err) == (0, "", "")
    assert {name: Path(place, name).with_suffix(".txt").read_text() for name in texts} == {
        name: text + "\n" for name, text in texts.items()
    }


def test_bad_pictures_do_not_stop_it(vlm: Commands, place: Path) -> None:
    (place / "p" / "bad.png").write_bytes(b"\x89PNG and no more")
    done = run(vlm, place, "p - --json", "gone.png\np/red.png\n")
    records = {one["image"]: one for one in map(json.loads, done.out.splitlines())}
    assert done.code == 1 and list(records) == [
        "p/bad.png", *(f"p/{name}.png" for name in NAMES), "gone.png"
    ]  # fmt: skip
    assert records["p/bad.png"]["error"] == "not an image" and records["gone.png"]["error"] == "bad name"
    first, second, last = done.err.splitlines()
    assert first.startswith("vlm: p/bad.png: not an image (")
    assert second == "vlm: gone.png: bad name (no such file or folder)"
    assert last == "vlm: 2 of 11 pictures could not be captioned"
    quiet = run(vlm, place, "p -q")
    assert (quiet.code, len(quiet.out.splitlines())) == (1, 8)
    assert quiet.err == "vlm: 1 of 9 pictures could not be captioned\n"


def test_several_captions_and_options(vlm: Commands, place: Path) -> None:
    beams = run(vlm, place, "p/red.png --beams 4 --num-captions 3 --json")
    record = json.loads(beams.out)
    assert len(record["captions"]) == 3 and record["captions"][0]["caption"] == record["caption"]
    assert [one["score"] for one in record["captions"]] == sorted(
        (c["score"] for c in record["captions"]), reverse=True
    )
    cut = json.loads(run(vlm, place, "p/red.png --max-new 2 --json").out)
    assert (cut["tokens"], cut["finish_reason"]) == (2, "length")
    begun = json.loads(run(vlm, place, "p/red.png --prompt 'a blue' --json").out)
    assert begun["caption"].startswith("a blue")
    drawn = "p --temperature 3 --num-captions 2 --seed {} --batch-size {}"
    first = run(vlm, place, drawn.format(1, 8))
    assert first == run(vlm, place, drawn.format(1, 3)) != run(vlm, place, drawn.format(2, 8))
    assert len(first.out.splitlines()) == 16


def kill(name: str, lines: int) -> "object":
    """Kills the command when its output has so many lines."""

    def meanwhile(process: int, errors: Path) -> None:
        end = time.monotonic() + 60
        path = Path(name)
        while time.monotonic() < end and (not path.is_file() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)

    return meanwhile


@pytest.mark.parametrize(("format", "file"), [("jsonl", "o"), ("text", "o"), ("csv", "o"), ("coco", "o.part")])
def test_a_killed_run_goes_on(format: str, file: str, vlm: Commands, place: Path) -> None:
    many = place / "many"
    many.mkdir()
    for i in range(100):
        (many / f"{i:03d}.png").write_bytes(picture(COLOURS[i % 8], shift=i // 8))
    command = ["caption", "many", "-m", "run", "--format", format, "--batch-size", "1"]
    assert vlm(*command, "-o", "whole", folder=place).code == 0
    killed = vlm(*command, "-o", "o", folder=place, meanwhile=kill(str(place / file), 5))  # type: ignore[arg-type]
    assert killed.code == -signal.SIGKILL and (place / file).read_bytes().count(b"\n") >= 5
    assert vlm(*command, "-o", "o", folder=place).code == 2
    again = vlm(*command, "-o", "o", "--skip-existing", folder=place)
    assert (again.code, again.err, (place / "o").read_bytes()) == (0, "", (place / "whole").read_bytes())


IGNORED = pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="a shell's background job")


@pytest.mark.parametrize("end", [pytest.param(signal.SIGINT, marks=IGNORED), signal.SIGTERM])
def test_a_watched_folder(end: signal.Signals, vlm: Commands, place: Path) -> None:
    inbox = place / "inbox"
    inbox.mkdir()
    (inbox / "old.png").write_bytes(picture("red"))

    def arrive(process: int, errors: Path) -> None:
        wait_for(errors, "watching inbox")
        (place / "draft").write_bytes(picture("blue"))
        (place / "draft").replace(inbox / "new.png")
        (inbox / "bad.png").write_bytes(b"no picture")
        wait_for(place / "o", "new.png")
        wait_for(errors, "bad.png")
        os.kill(process, end)

    (place / "o").touch()
    done = vlm("caption", "-m", "run", "--watch", "inbox", "-o", "o", folder=place, meanwhile=arrive)
    assert (done.code, (place / "o").read_text()) == (1, "inbox/new.png\ta blue square\n")
    assert done.err.splitlines()[-1] == "vlm: 1 of 2 pictures could not be captioned"


def test_addresses_only_when_asked_for(vlm: Commands, place: Path) -> None:
    with serving() as site:
        site.files = {"/red.png": picture("red")}
        refused = run(vlm, place, f"{site.url}/red.png")
        assert (refused.code, refused.err) == (2, f"vlm: {site.url}/red.png: an address; --allow-url has it fetched\n")
        done = vlm("caption", f"{site.url}/red.png", "--allow-url", "-m", "run", folder=place)
        assert (done.code, done.out) == (0, f"{site.url}/red.png\ta red square\n")
        lost = vlm("caption", f"{site.url}/blue.png", "--allow-url", "-m", "run", folder=place)
        assert lost.code == 1 and "cannot be fetched (the server answers 404 Not Found" in lost.err


def test_head_ends_it_quietly(place: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m vlm caption p p p p p p -m run --batch-size 1; echo $? >&2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"({command}) | head -n 1"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "p/black.png\ta black square\n" and done.stderr == "141\n"


WRONG = [
    ("p --format xml", "Invalid value for --format: 'xml' is not one of"),
    ("p --json --format csv", "--json is --format jsonl: leave it out, or --format csv"),
    ("", "Missing argument 'IMAGE...'"),
    ("p -o nowhere/o.txt", "vlm: --output nowhere/o.txt: no such folder: nowhere"),
    ("p -o p", "vlm: --output p: is a folder; name a file in it"),
    (
        "p -o full.txt",
        "vlm: --output full.txt: exists already; --skip-existing goes on with it, --overwrite replaces it",
    ),
    (
        "p -o full.txt --json --skip-existing",
        "vlm: --output full.txt: line 1 is no line of --format jsonl; take another",
    ),
    ("p --skip-existing", "vlm: --skip-existing without --output FILE or --format sidecar"),
    ("'*.bmp'", "vlm: *.bmp: matches no picture and no .tar (.bmp, "),
    ("nothing.png", "vlm: nothing.png: no such file or folder"),
    ("empty", "vlm: empty: no picture in this folder (.bmp, "),
    ("http://localhost/a.png", "vlm: http://localhost/a.png: an address; --allow-url has it fetched"),
    ("p --beams 3 --temperature 1", "vlm: --beams 3 with --temperature 1: beams are not drawn; give one of them"),
    ("p --beams 3 --num-captions 4", "vlm: --num-captions 4 of --beams 3: at most as many as there are beams"),
    (
        "p --num-captions 2",
        "vlm: --num-captions 2: there is one likeliest caption; draw (--temperature) or give --beams",
    ),
    ("p --ask what?", "vlm: --ask: run was trained on captions (pairs), not to answer questions"),
    ("p --device gpu", "vlm: --device gpu: "),
    ("--watch nowhere", "vlm: --watch nowhere: no such folder"),
    ("- -", "vlm: - is named 2 times: there is one standard input"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_what_is_refused_before_anything_starts(line: str, message: str, vlm: Commands, place: Path) -> None:
    (place / "full.txt").write_text("something else\n")
    (place / "empty").mkdir()
    done = run(vlm, place, line)
    assert (done.code, done.out) == (2, "")
    assert message.replace("'", "") in " ".join(done.err.replace("'", "").split())
    assert (place / "full.txt").read_text() == "something else\n"


def test_a_list_that_is_none(vlm: Commands, place: Path) -> None:
    done = run(vlm, place, "-", "p/red.png\0p/blue.png\0")
    message = "vlm: standard input: no list of names, it holds zero bytes; for `find -print0` give --null\n"
    assert (done.code, done.out, done.err) == (2, "", message)


def test_no_standard_input(place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{shlex.quote(sys.executable)} -m vlm caption - -m run <&-"
    done = subprocess.run(
        ["sh", "-c", command], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        2,
        "vlm: -: there is no standard input: Bad file descriptor\n",
    )


def test_a_name_is_one_line_to_the_terminal_too(vlm: Commands, place: Path) -> None:
    (place / "p" / "bad\nname\x1b[31m.png").write_bytes(b"no")
    done = run(vlm, place, "p")
    assert done.code == 1 and len(done.err.splitlines()) == 2
    assert done.err.startswith("vlm: p/bad\\nname\\x1b[31m.png: not an image")


def test_standard_output_that_is_closed(place: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m vlm caption p -m run >&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command], check=False, cwd=place, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "vlm: standard output is closed, and results go there\n")


def test_sidecars_are_not_lost(vlm: Commands, place: Path) -> None:
    (place / "p" / "red.txt").write_text("written by hand\n")
    done = run(vlm, place, "p --format sidecar")
    assert done.code == 1 and "vlm: p/red.png: has a text already (p/red.txt; --skip-existing or" in done.err
    assert run(vlm, place, "p --format sidecar --skip-existing").code == 0
    assert (place / "p" / "red.txt").read_text() == "written by hand\n"
    assert run(vlm, place, "p --format sidecar --overwrite").code == 0
    assert (place / "p" / "red.txt").read_text() == "a red square\n"
