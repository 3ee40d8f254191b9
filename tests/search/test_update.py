"""`vlm index`: only what is new is encoded, whatever happens to the files."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import picture
from vlm.search import update as update_module
from vlm.search.encoder import Encoder
from vlm.search.manifest import opened
from vlm.search.update import Options, index

ZERO = {"added": 0, "changed": 0, "moved": 0, "copied": 0, "deleted": 0, "encoded": 0, "bad": 0}
Put = Callable[..., Path]


class Indexed:
    """Updates of one index in this process; what each tells."""

    def __init__(self, out: Path, folders: list[Path], model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self.folders, self.model, self.capsys, self.err = out, folders, model, capsys, ""

    def __call__(self, whole: bool = True, folders: list[Path] | None = None, **options: Any) -> dict[str, int]:
        """Counts that are not 0, but for how many files there are."""
        made = Options(**({"model": str(self.model)} | options), json=True)
        assert index(self.folders if folders is None else folders, self.out, made) == whole
        printed = self.capsys.readouterr()
        self.err = printed.err
        counts = json.loads(printed.out)
        self.files, self.pictures = counts.pop("files"), counts.pop("pictures")
        del counts["folders"]
        assert counts.keys() == ZERO.keys()
        return {kind: count for kind, count in counts.items() if count}

    def places(self) -> dict[str, int | None]:
        """Where the vectors of each file stand."""
        found: dict[str, int | None] = {}
        with opened(self.out) as manifest:
            for place in range(sum(part.rows for part in manifest.parts())):
                found |= {os.fsdecode(path): place for _, path in manifest.files_at(place)}
        return found


@pytest.fixture
def indexed(runs: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Indexed:
    made = Indexed(tmp_path / "index", [pictures], runs / "clip", capsys)
    assert made() == {"added": 8, "encoded": 8}
    return made


def test_nothing_new_needs_no_model(indexed: Indexed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_module, "Encoder", None)
    monkeypatch.setattr(update_module, "open_encoder", None)
    assert indexed(model=None) == {}
    assert (indexed.files, indexed.pictures) == (8, 8)


def test_add_change_move_copy_delete(indexed: Indexed, pictures: Path, put: Put) -> None:
    before = indexed.places()
    put(pictures, {"new.png": picture("brown"), "red.png": picture("red", shift=1)})
    (pictures / "blue.png").rename(pictures / "more" / "azure.png")
    (pictures / "copy.png").write_bytes((pictures / "green.png").read_bytes())
    (pictures / "black.png").unlink()
    assert indexed(model=None) == {"added": 1, "changed": 1, "moved": 1, "copied": 1, "deleted": 1, "encoded": 2}
    after = indexed.places()
    assert after.keys() == before.keys() - {"blue.png", "black.png"} | {"new.png", "more/azure.png", "copy.png"}
    assert after["more/azure.png"] == before["blue.png"] and after["copy.png"] == before["green.png"]
    assert after["red.png"] != before["red.png"]
    assert (indexed.files, indexed.pictures) == (9, 8)


def test_copies_that_are_read_together(
    indexed: Indexed, pictures: Path, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_module, "MANY", 1)  # each is put away while its copies have been read
    monkeypatch.setattr(update_module, "BATCH", 1)
    put(pictures, {f"copy{i}.png": picture("brown") for i in range(20)} | {f"bad{i}.png": b"no" for i in range(20)})
    assert indexed(whole=False) == {"added": 1, "copied": 19, "encoded": 1, "bad": 20}


def test_touched_and_renamed_folders_are_not_encoded(indexed: Indexed, pictures: Path) -> None:
    before = set(indexed.places().values())
    os.utime(pictures / "red.png", (10**9, 10**9))
    assert indexed(model=None) == {}
    (pictures / "more").rename(pictures / "less")
    assert indexed(model=None) == {"moved": 2}
    assert set(indexed.places().values()) == before


def test_what_comes_back_is_not_encoded_again(indexed: Indexed, pictures: Path, put: Put) -> None:
    data = (pictures / "red.png").read_bytes()
    (pictures / "red.png").unlink()
    assert indexed() == {"deleted": 1}
    put(pictures, {"red.png": data})
    assert indexed() == {"added": 1}


def test_many_deleted_are_cleared_away(indexed: Indexed, pictures: Path) -> None:
    for name in ("red", "green", "blue"):
        (pictures / f"{name}.png").unlink()
    assert indexed() == {"deleted": 3}
    assert "cleared away" in indexed.err
    assert sorted(place for place in indexed.places().values() if place is not None) == list(range(5))


def test_a_file_that_changes_within_its_time(indexed: Indexed, pictures: Path, put: Put) -> None:
    put(pictures, {"red.png": picture("brown", shift=2)}, age=0)
    assert indexed() == {"changed": 1, "encoded": 1}
    seen = (pictures / "red.png").stat()
    data = picture("white", shift=2)
    (pictures / "red.png").write_bytes(data)
    os.utime(pictures / "red.png", ns=(seen.st_atime_ns, seen.st_mtime_ns))  # the same size may be, the same time is
    assert indexed() == {"changed": 1, "encoded": 1}


def test_bad_pictures_are_named_and_not_tried_again(indexed: Indexed, pictures: Path, put: Put) -> None:
    put(pictures, {"bad.jpg": b"no picture", "cut.png": picture("red")[:60]})
    assert indexed(whole=False) == {"bad": 2}
    lines = indexed.err.splitlines()
    assert lines[0].startswith(f"vlm: {pictures / 'bad.jpg'}: not an image (")
    assert lines[1].startswith(f"vlm: {pictures / 'cut.png'}: corrupt image (")
    assert lines[2:] == ["vlm: 2 of 10 pictures could not be read"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update_module, "open_encoder", None)
        assert indexed(whole=False, model=None) == {"bad": 2}  # also after a run that was killed and named them
    assert all("; not tried again while it stays as it is" in line for line in indexed.err.splitlines()[:2])
    put(pictures, {"bad.jpg": picture("brown")})
    assert indexed(whole=False) == {"changed": 1, "encoded": 1, "bad": 1}
    (pictures / "cut.png").unlink()
    assert indexed() == {"deleted": 1}


def test_links_hidden_files_and_the_index_itself(
    runs: Path, pictures: Path, put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = put(tmp_path / "elsewhere", {"brown.png": picture("brown"), "tan.png": picture("tan")})
    put(
        pictures,
        {".hidden.png": picture("gold"), ".cache/b.png": picture("pink"), "index/.x.png": picture("tan")},
    )
    (pictures / "loop").symlink_to(pictures)
    (pictures / "more" / "up").symlink_to("..")
    (pictures / "there").symlink_to(elsewhere)
    (pictures / "again").symlink_to(elsewhere)
    (pictures / "linked.png").symlink_to(elsewhere / "tan.png")
    (pictures / "broken.png").symlink_to("nowhere.png")
    (pictures / "round.png").symlink_to("round.png")
    os.mkfifo(pictures / "pipe.png")
    (pictures / "folder.png").mkdir()
    made = Indexed(pictures / "index", [pictures], runs / "clip", capsys)
    assert made(whole=False) == {"added": 10, "copied": 1, "encoded": 10, "bad": 3}
    assert made.err.splitlines() == [
        f"vlm: {pictures / 'broken.png'}: No such file or directory",
        f"vlm: {pictures / 'pipe.png'}: not a file",
        f"vlm: {pictures / 'round.png'}: Too many levels of symbolic links",
        "vlm: 3 of 14 pictures could not be read",
    ]
    assert {"again/brown.png", "again/tan.png", "linked.png"} <= made.places().keys()
    assert made(whole=False, hidden=True) == {"added": 2, "encoded": 2, "bad": 3}
    assert made(whole=False) == {"bad": 3}  # it stays as it was told


def test_names_that_are_not_text(indexed: Indexed, pictures: Path) -> None:
    strange = os.path.join(os.fsencode(pictures), b"line\nbreak \xff.png")
    with open(strange, "wb") as file:
        file.write(picture("brown"))
    assert indexed() == {"added": 1, "encoded": 1}
    assert "line\nbreak \udcff.png" in indexed.places()


def test_folders_are_those_of_the_last_command(indexed: Indexed, pictures: Path, put: Put, tmp_path: Path) -> None:
    other = put(tmp_path / "other", {"brown.png": picture("brown"), "red.png": picture("red")})
    assert indexed(folders=[pictures, other]) == {"added": 1, "copied": 1, "encoded": 1}
    assert indexed(folders=[]) == {}
    assert indexed(folders=[other]) == {"deleted": 8}
    assert set(indexed.places()) == {"brown.png", "red.png"}
    assert indexed(folders=[pictures]) == {"moved": 1, "added": 7, "deleted": 1, "encoded": 7}


def test_an_index_moves_with_its_pictures(indexed: Indexed, tmp_path: Path, runs: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("index", "pictures"):
        (tmp_path / name).rename(home / name)
    indexed.out = home / "index"
    assert indexed(model=None, folders=[]) == {}


def test_pictures_that_are_all_gone_are_not_forgotten(indexed: Indexed, pictures: Path, tmp_path: Path) -> None:
    pictures.rename(tmp_path / "unmounted")
    with pytest.raises(ValueError, match="were in this folder, which is not there: bring it back, or say where"):
        indexed(folders=[])
    pictures.mkdir()
    with pytest.raises(ValueError, match="no picture in it, and 8 are in the index: bring them back"):
        indexed(folders=[])
    pictures.rmdir()
    (tmp_path / "unmounted").rename(pictures)
    assert indexed(folders=[]) == {}


def test_a_folder_that_cannot_be_looked_at_keeps_its_pictures(
    indexed: Indexed, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def refuse(path: bytes) -> Any:
        if os.fsencode(path).endswith(b"more"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert indexed(whole=False) == {"bad": 1}
    assert indexed.err.splitlines()[0] == f"vlm: {pictures / 'more'}: Permission denied"
    assert indexed.files == 8


def test_the_same_vectors_in_any_order_and_number_of_threads(
    indexed: Indexed,
    runs: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vlm.search.store import Store

    def vectors(one: Indexed) -> dict[str, list[float]]:
        with opened(one.out) as manifest:
            store = Store(one.out, manifest, update_module.form_of(manifest.meta()))
            rows = [row.flatten().tolist() for piece in store.read(manifest.parts()) for row in piece]
        return {path: rows[place] for path, place in one.places().items() if place is not None}

    for module in ("update", "encoder"):
        monkeypatch.setattr(f"vlm.search.{module}.BATCH", 3)
    monkeypatch.setattr(update_module, "MANY", 1)
    other = Indexed(tmp_path / "two", [pictures], runs / "clip", capsys)
    assert other(workers=5) == {"added": 8, "encoded": 8}
    one, two = vectors(indexed), vectors(other)
    assert one.keys() == two.keys()
    assert all(one[path] == pytest.approx(two[path], abs=1e-3) for path in one)


def test_another_model_is_refused_until_all_is_encoded_again(indexed: Indexed, runs: Path, qformer: Path) -> None:
    with pytest.raises(ValueError, match=r"has other weights than the model it was made with; .* --rebuild$"):
        indexed(model=str(runs / "other"))
    assert indexed(model=str(qformer), rebuild=True) == {"added": 8, "encoded": 8}
    with opened(indexed.out) as manifest:
        meta = manifest.meta()
    assert (meta["vectors"], meta["model"]) == ("4", str(qformer.resolve()))
    assert indexed(model=None) == {}


def test_another_transform_is_noticed(indexed: Indexed, runs: Path, put: Put, pictures: Path) -> None:
    with opened(indexed.out, write=True) as manifest:
        manifest.remember({"transform": "ImageTransform(another)"})
    put(pictures, {"new.png": picture("brown")})
    with pytest.raises(ValueError, match="has another image transform than"):
        indexed(model=None)


def test_vectors_that_are_not_finite(runs: Path) -> None:
    import torch

    encoder = Encoder(str(runs / "clip"))
    encoder.ready.model.contrast.image.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="its vectors are not finite"):
        encoder.form("float16")
