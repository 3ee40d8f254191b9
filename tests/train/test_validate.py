"""The vision gap: above zero once a model looks at the picture, none where it does not, and a warning in words."""

from pathlib import Path

import pytest
import torch

from tests.tiny import COLOURS, Made, pack, picture, records, settings, tiny_run, write_config
from tests.tiny import read as read_config
from vlm.config.schema import Run
from vlm.model.connector import MlpConnector
from vlm.train.alike import SAID, TRUE
from vlm.train.run import train_run
from vlm.train.validate import GAP, blind, derangement, validate

WARNING = "the lm loss is the same with the wrong pictures"


@pytest.mark.parametrize("count", [2, 3, 7, 64])
def test_a_derangement_moves_everything(count: int) -> None:
    order = derangement(count, 1)
    assert sorted(order) == list(range(count))
    assert all(place != i for i, place in enumerate(order))
    assert derangement(count, 1) == order
    assert count < 7 or derangement(count, 2) != order


@pytest.mark.parametrize(("gap", "loss", "expected"), [(0.0, 2.0, True), (-0.3, 2.0, True), (0.05, 2.0, False)])
def test_when_a_gap_is_none(gap: float, loss: float, expected: bool) -> None:
    assert blind(gap, loss) is expected


def captioned(folder: Path, depends: bool) -> Run:
    """Squares whose captions tell their colour, or a colour that has nothing to do with them."""
    found = []
    for i in range(32):
        told = COLOURS[i % 8] if depends else COLOURS[i // 8]
        found += [(f"{i:04d}.png", picture(COLOURS[i % 8])), (f"{i:04d}.txt", f"a {told} square".encode())]
    shard = pack(folder / "shard.tar", found)
    params = [{"match": ".*", "lr": 1e-2}]
    given = settings("decoder", shard, steps=200, batch_size=16, log_every=50, params=params)
    given["data"]["val"] = str(shard)
    return read_config(write_config(folder / "run.yaml", given))


@pytest.mark.slow
@pytest.mark.parametrize("depends", [True, False])
def test_the_gap_tells_whether_captions_depend_on_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], depends: bool
) -> None:
    train_run(captioned(tmp_path, depends), tmp_path / "run")
    gap = [record[GAP] for record in records(tmp_path / "run") if GAP in record][-1]
    assert (gap > 0.1) is depends
    assert blind(gap, 0.0) is not depends
    assert (WARNING in capsys.readouterr().err) is not depends
    last = next(record for record in records(tmp_path / "run") if SAID in record)
    assert last[TRUE] == (0.125 if depends else 0.25)
    if depends:
        assert last[SAID] <= 0.25


@pytest.mark.slow
def test_a_connector_that_passes_nothing_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = MlpConnector.forward
    monkeypatch.setattr(MlpConnector, "forward", lambda self, seen: original(self, seen) * 0)
    train_run(captioned(tmp_path, depends=True), tmp_path / "run")
    assert [record[GAP] for record in records(tmp_path / "run") if GAP in record] == [0.0]
    said = " ".join(capsys.readouterr().err.split())
    assert WARNING in said and "200 steps 100% of the captions are the same, of the true ones 12%" in said
    assert [(record[SAID], record[TRUE]) for record in records(tmp_path / "run") if SAID in record] == [(1.0, 0.125)]


def test_nothing_to_exchange(tmp_path: Path) -> None:
    """No gap of a batch of one, nor of a run that writes no text."""
    alone = Made(tiny_run(tmp_path, "decoder"))
    assert set(validate(alone.passes, lambda *_: iter([alone.batch("red")]))) == {"val/loss_lm"}
    pairs = Made(tiny_run(tmp_path, "clip"))
    assert set(validate(pairs.passes, lambda *_: iter([pairs.batch("a", "b")]))) == {"val/loss_itc"}


def test_the_gap_is_a_difference_of_losses(tmp_path: Path) -> None:
    made = Made(tiny_run(tmp_path, "decoder"))
    batch = made.batch("red", "green", "blue")
    found = validate(made.passes, lambda *_: iter([batch]))
    with torch.no_grad():
        made.task.eval()
        images = batch.pixels[derangement(3, 0)]
        wrong = made.task(type(batch)(**{**vars(batch), "images": images})).each["lm"]
    assert found[GAP] == pytest.approx(float(wrong) - found["val/loss_lm"], abs=1e-6)
