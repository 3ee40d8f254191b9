"""The demos run on tiny data."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.tiny import COLOURS, pack, picture, settings, squares, tiny_run, write_config
from vlm.data.text import train_bpe
from vlm.model.connector import PrefixConnector
from vlm.model.grid import GridEncoder
from vlm.model.language import llama
from vlm.model.qformer import QFormer
from vlm.model.vision import timm_encoder
from vlm.model.vlm import VisionLanguageModel
from vlm.quickstart.questions import picture_tokens
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


def drawn(path: Path, shifts: list[int]) -> Path:
    """Squares of eight colours as the quickstart's records."""
    members = []
    for colour in COLOURS:
        fields = {
            "caption": f"{colour} square",
            "group": "food-drink" if colour < "g" else "objects",
            "hexcode": colour,
        }
        for shift in shifts:
            image, text = picture(colour, shift=shift), json.dumps(fields).encode()
            members += [(f"{colour}{shift}.png", image), (f"{colour}{shift}.json", text)]
    return pack(path, members)


def stand_ins(connector: str, classes: int, s: dict[str, int]) -> object:
    """In the place of the pretrained parts: as small as they can be, and random."""
    torch.manual_seed(0)
    tokenizer = train_bpe([f"{colour} square" for colour in COLOURS], 300)
    language = llama(tokenizer.size, 16, 1, 2)
    shape = {"channels": [8, 8, 8, 16], "stem_width": 8}
    vision = GridEncoder(timm_encoder("resnet10t", image_size=64, args=shape, frozen=True), s["side"])
    tokens = picture_tokens(tokenizer)
    bridge: torch.nn.Module = PrefixConnector(vision.dim, 16, vision.tokens, tokens, hidden=classes)
    if connector == "qformer":
        bridge = QFormer(vision.dim, 16, 1, 2, tokens, cross_every=1, out_dim=16)
    return VisionLanguageModel(vision=vision, connector=bridge, language=language), tokenizer


@pytest.mark.parametrize("connector", ["mlp", "qformer"])
def test_llava(tmp_path: Path, connector: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = demo("llava")
    main, settings = found["main"], found["SETTINGS"]
    main.__globals__["parts"] = stand_ins  # type: ignore[attr-defined]
    main.__globals__["SETS"] = drawn(tmp_path / "a.tar", [0, 1, 2]), drawn(tmp_path / "b.tar", [3])  # type: ignore[attr-defined]
    few = {**settings, "views": 2, "words": 3, "questions": 3, "batch": 4}  # type: ignore[dict-item]
    main(tmp_path / "out", connector, few)  # type: ignore[operator]
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert figures["connector"] == connector and figures["count"] == len(COLOURS)
    assert figures["majority_name"] == 12.5 and figures["majority_category"] == 62.5
    assert 0 <= figures["name"] <= 100 and 0 <= figures["category"] <= 100
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2 * len(COLOURS) and 'src="http' not in page and 'href="http' not in page
    told = capsys.readouterr()
    assert told.out.splitlines()[0].startswith("What is shown in this picture?") and "report.html" in told.out
    assert ("closed form" in told.err) == (connector == "mlp")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "wrds=3"], "wrds=3: no such number; there are: size, side, views"),
        (["new", "views"], "views: no such number"),
        (["."], "exists: choose another folder"),
        (["new", "--connector", "mpl"], "invalid choice: 'mpl'"),
    ],
)
def test_llava_refuses(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llava.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(DEMOS / "llava.py"), run_name="__main__")
    assert stopped.value.code == 2 and message in capsys.readouterr().err
