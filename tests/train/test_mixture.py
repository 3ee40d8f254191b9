"""A run on a mixture: the table, each source read by its own settings, resumed bit for bit."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.tiny import COLOURS, picture, read, records, settings, squares, write_config
from vlm.config.schema import Run
from vlm.restore import restore
from vlm.train.features import features
from vlm.train.log import Log
from vlm.train.overfit import overfit
from vlm.train.run import train_run


def config(place: Path, **train: int) -> Path:
    """Squares in a tar by weight 3, and in a table with a column of its own for captions."""
    (place / "pictures").mkdir(exist_ok=True)
    rows = []
    for i, colour in enumerate(COLOURS):
        (place / "pictures" / f"{i:04d}.png").write_bytes(picture(colour, shift=3))
        rows.append(json.dumps({"image": f"{i:04d}.png", "said": f"one {colour} square"}))
    (place / "table.jsonl").write_text("\n".join(rows))
    table = {"source": str(place / "table.jsonl"), "images": str(place / "pictures")}
    table |= {"image": "image", "caption": "json:said"}
    given = settings("qformer", squares(place / "squares.tar"), **train)
    given["data"]["train"] = [{"source": given["data"]["train"], "weight": 3}, table]
    given["data"]["val"] = str(squares(place / "val.tar", 6, "v"))
    return write_config(place / "mixture.yaml", given)


def run_of(place: Path, *overrides: str, **train: int) -> Run:
    return read(config(place, **train), *overrides)


def test_table_and_captions_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_run(run_of(tmp_path, "train.accumulate=2", steps=100 // 8, eval_every=6), tmp_path / "run")
    said = capsys.readouterr().err
    lines = said[said.index("source  ") :].splitlines()
    assert lines[0].split() == ["source", "samples", "weight", "share", "of", "96", "epochs"]
    assert lines[1].split()[:3] == [str(tmp_path / "squares.tar"), "16", "3"]
    assert lines[2].split()[:3] == [str(tmp_path / "table.jsonl"), "8", "1"]
    assert sum(int(line.split()[4]) for line in lines[1:3]) == 96
    assert f"{tmp_path / 'table.jsonl'}: JSON lines" in said
    words = restore(tmp_path / "run").tokenizer
    assert all(words.decode(words.encode(text)) == text for text in ("one red square", "a cyan square"))


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of both sources' epochs and of a batch that spans two of them; other workers afterwards."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    given = ("train.batch_size=5", "data.shuffle_window=4", "train.save_every=3")
    train_run(run_of(tmp_path, *given, steps=12), whole)
    step = Log.step

    def stopping(self: Log, done: int, *arguments: object) -> None:
        step(self, done, *arguments)  # type: ignore[arg-type]
        if done == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "step", stopping)
    with pytest.raises(SystemExit):
        train_run(run_of(tmp_path, *given, steps=12), cut)
    monkeypatch.undo()
    train_run(run_of(tmp_path, *given, "data.workers=1", steps=12), cut, resume=True)
    assert records(cut) == records(whole)
    names = ("model.safetensors", "optimizer.safetensors")
    assert all((cut / "step-0000012" / n).read_bytes() == (whole / "step-0000012" / n).read_bytes() for n in names)


def test_preflight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overfit(config(tmp_path, steps=2), [], tmp_path / "run", 4)
    assert capsys.readouterr().out.startswith("overfit: 4 samples, step 2/2")


def test_all_that_is_wrong_with_sources_at_once(tmp_path: Path) -> None:
    sources = f"[{{source: {tmp_path}/none.tar}}, {{source: {tmp_path}/table.jsonl, image: file}}]"
    with pytest.raises(ValueError, match=r"(?s)data\.train\.0: shards .*no file matches.*\ndata\.train\.1: .*columns"):
        train_run(run_of(tmp_path, f"data.train={sources}"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"batch_size=40: data\.train\.0 has 16 usable .* gives it 30\.0 of a batch"):
        train_run(run_of(tmp_path, batch_size=40), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_features_and_mixtures_keep_apart(tmp_path: Path) -> None:
    path = config(tmp_path, steps=1)
    train_run(read(path), tmp_path / "run")
    frozen = ["model.vision.frozen=true", f"model.init.vision={tmp_path / 'run'}", "data.val=null"]
    with pytest.raises(ValueError, match=r"data\.train: a mixture, whose weights features would lose; name one source"):
        features(path, frozen, tmp_path / "kept")
    features(path, [*frozen, f"data.train={tmp_path / 'squares.tar'}"], tmp_path / "kept")
    mixed = f"data.train=[{{source: {tmp_path / 'kept' / 'train'}}}, {{source: {tmp_path / 'squares.tar'}}}]"
    with pytest.raises(ValueError, match=r"data\.train\.0: .*train holds features; a mixture is of pictures"):
        train_run(read(path, *frozen, mixed), tmp_path / "other")
