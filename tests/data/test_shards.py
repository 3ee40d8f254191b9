"""The index against webdataset's own reading, damage at every place, and what each kind of bad sample is called."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from tests.data.shard_files import numbered, picture, write
from vlm.data.image import BadSample
from vlm.data.shards import Shards, expand


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_expand(tmp_path: Path) -> None:
    _touch(tmp_path, "a-000.tar", "a-001.tar", "a-002.tar", "b.tar", "note.txt", "odd[1].tar")

    def names(*specs: str) -> list[str]:
        return [file.name for file in expand([str(tmp_path / spec) for spec in specs])]

    assert names("a-{000..001}.tar") == ["a-000.tar", "a-001.tar"]
    assert names("{b,a-002}.tar") == ["b.tar", "a-002.tar"]
    assert names("a-*.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names("odd[1].tar") == ["odd[1].tar"]
    assert names("b.tar", "a-00[01].tar", "b.tar") == ["b.tar", "a-000.tar", "a-001.tar"]
    assert [file.name for file in expand(str(tmp_path))] == [
        "a-000.tar",
        "a-001.tar",
        "a-002.tar",
        "b.tar",
        "odd[1].tar",
    ]


def test_expand_errors(tmp_path: Path) -> None:
    _touch(tmp_path, "train-000.tar", "train-001.tar", "empty/x.txt")
    with pytest.raises(ValueError, match=r"no file matches .*tran-000.tar; that folder holds train-000.tar"):
        expand(str(tmp_path / "tran-000.tar"))
    with pytest.raises(
        ValueError, match=r"train-\{000..003\}.tar.*no file matches .*train-002.tar; that folder holds train"
    ):
        expand(str(tmp_path / "train-{000..003}.tar"))
    with pytest.raises(ValueError, match="there is no folder"):
        expand(str(tmp_path / "nowhere" / "*.tar"))
    with pytest.raises(ValueError, match=r"no .tar file in .*empty; that folder holds x.txt"):
        expand(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no shards given"):
        expand([])


@pytest.mark.parametrize("spec", ["pipe:touch owned", "https://example.org/a.tar", "s3://bucket/{0..9}.tar"])
def test_commands_and_addresses_are_refused(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no commands or addresses; download them first"):
        expand(spec)
    assert not os.listdir(tmp_path)


def test_equals_webdataset(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.tar", numbered(10 * i, 7)) for i in range(2)]
    shards = Shards(str(tmp_path / "{0..1}.tar"), id_field="kind")
    expected = [s for file in files for s in webdataset.WebDataset(str(file), shardshuffle=False)]
    assert len(shards) == len(expected) == 14 and not shards.bad
    for index in (13, 0, 7, 6):  # any order
        raw, other = shards.raw(index), expected[index]
        assert (raw.key, raw.image) == (other["__key__"], other["png"])
        number = int(raw.key[1:])
        assert raw.captions == [f"number {number}", f"the {number}th thing", "a thing"]
        assert raw.id == raw.fields["kind"] == f"kind {number // 2}"
    assert list(shards.captions()) == [text for index in range(14) for text in shards.raw(index).captions]


def test_first_suffix_and_caption_win(tmp_path: Path) -> None:
    png, other = picture(1), picture(2)
    write(
        tmp_path / "s.tar",
        [
            {"__key__": "dir/a", "png": other, "jpg": png, "txt": "one\n\n two  words \n", "json": {"caption": "no"}},
            {"__key__": "dir/b", "PNG": png, "json": {"caption": "from json", "text": ["x"]}},
            {"__key__": "c", "webp": png, "json": {"text": ["from", "text"]}, "cls": "3"},
        ],
    )
    shards = Shards(str(tmp_path / "s.tar"), caption="txt;json:caption;json:text")
    assert [shards.raw(i).captions for i in range(3)] == [["one", "two words"], ["from json"], ["from", "text"]]
    assert [shards.raw(i).key for i in range(3)] == ["dir/a", "dir/b", "c"]
    assert all(shards.raw(i).image == png for i in range(3)) and shards.raw(0).id == "dir/a"


def test_incomplete_samples_are_counted(tmp_path: Path) -> None:
    more: list[dict[str, Any]] = [
        {"__key__": "x", "png": picture(1)},
        {"__key__": "y", "txt": "text"},
        {"__key__": "z", "txt": "more"},
    ]
    shards = Shards(str(write(tmp_path / "s.tar", [*numbered(0, 5), *more])))
    assert len(shards) == 5 and shards.bad == {"no caption": 1, "no image": 2}


def test_too_many_incomplete_samples(tmp_path: Path) -> None:
    bad = [{"__key__": f"bad{i}", "png": picture(1)} for i in range(10)]
    spec = str(write(tmp_path / "s.tar", [*numbered(0, 90), *bad]))
    with pytest.raises(ValueError, match=r"10 of 100 samples are unusable \(no caption: 10\).*max_bad_fraction=0.05"):
        Shards(spec)
    assert len(Shards(spec, max_bad_fraction=0.1)) == 90


def test_nothing_usable_says_what_is_there(tmp_path: Path) -> None:
    spec = str(write(tmp_path / "s.tar", [{"__key__": f"{i}", "tiff": b"x", "cls": "1"} for i in range(3)]))
    with pytest.raises(ValueError, match=r"Wanted image='jpg;png;jpeg;webp', .*suffixes found: cls \(3\), tiff \(3\)"):
        Shards(spec)


def test_misspelt_fields_are_told_at_once(tmp_path: Path) -> None:
    spec = str(write(tmp_path / "s.tar", numbered(0, 5)))
    with pytest.raises(ValueError, match=r"no caption \(looked for json:captoin\); fields of its json: caption, kind"):
        Shards(spec, caption="json:captoin")
    with pytest.raises(ValueError, match=r"no id \(its json has no field 'sort'\); fields of its json"):
        Shards(spec, id_field="sort")
    with pytest.raises(ValueError, match=r"caption='json': write txt, json:FIELD"):
        Shards(spec, caption="json")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": " \n\t"}, "empty caption"),
        ({"txt": b"\xff\xfe\x00"}, "not UTF-8"),
        ({"json": b"{broken"}, "unreadable json"),
        ({"json": b"[1]"}, "unreadable json"),
        ({"json": b"[" * 100_000}, "unreadable json"),
        ({"json": {"caption": 3}}, "caption is not text"),
        ({"json": {"caption": ["a", None]}}, "caption is not text"),
        ({"json": {"caption": []}}, "empty caption"),
        ({"json": {"caption": None}}, "no caption"),
    ],
)
def test_bad_captions(members: dict[str, Any], reason: str, tmp_path: Path) -> None:
    bad = {"__key__": "bad", "png": picture(0), **{k: v for k, v in members.items() if not isinstance(v, bytes)}}
    spec = tmp_path / "s.tar"
    write(spec, [*numbered(0, 2), bad] if len(bad) > 2 else numbered(0, 2))
    if len(bad) == 2:  # bytes as they are, past the writer's encoders
        (suffix, data), files = next(iter(members.items())), {"bad.png": picture(0)}
        _append(spec, files | {f"bad.{suffix}": data})
    shards = Shards(str(spec))
    with pytest.raises(BadSample) as caught:
        shards.raw(2)
    assert caught.value.reason == reason
    assert len(list(shards.captions())) == 6


def _append(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "a:") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_captions_are_cleaned(tmp_path: Path) -> None:
    sample = {"__key__": "a", "png": picture(0), "json": {"caption": ["a\x00b\n\tc ", "x\ud800y", " ", "é" * 20_000]}}
    assert Shards(str(write(tmp_path / "s.tar", [sample]))).raw(0).captions == ["a b c", "x?y", "é" * 10_000]


def test_cut_off_anywhere_keeps_what_is_whole(tmp_path: Path) -> None:
    whole = write(tmp_path / "s.tar", numbered(0, 3)).read_bytes()
    with tarfile.open(tmp_path / "s.tar") as tar:
        ends = [member.offset_data + member.size for member in tar.getmembers()][1::2]  # of each sample's last member
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # the end mark; the padding after it is free to go
    for cut in range(0, end, 100):
        (tmp_path / "s.tar").write_bytes(whole[:cut])
        kept = sum(last <= cut for last in ends)
        if not kept:
            with pytest.raises(ValueError, match=r"not a tar file|cut off or damaged"):
                Shards(str(tmp_path / "s.tar"))
            continue
        shards = Shards(str(tmp_path / "s.tar"))
        assert (len(shards), shards.bad) == (kept, {"damaged shard": 1})
        assert [shards.raw(i).image for i in range(kept)] == [sample["png"] for sample in numbered(0, kept)]


def test_samples_before_a_damaged_header_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = bytearray(write(tmp_path / "s.tar", numbered(0, 4)).read_bytes())
    with tarfile.open(tmp_path / "s.tar") as tar:
        at = tar.getmembers()[4].offset
    whole[at + 100 : at + 120] = b"?" * 20
    (tmp_path / "s.tar").write_bytes(whole)
    shards = Shards(str(tmp_path / "s.tar"))
    assert ([shards.key(i) for i in range(len(shards))], shards.bad) == (["k00000", "k00001"], {"damaged shard": 1})
    (line,) = caplog.messages
    assert f"s.tar: is cut off or damaged at or after byte {at} of {len(whole)};" in line
    assert line.endswith("; the 2 samples before that are used")


def test_a_damaged_shard_beside_a_whole_one(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", numbered(0, 3))
    (tmp_path / "b.tar").write_bytes(b"no tar at all")
    shards = Shards(str(tmp_path))
    assert (len(shards), shards.bad) == (3, {"damaged shard": 1})


def test_damage_at_a_member_drops_only_what_is_not_whole(tmp_path: Path) -> None:
    """Cut inside a member that nobody asks for, the sample still stands; the count stays one."""
    samples = [{**sample, "zzz": b"x" * 2000} for sample in numbered(0, 2)]
    whole = write(tmp_path / "s.tar", samples).read_bytes()
    with tarfile.open(tmp_path / "s.tar") as tar:
        last = tar.getmembers()[-1]
    assert last.name == "k00001.zzz"
    (tmp_path / "s.tar").write_bytes(whole[: last.offset_data + 5])
    shards = Shards(str(tmp_path / "s.tar"))
    assert (len(shards), shards.bad) == (2, {"damaged shard": 1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a tar file"),
        (b"<!DOCTYPE html><html>404</html>" * 40, "is not a tar file"),
        (b"\x1f\x8b\x08" + bytes(2000), "is compressed"),
    ],
)
def test_what_is_no_tar(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(ValueError, match=f"s.tar: {message}"):
        Shards(str(tmp_path / "s.tar"))


def test_repeated_and_torn_samples_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.tar", numbered(0, 3))
    _append(tmp_path / "a.tar", {"k00001.txt": b"late"})
    shards = Shards(str(tmp_path / "a.tar"))
    assert shards.bad == {"members apart": 1} and shards.raw(1).captions[0] == "number 1"
    write(tmp_path / "b.tar", numbered(0, 3))
    write(tmp_path / "c.tar", numbered(2, 3))
    shards = Shards(str(tmp_path / "{b,c}.tar"))
    assert shards.bad == {"duplicate key": 1}
    assert [shards.key(i) for i in range(len(shards))] == [f"k0000{i}" for i in range(5)]
    assert [shards.raw(i).image for i in range(5)] == [sample["png"] for sample in numbered(0, 5)]
    apart, twice = caplog.messages
    assert apart.startswith("members apart: ") and "a.tar: 'k00001' (txt); the members of a sample" in apart
    assert "b.tar: k00002, and again in " in twice and "c.tar; each sample needs a key of its own" in twice


def test_links_and_strange_names_touch_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "s.tar", numbered(0, 2))
    with tarfile.open(folder / "s.tar", "a:") as tar:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("l.txt", tarfile.LNKTYPE), ("dev.txt", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    strange = {
        "../up.png": picture(3),
        "../up.txt": b"up",
        "/abs.png": picture(4),
        "/abs.txt": b"abs",
        "README": b"hello",
    }
    strange |= {".hidden.png": b"", "caf\udce9.png": picture(5), "caf\udce9.txt": b"bad name"}
    _append(folder / "s.tar", strange)
    shards = Shards(str(folder))
    assert [shards.key(i) for i in range(len(shards))] == ["k00000", "k00001", "../up", "/abs"]
    assert shards.bad == {"name is not UTF-8": 1} and shards.raw(3).captions == ["abs"]
    assert os.listdir(folder) == ["s.tar"] and os.listdir(tmp_path) == ["in"]


def test_a_shard_that_changes_is_refused(tmp_path: Path) -> None:
    shards = Shards(str(write(tmp_path / "s.tar", numbered(0, 3))))
    assert shards.raw(1).key == "k00001"
    write(tmp_path / "s.tar", numbered(3, 4))
    with pytest.raises(ValueError, match=r"s.tar: changed since it was indexed"):
        shards.raw(1)


def test_long_names(tmp_path: Path) -> None:
    key = "folder/" * 20 + "k" * 120
    sample = {"__key__": key, "png": picture(0), "txt": "long"}
    shards = Shards(str(write(tmp_path / "s.tar", [sample, *numbered(0, 1)])))
    assert shards.raw(0).key == key and shards.raw(0).image == picture(0) and len(shards) == 2
