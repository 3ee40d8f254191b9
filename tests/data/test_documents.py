"""Documents from every kind of file, what is counted as unusable, and when too much of it stops a pass."""

import gzip
import io
import json
import os
import runpy
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.shard_files import write
from vlm.data import documents
from vlm.data.documents import Documents

DEMO = Path(__file__).parents[2] / "demos" / "python_text.py"


def _lines(path: Path, *records: Any) -> Path:
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _texts(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_every_kind_of_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes("\ufeffone\r\n\n two \n".encode())
    _lines(tmp_path / "a.jsonl", *_texts("a0", "a1"))
    _lines(tmp_path / "b.jsonl.gz", *_texts("b0", "b1"))
    write(tmp_path / "c.tar", [{"__key__": "x", "txt": "c0"}, {"__key__": "y", "json": {"text": "c1", "n": 1}}])
    (tmp_path / "README").write_text("no document")
    folder = Documents(str(tmp_path))
    assert list(folder) == list(folder) == ["a0", "a1", "b0", "b1", "c0", "c1", "one\r\n\n two \n"]
    assert not folder.bad
    assert list(Documents([str(tmp_path / "c.tar"), str(tmp_path / "{b.jsonl.gz,a.jsonl}")])) == [
        "c0", "c1", "b0", "b1", "a0", "a1",
    ]  # fmt: skip
    assert list(Documents(str(tmp_path / "[ab].json*"))) == ["a0", "a1", "b0", "b1"]
    assert list(Documents([str(tmp_path), str(tmp_path / "a.jsonl")])) == list(folder)


def test_braces_of_numbers_and_of_folders(tmp_path: Path) -> None:
    for i in range(3):
        _lines(tmp_path / f"{i:03d}.jsonl", {"body": f"n{i}"})
        (tmp_path / f"f{i}").mkdir()
        (tmp_path / f"f{i}" / "x.txt").write_text(f"f{i}")
    assert list(Documents(str(tmp_path / "{000..002}.jsonl"), field="body")) == ["n0", "n1", "n2"]
    assert list(Documents(str(tmp_path / "f{0..1}"))) == ["f0", "f1"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1))
def test_json_lines_give_the_texts_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = _lines(tmp_path_factory.mktemp("d") / "a.jsonl", *_texts(*texts))
    assert list(Documents(str(path))) == texts


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "cut', "unreadable json"),
        (b"[1]", "unreadable json"),
        (b"[" * 100_000, "unreadable json"),
        ({"txt": "x"}, "no text"),
        ({"text": None}, "no text"),
        ({"text": ["x"]}, "not text"),
        ({"text": " \n\t"}, "empty"),
    ],
)
def test_bad_records_are_counted_and_named(
    record: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = Documents(str(_lines(tmp_path / "a.jsonl", {"text": "x"}, b"", record, {"text": "y"})))
    for _ in range(2):  # each pass counts anew
        assert list(found) == ["x", "y"] and found.bad == {reason: 1}
    assert f"a.jsonl, line 3: {reason}" in caplog.messages[0]


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    assert list(Documents(str(_lines(tmp_path / "a.jsonl", b'{"text": "a\\ud800b\\u00e9"}')))) == ["a?bé"]


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 20)
    just, over = b'{"text": "12345678"}', b'{"text": "123456789"}'
    assert len(just) == 20
    path = _lines(tmp_path / "a.jsonl", just, over, over * 7, just)
    (tmp_path / "b.txt").write_text("x" * 21)
    _tar(tmp_path / "c.tar", {"a.txt": b"x" * 20, "b.txt": b"x" * 21})
    found = Documents(str(tmp_path))
    assert list(found) == ["12345678", "12345678", "x" * 20] and found.bad == {"too large": 4}
    path.write_bytes(just * 3)  # no line end at all
    assert list(found) == ["x" * 20]


def test_too_many_bad_ones_stop(tmp_path: Path) -> None:
    path = str(_lines(tmp_path / "a.jsonl", *_texts(*["x"] * 90), *[{"no": 1}] * 10))
    with pytest.raises(ValueError, match=r"10 of 100 samples are unusable \(no text: 10\).*max_bad_fraction=0.05"):
        list(Documents(path))
    assert len(list(Documents(path, max_bad_fraction=0.1))) == 90


def test_a_misspelt_field_names_what_is_there(tmp_path: Path) -> None:
    path = str(_lines(tmp_path / "a.jsonl", *[{"content": "x", "id": 3}] * 3))
    with pytest.raises(ValueError, match=r"no document is usable; .*line 1: no text \(field='text' is not among con"):
        list(Documents(path))
    with pytest.raises(ValueError, match=r"no document is usable; the files are empty"):
        list(Documents(str(_lines(tmp_path / "b.jsonl"))))


def test_samples_of_a_tar(tmp_path: Path) -> None:
    members = {
        "README": b"no sample", ".hidden.txt": b"no sample", "f/a.json": b'{"text": "no"}', "f/a.TXT": b"txt wins",
        "g/a.jpg": b"?", "b.txt": b"\xff", "c.json": b'{"text": "c"}', "c.jpg": b"?",
        "../up.txt": b"up", "/abs.txt": b"abs",
    }  # fmt: skip
    folder = tmp_path / "in"
    folder.mkdir()
    _tar(folder / "s.tar", members)
    with tarfile.open(folder / "s.tar", "a:") as tar:
        link = tarfile.TarInfo("l.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        again = tarfile.TarInfo("d.txt")
        again.size = 1
        tar.addfile(again, io.BytesIO(b"d"))
        tar.addfile(again, io.BytesIO(b"e"))
    found = Documents(str(folder))
    assert list(found) == ["txt wins", "c", "up", "abs", "d"]
    assert found.bad == {"no text": 1, "not UTF-8": 1, "comes twice": 1}
    assert os.listdir(folder) == ["s.tar"] and os.listdir(tmp_path) == ["in"]


def test_a_tar_cut_anywhere_keeps_what_is_whole(tmp_path: Path) -> None:
    path = _tar(tmp_path / "s.tar", {f"{i}.txt": bytes([65 + i]) * 700 for i in range(3)})
    whole, texts = path.read_bytes(), [chr(65 + i) * 700 for i in range(3)]
    assert list(Documents(str(path))) == texts
    _lines(tmp_path / "z.jsonl", {"text": "z"})
    for cut in range(0, 3 * 1536 + 1024, 100):
        path.write_bytes(whole[:cut])
        found = Documents(str(tmp_path))
        got = list(found)
        assert found.bad == {"damaged file": 1}
        assert got == [*texts[: len(got) - 1], "z"] and len(got) - 1 >= cut // 1536 - 1  # at most the last one is lost
    path.write_bytes(whole[: 1536 + 100] + b"?" * 20 + whole[1536 + 120 :])  # a header in the middle
    found = Documents(str(path))
    assert list(found) == texts[:1] and found.bad == {"damaged file": 1}


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    path = _lines(tmp_path / "a.jsonl.gz", *_texts(*(f"{i}" * 50 for i in range(2000))))
    path.write_bytes(path.read_bytes()[:-100])
    found = Documents(str(path))
    assert 0 < len(list(found)) < 2000 and found.bad["damaged file"] == 1
    path.write_bytes(b"not compressed")
    with pytest.raises(ValueError, match=r"no document is usable; .*a.jsonl.gz: damaged file"):
        list(found)


def test_wrong_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pdf").touch()
    Path("empty").mkdir()
    for spec, message in (
        ("pipe:touch owned.txt", "no commands or addresses"),
        ("https://example.org/{0..9}.jsonl", "no commands or addresses"),
        ("b.jsonl", "no file matches b.jsonl"),
        ("*.pdf", "a.pdf: not a file of documents; their names end in one of .txt"),
        ("empty", "no .txt or .jsonl or .jsonl.gz or .tar file in empty; that folder is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            Documents(spec)
    with pytest.raises(ValueError, match="no documents given"):
        Documents([])
    assert sorted(os.listdir()) == ["a.pdf", "empty"]


def test_a_file_that_went_away(tmp_path: Path) -> None:
    path = _lines(tmp_path / "a.jsonl", {"text": "x"})
    found = Documents(str(path))
    path.unlink()
    with pytest.raises(ValueError, match=r"a.jsonl: cannot be read: No such file"):
        list(found)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    _lines(tmp_path / "a.jsonl", {"text": "x"})
    Documents(str(tmp_path))
    (tmp_path / "b.tar").write_bytes(b"no tar")
    stream = iter(Documents([str(tmp_path / "a.jsonl"), str(tmp_path / "b.tar")]))
    assert next(stream) == "x"


def test_the_demo_writes_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdlib_module_names", frozenset({"json", "email", "textwrap", "concurrent"}))
    demo: Any = runpy.run_path(str(DEMO))["main"]
    found = []
    for name in ("one", "two"):
        demo(str(tmp_path / name), val=0.2)
        found.append({split: list(Documents(str(tmp_path / name / f"{split}.jsonl"))) for split in ("train", "val")})
    texts = found[0]["train"] + found[0]["val"]
    assert found[0] == found[1] and len(texts) == len(set(texts))
    assert 0.1 < len(found[0]["val"]) / len(texts) < 0.3
    assert sum("JSON (JavaScript Object Notation)" in text for text in texts) == 1
    counts = capsys.readouterr().out.splitlines()
    assert counts[0] == f"train: {len(found[0]['train']):,} documents, {sum(map(len, found[0]['train'])):,} characters"
