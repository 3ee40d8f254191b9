"""The demos run on tiny data, and each stays under 60 lines."""

import runpy
from pathlib import Path

import pytest

from tests.tiny import COLOURS, picture, tiny_run
from vlm.train.run import train_run

DEMOS = Path(__file__).parents[1] / "demos"


def demo(name: str) -> dict[str, object]:
    return runpy.run_path(str(DEMOS / f"{name}.py"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))
        (folder / f"{colour}.txt").write_text(f"a {colour} square\n", encoding="utf-8")
    return folder


def trained(tmp_path: Path, kind: str) -> Path:
    train_run(tiny_run(tmp_path, kind), tmp_path / kind)
    return tmp_path / kind


def test_they_are_short() -> None:
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 60 for path in DEMOS.glob("*.py"))


def test_caption(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "decoder")
    demo("caption")["main"](str(run), str(pictures / "red.png"), str(pictures / "blue.png"))  # type: ignore[operator]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == [str(pictures / "red.png"), str(pictures / "blue.png")]
    assert all(line.startswith("    or: ") and line.count(" | ") == 2 for line in lines[1::2])


@pytest.mark.parametrize("kind", ["clip", "qformer"])
def test_retrieval(tmp_path: Path, pictures: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, kind)
    demo("retrieval")["main"](str(run), str(pictures), "a red square", "a blue square")  # type: ignore[operator]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a red square" and lines[4] == "a blue square" and len(lines) == 8
    scores = [float(line.split()[0]) for line in lines[1:4]]
    assert scores == sorted(scores, reverse=True) and all(-1 <= score <= 1 for score in scores)


def test_train_adapter(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "clip")
    vision = (
        "model.vision={kind: timm, name: vit_tiny_patch16_224, image_size: 32, args: {patch_size: 16, embed_dim: 16, "
    )
    demo("train_adapter")["main"](  # type: ignore[operator]
        str(pictures),
        str(tmp_path / "out"),
        vision + "depth: 1, num_heads: 2}}",
        f"model.init.vision={run}",
        "tokenizer.vocab=280",
        "train.steps=3",
        "train.warmup=0",
        "train.batch_size=4",
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 pictures with captions" and len(lines) == 6
    kept = (tmp_path / "out" / "run" / "config.yaml").read_text(encoding="utf-8")
    assert str(run) in kept
