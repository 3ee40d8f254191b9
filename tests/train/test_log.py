"""metrics.jsonl, what a resumed run cuts off it, and the warning about a loss that stays at chance."""

import json
from pathlib import Path

import pytest

from vlm.train import log as log_module
from vlm.train.log import Log, check_reports, cut_after, read_metrics


def run(folder: Path, losses: list[float], every: int = 1, chance: float = 2.0, start: int = 0) -> None:
    with Log(folder, start + len(losses), "train", every, {"itc": chance}, start) as log:
        for step, loss in enumerate(losses, start + 1):
            log.step(step, {"itc": loss}, {"lr": 0.1 * step, "grad_norm": 1.0}, {"samples": 8.0})


def test_losses_stand_beside_chance(tmp_path: Path) -> None:
    run(tmp_path, [1.0, 2.0, 6.0], every=2)
    records = read_metrics(tmp_path)
    assert [(r["step"], r["train/loss_itc"], r["chance/loss_itc"]) for r in records] == [(2, 1.5, 2.0), (3, 6.0, 2.0)]
    assert records[0]["train/lr"] == pytest.approx(0.2)  # the newest, not a mean
    assert all(r["train/samples_per_second"] > 0 for r in records)


def test_speed_counts_every_step_since_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: float(next(clock)))
    run(tmp_path, [1.0] * 4, every=4)
    (record,) = read_metrics(tmp_path)
    assert record["train/samples_per_second"] == pytest.approx(4 * 8 / 20)  # the clock is read twice at the start


def test_tokens_and_utilisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: float(next(clock)))
    with Log(tmp_path, 2, "train", 2, {}, token_seconds=0.01) as log:
        for step in (1, 2):
            log.step(step, {"lm": 1.0}, {}, {"samples": 2.0, "tokens": 500.0})
    (record,) = read_metrics(tmp_path)
    assert record["train/tokens_per_second"] == pytest.approx(1000 / 20)
    assert record["train/mfu"] == pytest.approx(50 * 0.01)
    assert "50 tokens/s  MFU 50 %" in " ".join(capsys.readouterr().err.split(" "))


def test_events_are_logged_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, 10, "stage", 5, {}) as log:
        log.event(5, {"val/loss_itc": 1.25})
    assert read_metrics(tmp_path) == [{"step": 5, "val/loss_itc": 1.25}]
    assert "stage 5/10  val/loss_itc 1.25" in capsys.readouterr().err


def test_cut_after_drops_later_and_torn_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": step}) for step in (1, 2, 3, 4)]
    file.write_text("\n".join(lines) + '\n{"step": 2, "x"', encoding="utf-8")
    cut_after(file, 2)
    assert file.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in lines[:2])
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("torn", [b'{"step": 2, "x', b'{"step": 1', bytes(300), b"\xff\xfe", b"\n\n", b'{"step": 2}'])
def test_whatever_a_crash_leaves_at_the_end_is_cut(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    file.write_bytes(whole + torn)
    cut_after(file, 2)
    assert file.read_bytes() == whole + (torn + b"\n" if torn.endswith(b"}") else b"")


def test_cut_after_without_a_file(tmp_path: Path) -> None:
    cut_after(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
    assert read_metrics(tmp_path) == []


def test_a_resumed_log_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    run(tmp_path, [1.0, 2.0, 3.0])
    run(tmp_path, [5.0], start=2)
    assert [(r["step"], r["train/loss_itc"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 5.0)]


@pytest.mark.parametrize(
    ("losses", "warnings"),
    [
        ([2.0] * 400, 1),  # at chance: warned once
        ([1.95] * 400, 1),  # a trifle below counts as chance
        ([2.0] * 199 + [1.0] * 201, 0),  # too early to say
        ([1.9] * 400, 0),  # learning
        ([2.0] * 150, 0),  # a short run
    ],
)
def test_warning_of_a_loss_stuck_at_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], losses: list[float], warnings: int
) -> None:
    run(tmp_path, losses)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning: after") == warnings
    if warnings:
        assert f"the itc loss is {losses[-1]:.3f}, and guessing gives 2.000: nothing has been learned from it" in said


def test_a_long_run_is_given_more_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, 5000, "train", 1, {"itc": 2.0}) as log:
        for step in (1, 999, 1000):
            log.step(step, {"itc": 2.0}, {}, {})
            assert ("warning" in capsys.readouterr().err) == (step == 1000)


def test_a_loss_without_a_chance_level_is_never_stuck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, 400, "train", 400, {}) as log:
        log.step(400, {"other": 5.0}, {}, {})
    assert "warning" not in capsys.readouterr().err


def test_a_missing_board_is_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "find_spec", lambda name: None)
    check_reports([])
    with pytest.raises(ValueError, match=r"tensorboard is not installed: pip install 'vlm\[tensorboard\]'"):
        check_reports(["tensorboard"])
