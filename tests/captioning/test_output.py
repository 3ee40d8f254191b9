"""Lines of each format, and files that a run which was killed at any byte goes on with."""

import csv
import io
import json
from pathlib import Path

import pytest

from vlm.captioning import output
from vlm.captioning.formats import NotOurs, Result, image_id, key, key_of, lines
from vlm.captioning.inputs import Named
from vlm.captioning.wishes import Format, Work
from vlm.data.image import BadSample
from vlm.model.describe import Caption


def said(name: str, *texts: str) -> Result:
    return Result(name, [Caption(text, None, 3, "stop") for text in texts or ("a cat",)])


def named(name: str) -> Named:
    return Named(name, lambda: b"", Path(name).with_suffix(".txt"))


def filled(path: Path, format: Format, results: list[Result], captions: int = 1, **work: bool) -> None:
    sink = output.opened(Work(format=format, output=path, **work), captions)  # type: ignore[arg-type]
    for result in results:
        if not sink.has(named(result.name)):
            sink.put(result)
    sink.end()


BAD = Result("b.png", error=BadSample("not an image", "no PNG"))
LOST = Result("c.png", error=FileNotFoundError(2, "No such file or directory", "c.png"))


def test_lines_of_each_format() -> None:
    cat = Result("a\t1.png", [Caption('a "big\n cat"', -0.51236, 4, "length"), Caption("a dog", -1.0, 2, "stop")])
    assert lines(cat, "text") == 'a\\t1.png\ta "big cat"\na\\t1.png\ta dog\n'
    assert lines(cat, "csv") == 'a\\t1.png,"a ""big cat""",length\na\\t1.png,a dog,stop\n'
    assert lines(cat, "coco") == '{"image_id": 1, "caption": "a \\"big cat\\""}\n'
    best = {"caption": 'a "big\n cat"', "finish_reason": "length", "tokens": 4, "score": -0.5124}
    second = {"caption": "a dog", "finish_reason": "stop", "tokens": 2, "score": -1.0}
    assert json.loads(lines(cat, "jsonl")) == {"image": "a\t1.png", **best, "captions": [best, second]}
    assert lines(BAD, "jsonl") == '{"image": "b.png", "error": "not an image", "detail": "no PNG"}\n'
    assert json.loads(lines(LOST, "jsonl"))["detail"] == "No such file or directory"
    assert [lines(BAD, format) for format in ("text", "csv", "coco")] == ["", "", ""]
    asked = Result("a.png", said("a.png").captions, question="what?")
    assert json.loads(lines(asked, "jsonl"))["question"] == "what?"


def test_names_that_are_not_utf8_stay_json() -> None:
    line = lines(said("\udcff.png", "naïve"), "jsonl")
    assert line.encode() and json.loads(line)["image"] == "\udcff.png"
    assert lines(said("é.png"), "jsonl").startswith('{"image": "é.png"')


@pytest.mark.parametrize(
    ("name", "number"),
    [("COCO_val2014_000000391895.jpg", 391895), ("a/b/000012.png", 12), ("cat.jpg", "cat"), ("s.tar/7.png", 7)],
)
def test_numbers_of_coco(name: str, number: int | str) -> None:
    assert image_id(name) == number


@pytest.mark.parametrize("format", ["text", "jsonl", "csv", "coco"])
@pytest.mark.parametrize("name", ["a.png", "a, b.png", 'a "b".png', "a\nb.png", "12.png"])
def test_a_line_tells_its_picture(format: Format, name: str) -> None:
    (line,) = lines(said(name), format).splitlines()
    assert key(line, format) == key_of(name, format)
    with pytest.raises(NotOurs):
        key("something else", format)


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("format", ["text", "jsonl", "csv"])
def test_a_file_cut_at_any_byte_becomes_whole(
    format: Format, captions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of them would wait for the disk
    results = [said(f"{i}.png", *["a cat", "an “ö”"][:captions]) for i in range(3)]
    filled(tmp_path / "whole", format, results, captions)
    whole, cut = (tmp_path / "whole").read_bytes(), tmp_path / "cut"
    for end in range(len(whole) + 1):
        cut.write_bytes(whole[:end])
        filled(cut, format, results, captions, skip_existing=True)
        assert cut.read_bytes() == whole, end


def test_what_failed_is_tried_again_and_what_is_done_is_not(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    filled(path, "jsonl", [said("a.png"), BAD])
    filled(path, "jsonl", [said("a.png", "another"), said("b.png")], skip_existing=True)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["image"], one.get("caption")) for one in records] == [
        ("a.png", "a cat"),
        ("b.png", None),
        ("b.png", "a cat"),
    ]


def test_csv_has_one_header(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    filled(path, "csv", [said("a,b.png")])
    filled(path, "csv", [said("c.png")], skip_existing=True)
    rows = list(csv.reader(io.StringIO(path.read_text())))
    assert rows == [["image", "caption", "finish_reason"], ["a,b.png", "a cat", "stop"], ["c.png", "a cat", "stop"]]


def test_coco_is_whole_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.json"
    sink = output.opened(Work(format="coco", output=path), 1)
    sink.put(said("1.png"))
    assert not path.exists()  # killed here
    with pytest.raises(ValueError, match=r"o\.json\.part: exists already"):
        output.check(Work(format="coco", output=path))
    del sink
    filled(path, "coco", [said("1.png", "other"), said("cat.png")], skip_existing=True)
    assert json.loads(path.read_text()) == [
        {"image_id": 1, "caption": "a cat"},
        {"image_id": "cat", "caption": "a cat"},
    ]
    filled(path, "coco", [said("1.png"), said("2.png"), said("x/002.png")], skip_existing=True)
    assert [one["image_id"] for one in json.loads(path.read_text())] == [1, "cat", 2, 2]
    assert (
        capsys.readouterr().err
        == f"vlm: {path}: 1 image_id(s) stand for several pictures, by the ends of their names\n"
    )
    filled(path, "coco", [], overwrite=True)
    assert json.loads(path.read_text()) == [] and list(tmp_path.iterdir()) == [path]


def test_coco_tells_of_pictures_that_share_a_number_with_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.json"
    filled(path, "coco", [said("a/1.png")])
    filled(path, "coco", [said("a/1.png"), said("b/1.png")], skip_existing=True)
    assert len(json.loads(path.read_text())) == 1
    assert "1 picture(s) were taken for done, as their image_id is there" in capsys.readouterr().err


def test_a_sidecar_is_of_one_picture_and_never_the_picture(tmp_path: Path) -> None:
    for suffix in ("png", "BMP"):
        (tmp_path / f"a.{suffix}").write_bytes(b"")
    (tmp_path / "pic.txt").write_bytes(b"a picture")
    for wish in ({}, {"overwrite": True}, {"skip_existing": True}):
        sink = output.opened(Work(format="sidecar", **wish), 1)
        with pytest.raises(BadSample, match="its text would be that of another picture too"):
            sink.has(named(str(tmp_path / "a.png")))
        with pytest.raises(BadSample, match="its text would take its own place"):
            sink.has(named(str(tmp_path / "pic.txt")))


def test_coco_on_standard_output(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    for results in ([said("1.png"), BAD, said("2.png")], []):
        sink = output.opened(Work(format="coco"), 1)
        for result in results:
            sink.put(result)
        sink.end()
        found = json.loads(capsysbinary.readouterr().out)
        assert found == [{"image_id": i + 1, "caption": "a cat"} for i in range(len(results) - bool(results))]


def test_sidecars(tmp_path: Path) -> None:
    picture = str(tmp_path / "a.png")
    sink = output.opened(Work(format="sidecar"), 2)
    assert not sink.has(named(picture))
    sink.put(said(picture, "a cat", "a  big\ncat"))
    assert (tmp_path / "a.txt").read_text() == "a cat\na big cat\n"
    with pytest.raises(BadSample, match="has a text already"):
        sink.has(named(picture))
    with pytest.raises(BadSample, match="text cannot be written"):  # another picture of that name was faster
        sink.put(said(picture, "another"))
    with pytest.raises(BadSample, match="nothing can stand beside it"):
        sink.has(Named("s.tar/a.png", lambda: b""))
    assert output.opened(Work(format="sidecar", skip_existing=True), 1).has(named(picture))
    again = output.opened(Work(format="sidecar", overwrite=True), 1)
    assert not again.has(named(picture))
    again.put(said(picture, "another"))
    assert (tmp_path / "a.txt").read_text() == "another\n" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(BadSample, match="text cannot be written"):
        again.put(said(str(tmp_path / "gone" / "a.png")))


def refused(work: Work) -> str:
    with pytest.raises(ValueError) as caught:
        output.check(work)
        output.opened(work, 1)
    return str(caught.value)


def test_files_that_are_not_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "o"
    assert refused(Work(output=tmp_path)) == f"--output {tmp_path}: is a folder; name a file in it"
    assert refused(Work(output=path / "o")) == f"--output {path / 'o'}: no such folder: {path}"
    assert refused(Work(output=Path("/dev/full"))) == "--output /dev/full: is no plain file; take another one"
    path.touch()
    output.check(Work(output=path))  # empty, as mktemp makes it
    path.write_text("a.png\ta cat\n")
    remedy = "--skip-existing goes on with it, --overwrite replaces it"
    assert refused(Work(output=path)) == f"--output {path}: exists already; {remedy}"
    assert refused(Work(output=path, format="jsonl", skip_existing=True)) == (
        f"--output {path}: line 1 is no line of --format jsonl; take another file"
    )
    assert refused(Work(output=path, format="coco", skip_existing=True)) == (
        f"--output {path}: holds no array of COCO's results; take another file"
    )
    with output.locked(path):
        assert refused(Work(output=path, skip_existing=True)) == (f"--output {path}: another process is writing it now")
    assert path.read_text() == "a.png\ta cat\n"


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "locked", lambda _: Full())
    sink = output.opened(Work(output=tmp_path / "o"), 1)
    with pytest.raises(OSError, match=r"/o: No space left on device; what was written before stays"):
        sink.put(said("a.png"))
