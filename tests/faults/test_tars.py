"""One tar for each fault of names, order and structure: the exact report, the same names and counts as in training."""

import os
import tarfile
from pathlib import Path

import pytest

from tests.faults.made import Member, counted, encoded, good, tar, trained
from vlm.data.shards import Shards

PNG = encoded("red")
KIND = {"l.png": tarfile.SYMTYPE, "h.png": tarfile.LNKTYPE, "d.png": tarfile.CHRTYPE, "f.png": tarfile.FIFOTYPE}


def special(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = KIND[name], "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("more", "errors"),
    [
        ([], {}),
        ([("x.txt", b"text")], {"no image": 1}),
        ([("x.png", PNG)], {"no caption": 1}),
        ([("k0.png", PNG), ("k0.txt", b"again")], {"duplicate key": 1}),
        ([("k1.png", PNG)], {"duplicate key": 1}),
        ([("k0.json", b"{}")], {"members apart": 1}),
        ([("x.png", PNG), ("y.png", PNG), ("x.txt", b"x"), ("y.txt", b"y")], {"no caption": 2, "members apart": 2}),
        ([("p.v2.png", PNG), ("p.v2.txt", b"x"), ("p.v3.png", PNG)], {"dotted name": 1}),
        ([("caf\udce9.png", PNG), ("caf\udce9.txt", b"x")], {"name is not UTF-8": 1}),
    ],
)
def test_names_and_order(more: list[Member], errors: dict[str, int], tmp_path: Path) -> None:
    file = tar(tmp_path / "s.tar", [*good(), *more])
    assert counted(file) == (2 + sum(errors.values()), errors, {})
    assert trained(file) == errors


@pytest.mark.parametrize(
    ("more", "notes"),
    [
        ([special(name)], {"link or device": 1}) for name in KIND
    ]
    + [
        ([("../x.cls", b"1")], {"unsafe name": 1}),
        ([("/etc/x.cls", b"1")], {"unsafe name": 1}),
        ([("k1.pyd", b"cos\nsystem\n(S'touch owned'\ntR.")], {"code": 1}),
        ([("k1.pkl", b"1"), ("k1.pth", b"1")], {"code": 2}),
        ([("k1.v2.png", PNG)], {"dotted name": 1}),
        ([("README", b"x"), (".hidden.png", PNG)], {}),
    ],
)  # fmt: skip
def test_members_that_training_passes_over(
    more: list[Member], notes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tar(tmp_path / "s.tar", [*good(), *more])
    samples, errors, found = counted(file)
    structural = {} if samples == 2 else {"no image": 1}  # ../x.cls is a sample of its own, without a picture
    assert (errors, found) == (structural, notes) == (trained(file), notes)
    assert os.listdir(tmp_path) == ["s.tar"]


def test_duplicate_keys_across_shards_keep_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [tar(tmp_path / "a.tar", good(3)), tar(tmp_path / "b.tar", good(4))]
    assert counted(*files) == (7, {"duplicate key": 3}, {})
    shards = Shards([str(file) for file in files])
    assert shards.bad == {"duplicate key": 3}
    assert [shards.where(i).rpartition("/")[2] for i in range(4)] == [
        "a.tar: k0", "a.tar: k1", "a.tar: k2", "b.tar: k3",
    ]  # fmt: skip
    assert [shards.raw(i).captions for i in range(4)] == [[f"number {i}"] for i in range(4)]
    assert any(
        "a.tar: k0, and again in" in line and "each sample needs a key of its own" in line for line in caplog.messages
    )


def test_too_many_duplicates_end_in_words(tmp_path: Path) -> None:
    files = [str(tar(tmp_path / f"{name}.tar", good(60))) for name in "ab"]
    with pytest.raises(
        ValueError, match=r"60 of 120 samples are unusable \(duplicate key: 60\)[^\n]*\nduplicate key: .*a.tar: k0"
    ):
        Shards(files)


def test_pictures_and_captions_in_two_heaps(tmp_path: Path) -> None:
    names = [f"x{i}" for i in range(3)]
    file = tar(tmp_path / "s.tar", [*((f"{n}.png", PNG) for n in names), *((f"{n}.txt", b"x") for n in names)])
    with pytest.raises(ValueError, match=r"suffixes found: png \(3\), txt \(3\)\nmembers apart: .*sorted by name"):
        Shards(str(file))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = tar(tmp_path / "s.tar", good(3)).read_bytes()
    with tarfile.open(tmp_path / "s.tar") as opened:
        ends = [member.offset_data + member.size for member in opened.getmembers()][1::2]
    end = -(-ends[-1] // 512) * 512 + 1024  # with the end mark; the padding after it is free to go
    for cut in range(0, end, 64):
        (tmp_path / "s.tar").write_bytes(whole[:cut])
        kept = sum(last <= cut for last in ends)
        assert counted(tmp_path / "s.tar") == (kept + 1, {"damaged shard": 1}, {}), cut


def test_the_report_does_not_depend_on_workers(tmp_path: Path) -> None:
    files = [
        tar(tmp_path / "a.tar", [*good(3), ("x.png", PNG)]),
        tar(tmp_path / "b.tar", [*good(4), ("y.png", b"no picture"), ("y.txt", b"y"), special("l.png")]),
    ]
    alone = counted(*files)
    assert alone == counted(*files, workers=2)
    assert alone == (9, {"duplicate key": 3, "no caption": 1, "not an image": 1}, {"link or device": 1})
