"""What names of pictures stand for, and that nothing is read before it is asked for."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.web import Site, cut, endless, failing, headed, page, serving
from tests.tiny import members, pack, picture
from vlm.captioning import inputs
from vlm.captioning.inputs import LONGEST, Given, Named, names_in
from vlm.data.image import BadSample


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b/c.webp", "b/d.txt", "b/.hidden.png", ".closed/e.png", "A.JPG", "z.png", "b.png", "s[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture("red"))
    (tmp_path / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(*names: str, stdin: bytes = b"", null: bool = False, allow_url: bool = False) -> Given:
    return Given(names, io.BytesIO(stdin), null, allow_url)


def named(*names: str, stdin: bytes = b"", null: bool = False) -> list[str]:
    return [each.name for each in given(*names, stdin=stdin, null=null)]


def fault(one: Named) -> str:
    with pytest.raises((BadSample, OSError)) as caught:
        one.read()
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["."], ["./A.JPG", "./b/c.webp", "./b.png", "./s[1].png", "./z.png"]),
        (["b/d.txt", "z.png"], ["b/d.txt", "z.png"]),  # named: tried
        (["*.png"], ["b.png", "s[1].png", "z.png"]),
        (["**/*.webp", "b"], ["b/c.webp", "b/c.webp"]),
        (["s[1].png"], ["s[1].png"]),  # a file of that name comes before the pattern
        (["?.JPG"], ["A.JPG"]),
        (["b/**"], ["b/c.webp"]),
    ],
)
def test_files_folders_and_patterns(folder: Path, names: list[str], found: list[str]) -> None:
    given(*names).check()
    assert named(*names) == found


def test_the_text_beside_a_picture(folder: Path) -> None:
    assert [one.beside for one in given("b", "z.png")] == [Path("b/c.txt"), Path("z.txt")]


@pytest.mark.parametrize(
    ("stdin", "null", "found"),
    [
        (b"z.png\n\nA.JPG\n", False, ["z.png", "A.JPG"]),
        (b"z.png\r\nA.JPG", False, ["z.png", "A.JPG"]),
        (b"z.png\0b\0", True, ["z.png", "b/c.webp"]),
        (b"", False, []),
    ],
)
def test_lists(folder: Path, stdin: bytes, null: bool, found: list[str]) -> None:
    assert named("-", stdin=stdin, null=null) == found


def test_names_with_line_breaks_and_other_bytes(folder: Path) -> None:
    odd = [b"a\nb.png", b"\xff\xfe.png"]
    for name in odd:
        Path(os.fsdecode(name)).write_bytes(picture("red"))
    found = list(given("-", stdin=b"\0".join(odd), null=True))
    assert [os.fsencode(one.name) for one in found] == odd and all(one.read() for one in found)


def test_bad_names_in_a_list_do_not_end_it(folder: Path) -> None:
    (folder / "empty").mkdir()
    found = list(given("-", stdin=b"none.png\nz.png\nempty\n*.png\nhttp://a/b.png\n-\n"))
    assert [one.name for one in found] == ["none.png", "z.png", "empty", "*.png", "http://a/b.png", "-"]
    assert [fault(one).split(" (")[0] for one in found if one.name != "z.png"] == ["bad name"] * 5
    assert fault(found[0]) == "bad name (no such file or folder)"
    assert fault(found[4]) == "bad name (an address; --allow-url has it fetched)"


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (picture("red"), "standard input: no list of names, it holds zero bytes; for `find -print0` give --null"),
        (b"a" * (LONGEST + 1), f"standard input: no list of names, one is longer than {LONGEST} bytes"),
    ],
)
def test_what_is_no_list(stdin: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        list(given("-", stdin=stdin))
    assert str(caught.value) == message


class Endless(io.RawIOBase):
    """A list without end that counts what was read of it."""

    def __init__(self) -> None:
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        self.count += 1
        return f"{self.count}.png\n{self.count}".encode()


def test_a_list_is_read_as_it_is_asked_for() -> None:
    stream = Endless()
    names: Iterator[str] = names_in(stream, null=False)
    assert [next(names) for _ in range(3)] == ["1.png", "12.png", "23.png"]
    assert stream.count == 3


def test_shards(folder: Path) -> None:
    tar = pack(folder / "s.tar", [*members(2), ("x/README", b"no")])
    found = list(given("s.tar"))
    assert [one.name for one in found] == ["s.tar/0000.png", "s.tar/0001.png"]
    assert [one.read() for one in found] == [members(2)[0][1], members(2)[2][1]]
    assert all(one.beside is None for one in found)
    assert named("*.tar") == ["s.tar/0000.png", "s.tar/0001.png"]
    tar.write_bytes(tar.read_bytes()[:2600])
    whole, damaged = given("s.tar")
    assert whole.read() and fault(damaged).startswith("damaged shard (")
    assert damaged.name == "s.tar"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "none.png: no such file or folder"),
        ("*.bmp", "*.bmp: matches no picture and no .tar (.bmp, "),
        ("empty", "empty: no picture in this folder (.bmp, .gif, "),
        ("texts.tar", "texts.tar: no picture in this shard (.bmp, "),
        ("zipped.tar", "zipped.tar: is compressed, which allows no random access"),
        ("https://a/b.png?key=1", "https://a/b.png: an address; --allow-url has it fetched"),
        ("s3://a/b.png", "s3://a/b.png: an address; --allow-url has it fetched"),
    ],
)
def test_names_that_give_nothing(folder: Path, name: str, message: str) -> None:
    (folder / "empty").mkdir()
    pack(folder / "texts.tar", [("a.txt", b"a")])
    (folder / "zipped.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError) as caught:
        given("z.png", name).check()
    assert str(caught.value).startswith(message)


def test_other_addresses_and_two_lists() -> None:
    with pytest.raises(ValueError, match=r"s3://a/b\.png: pictures are fetched by http:// and https:// alone"):
        given("s3://a/b.png", allow_url=True).check()
    with pytest.raises(ValueError, match="- is named 2 times: there is one standard input"):
        given("-", "-").check()


def test_a_closed_folder_is_one_bad_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: str) -> Iterator["os.DirEntry[str]"]:
        if path == "./b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)  # type: ignore[return-value]

    monkeypatch.setattr(os, "scandir", closed)
    found = {one.name: one for one in given(".")}
    assert list(found) == ["./A.JPG", "./b", "./b.png", "./s[1].png", "./z.png"]
    assert "Permission denied" in fault(found["./b"])


def test_what_is_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "pipe.png")
    (one,) = given("pipe.png")
    assert fault(one) == "not a file (a pipe, a socket or a device)"
    monkeypatch.setattr(inputs, "LARGEST", 10)
    assert fault(next(iter(given("z.png")))).startswith("file too large (")


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as found:
        yield found


def test_addresses(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files = {"/a.png": picture("red")}
    monkeypatch.setattr(inputs, "LARGEST_SENT", 10_000)
    big = bytes(20_000)
    replies = {
        "file too large (20000 bytes, at most 10000)": headed(big, Content_Length="20000"),
        "cannot be fetched (the server answers with a web page": page,
        "cannot be fetched (the server answers 404 Not Found": failing(404),
        "cannot be fetched (the server does not say how long it is": endless,
        "cannot be fetched (40 of ": cut(40),
    }
    (one,) = given(f"{site.url}/a.png", allow_url=True)
    assert one.read() == picture("red") and one.beside is None
    for message, reply in replies.items():
        site.script["/a.png"] = [reply]
        assert fault(one).startswith(message)
    assert one.read() == picture("red")
