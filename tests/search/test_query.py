"""`vlm search` in this process: what is found, how it is told, what is refused."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny import picture
from vlm.data import image as image_module
from vlm.data.image import decode
from vlm.search import show as show_module
from vlm.search.encoder import Encoder
from vlm.search.exact import score
from vlm.search.places import as_told
from vlm.search.query import Options, find
from vlm.search.update import Options as IndexOptions
from vlm.search.update import index

Put = Callable[..., Path]


@pytest.fixture
def made(runs: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index beside the pictures, in the working directory."""
    monkeypatch.chdir(tmp_path)
    assert index([pictures], tmp_path / "index", IndexOptions(str(runs / "clip")))
    return tmp_path / "index"


@pytest.fixture
def asked(made: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., list[str]]:
    """Lines that a search prints."""
    capfdbinary.readouterr()

    def run(*words: str, **options: Any) -> list[str]:
        find(made, list(words), Options(**options))
        return os.fsdecode(capfdbinary.readouterr().out).splitlines()

    return run


def test_words_find_what_was_learned(asked: Callable[..., list[str]]) -> None:
    names = ("red", "green", "blue", "black", "purple", "cyan")
    first = {colour: Path(asked("a", colour, "square", top=1)[0]).stem for colour in names}
    assert sum(found == colour for colour, found in first.items()) >= 5


def test_paths_are_told_from_where_one_stands(
    asked: Callable[..., list[str]], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = asked(image=pictures / "red.png")
    assert near[0] == "pictures/red.png" and len(near) == 8
    monkeypatch.chdir(pictures / "more")
    assert asked(image=pictures / "red.png", top=1) == [str(pictures / "red.png")]
    assert asked(image=pictures / "more" / "cyan.png", top=1) == ["cyan.png"]


def test_a_picture_is_nearest_to_itself_and_its_copies(
    asked: Callable[..., list[str]], pictures: Path, made: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (pictures / "red2.png").write_bytes((pictures / "red.png").read_bytes())
    assert index([], made, IndexOptions())
    capfdbinary.readouterr()
    found = [json.loads(line) for line in asked(image=pictures / "red.png", json=True, top=3)]
    assert [one["path"] for one in found[:2]] == ["pictures/red.png", "pictures/red2.png"]
    assert found[0]["score"] == found[1]["score"] == pytest.approx(1, abs=1e-3)
    assert found[0]["image"] == str(pictures / "red.png") and "query" not in found[0]


def test_scores_are_cosines_of_words_and_picture_by_weight(
    asked: Callable[..., list[str]], runs: Path, pictures: Path
) -> None:
    encoder = Encoder(str(runs / "clip"))
    words = encoder.words(["a red square"])[0, 0]

    def vector(path: Path) -> torch.Tensor:
        return encoder.images(encoder.transform.pixels(decode(path.read_bytes()))[None])[0, 0]

    like = vector(pictures / "blue.png")
    lines = asked("a red square", image=pictures / "blue.png", weight=0.25, json=True)
    for one in map(json.loads, lines):
        mine = vector(Path(one["path"]))
        assert one["score"] == pytest.approx(float(0.25 * mine @ words + 0.75 * mine @ like), abs=1e-3)
    assert [json.loads(line)["score"] for line in lines] == sorted(
        (json.loads(x)["score"] for x in lines), reverse=True
    )
    assert asked("a red square", image=pictures / "blue.png", weight=0.0) == asked(image=pictures / "blue.png")
    assert asked("a red square", image=pictures / "blue.png", weight=1.0) == asked("a red square")


@pytest.mark.parametrize("wish", [{"threshold": float("nan")}, {"weight": float("nan")}])
def test_what_is_no_number_is_refused(asked: Callable[..., list[str]], wish: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^--{next(iter(wish))} nan: a number is needed$"):
        asked("a red square", **wish)


def test_a_path_is_never_an_option() -> None:
    assert as_told(os.path.join(os.getcwdb(), b"-dash.png")) == b"./-dash.png"
    assert as_told(os.path.join(os.getcwdb(), b"a", b"-dash.png")) == b"a/-dash.png"


def test_threshold_and_top(asked: Callable[..., list[str]]) -> None:
    scores = [json.loads(line)["score"] for line in asked("a red square", json=True, top=100)]
    assert len(scores) == 8
    middle = (scores[2] + scores[3]) / 2
    assert len(asked("a red square", threshold=middle)) == 3
    assert len(asked("a red square", threshold=middle, top=2)) == 2
    assert asked("a red square", threshold=1.5) == []


def test_null_after_each_path_whatever_is_in_it(
    made: Path, pictures: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    strange = os.path.join(os.fsencode(pictures), b"line\nbreak \xff.png")
    with open(strange, "wb") as file:
        file.write(picture("red", shift=1))
    assert index([], made, IndexOptions())
    capfdbinary.readouterr()
    find(made, [], Options(image=Path(os.fsdecode(strange)), top=1, null=True))
    assert capfdbinary.readouterr().out == b"pictures/line\nbreak \xff.png\0"
    find(made, [], Options(image=Path(os.fsdecode(strange)), top=1, json=True))
    (line,) = capfdbinary.readouterr().out.decode("ascii").splitlines()
    assert json.loads(line)["path"] == "pictures/line\nbreak \udcff.png"


def test_captions_beside_pictures(asked: Callable[..., list[str]], put: Put, pictures: Path) -> None:
    put(pictures, {"red.txt": "\n ein rotes Quadrat – rot\nsecond\n".encode()})
    record = json.loads(asked(image=pictures / "red.png", top=1, json=True)[0])
    assert record["caption"] == "ein rotes Quadrat – rot"


def test_many_queries_from_standard_input(asked: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [f"a {colour} square" for colour in ("red", "blue", "cyan")]
    single = [json.loads(line) for query in queries for line in asked(query, top=2, json=True)]
    for together in (1, 2, 64):
        monkeypatch.setattr("vlm.search.query.TOGETHER", together)
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([queries[0], "", *queries[1:]])))
        many = [json.loads(line) for line in asked("-", top=2, json=True)]
        assert [(one["query"], one["path"]) for one in many] == [(one["query"], one["path"]) for one in single]
        assert [one["score"] for one in many] == pytest.approx([one["score"] for one in single], abs=1e-5)
    assert [one["query"] for one in single] == [query for query in queries for _ in range(2)]


def test_what_is_gone_is_not_told(made: Path, pictures: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (pictures / "blue.png").unlink()
    capfdbinary.readouterr()
    find(made, ["a blue square"], Options())
    printed = capfdbinary.readouterr()
    assert len(printed.out.splitlines()) == 7 and b"pictures/blue.png" not in printed.out
    assert printed.err.decode() == f"vlm: 1 of the pictures found are gone: vlm index {made}\n"


def test_several_vectors_and_itm(
    qformer: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "itm"
    assert index([pictures], out, IndexOptions(str(qformer), dtype="float32"))
    capsysbinary.readouterr()
    find(out, ["a red square"], Options(json=True))
    plain = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    find(out, ["a red square"], Options(json=True, rerank=3))
    asked = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert {one["path"] for one in asked[:3]} == {one["path"] for one in plain[:3]}
    assert asked[3:] == plain[3:]
    assert [one["match"] for one in asked[:3]] == sorted((one["match"] for one in asked[:3]), reverse=True)
    encoder = Encoder(str(qformer))
    pixels = torch.stack([encoder.transform.pixels(decode(Path(one["path"]).read_bytes())) for one in asked[:3]])
    model, text = encoder.ready.model, encoder.text(["a red square"] * 3)
    seen = model.see(encoder.transform.normalize(pixels))
    together = model.match_logits(seen, text).softmax(1)[:, 1]
    cosine = (model.embed_image(seen) @ model.embed_text(text)[0]).amax(1)
    wanted = together + cosine * model.contrast.log_scale.exp().clamp(max=100)
    assert [one["match"] for one in asked[:3]] == pytest.approx(wanted.tolist(), abs=1e-3)
    assert [one["score"] for one in asked[:3]] == pytest.approx(cosine.tolist(), abs=1e-4)


def test_a_sheet_is_made_and_told_without_a_screen(
    made: Path, put: Put, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    find(made, ["a red square"], Options(sheet=True, top=3))
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    (line,) = (line for line in printed.err.splitlines() if line.startswith("contact sheet: "))
    with Image.open(line.removeprefix("contact sheet: ")) as sheet:
        assert sheet.width > 3 * show_module.SIDE
    shown = list[str]()
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", lambda address: shown.append(address) or True)
    find(made, ["a red square"], Options(sheet=True, threshold=2.0))  # nothing is found: a sheet says so
    assert "contact sheet" not in capsys.readouterr().err
    assert shown[0].startswith("file://") and shown[0].endswith(".png")


def test_large_jpegs_are_decoded_small(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, out = Encoder(str(runs / "clip")), io.BytesIO()
    Image.linear_gradient("L").resize((1024, 1024)).convert("RGB").save(out, "JPEG")
    sizes = list[tuple[int, int]]()
    real = image_module.as_pixels

    def as_pixels(image: Image.Image) -> torch.Tensor:
        sizes.append(image.size)
        return real(image)

    monkeypatch.setattr(image_module, "as_pixels", as_pixels)
    encoder.transform.read(out.getvalue())
    assert sizes == [(128, 128)]


def test_one_score_for_all() -> None:
    rows = torch.eye(3)[None]  # one picture of three vectors
    from vlm.search.exact import Term

    assert score([Term(torch.eye(3)[None, :2])], rows).tolist() == [[1.0]]
    assert score([Term(torch.eye(3)[None, :1]), Term(-torch.eye(3)[None, :1], 0.5)], rows).tolist() == [[1.0]]
