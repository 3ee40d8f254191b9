"""The demos run on tiny data, and each stays under 60 lines."""

import runpy
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.tiny import COLOURS, picture, settings, squares, tiny_run, write_config
from vlm.train.run import train, train_run

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
    config = settings("clip", squares(tmp_path / "squares.tar"))
    adapter = yaml.safe_load((DEMOS.parent / "configs" / "tiny" / "adapter.yaml").read_text(encoding="utf-8"))
    config["model"]["vision"] = {**adapter["model"]["vision"], "frozen": False}
    run = tmp_path / "encoder"
    train(write_config(tmp_path / "encoder.yaml", config), [], run)
    few = ["tokenizer.vocab=280", "train.steps=3", "train.warmup=0", "train.batch_size=4"]
    arguments = [str(pictures), str(tmp_path / "out"), f"model.init.vision={run}", *few]
    demo("train_adapter")["main"](*arguments)  # type: ignore[operator]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith(str(pictures / "black.png"))
    kept = load_file(next((tmp_path / "out").glob("step-*/model.safetensors")))
    assert kept and not any(name.startswith("vision.") for name in kept)
