"""Captions at validation: the share of equal ones, of which pictures, without a trace in the rest of the run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import Made, records, squares, tiny_run
from vlm.data.batch import Batch
from vlm.model.generate import Sampling
from vlm.model.transcribe import commonest
from vlm.train import alike, run
from vlm.train.alike import SAID, TRUE, Sayings, monotone
from vlm.train.log import Log, read_metrics
from vlm.train.parallel import Passes
from vlm.train.run import speech, train_run
from vlm.train.validate import validate
from vlm.world import World


@pytest.mark.parametrize(
    ("texts", "share"), [(["a"], 1.0), (["a", "b", "c", "d"], 0.25), (["A  red", "b", "a red ", "a red"], 0.75)]
)
def test_the_share_of_the_most_common(texts: list[str], share: float) -> None:
    assert commonest(texts) == share


def test_no_text_has_no_share() -> None:
    with pytest.raises(ValueError, match="no text to count"):
        commonest([])


@pytest.mark.parametrize(
    ("said", "true", "expected"), [(1.0, 0.1, True), (0.9, 0.5, True), (0.8, 0.1, False), (1.0, 0.6, False)]
)
def test_when_a_model_says_one_thing(said: float, true: float, expected: bool) -> None:
    assert monotone(said, true) is expected


class Stub:
    """Says a given text of each picture it is shown."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.shown, self.most = iter(texts), 0, 0

    def __call__(self, model: Any, tokenizer: Any, images: Tensor, template: str, longest: int, how: Sampling) -> Any:
        assert not model.training and not torch.is_grad_enabled() and how.temperature == 0
        self.shown, self.most = self.shown + len(images), how.max_new
        return [next(self.texts) for _ in images]


def given(made: Made, *batches: Batch) -> dict[str, float]:
    """What validation tells of these batches."""
    return validate(made.passes, lambda *_: iter(batches), speech(made.run, made.tokenizer))


def test_shares_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all batches; of several captions of a picture the first counts."""
    made = Made(tiny_run(tmp_path, "decoder"))
    stub = Stub(["x", "y", "x ", "X", "z"])
    monkeypatch.setattr(alike, "describe", stub)
    second = made.batch("a blue square", "a red square", "a red square")
    second = replace(second, images=second.pixels[:2], owner=torch.tensor([0, 0, 1]), keys=["0", "1"])
    second = replace(second, positive=torch.eye(3, dtype=torch.bool)[:2])
    found = given(made, made.batch("a red square", "a green square", "a red square"), second)
    assert (found[SAID], found[TRUE]) == (0.6, 0.6)
    assert (stub.shown, stub.most) == (5, 12)


def test_few_pictures_and_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tiny_run(tmp_path, "decoder", "data.max_tokens=40"))
    stub = Stub(["x"] * 16 + ["y"] * 16)
    monkeypatch.setattr(alike, "describe", stub)
    batches = [made.batch(*("a red square",) * 10) for _ in range(5)]
    assert given(made, *batches)[SAID] == 0.5
    assert (stub.shown, stub.most) == (32, 20)


@dataclass(frozen=True)
class Two(World):
    """One of two processes whose other one has a batch of ten too."""

    size: int = 2

    def sum(self, numbers: Sequence[float | int]) -> list[float]:
        return [10.0 for _ in numbers]


@pytest.mark.parametrize(("rank", "expected"), [(0, [10, 10]), (1, [10, 2])])
def test_the_first_pictures_whoever_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, expected: list[int]
) -> None:
    made = Made(tiny_run(tmp_path, "decoder"))
    stub = Stub(["x"] * 32)
    monkeypatch.setattr(alike, "describe", stub)
    world, batch = Two(torch.device("cpu"), rank), made.batch(*("a red square",) * 10)
    sayings = Sayings(Passes(made.task.eval(), torch.float32, world), speech(made.run, made.tokenizer))
    shown = []
    with torch.no_grad():
        for _ in range(4):
            sayings.hear(batch)
            shown.append(stub.shown - sum(shown))
    assert shown == [*expected, 0, 0]


def test_true_captions_are_cut_as_the_written_ones(tmp_path: Path) -> None:
    made = Made(tiny_run(tmp_path, "decoder", "data.max_tokens=40"))
    long = "a red square " * 10
    assert given(made, made.batch(long + "on white", long + "on black", "a blue square", "a red square"))[TRUE] == 0.5


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("decoder", ()), ("decoder", ("model.language.mixer.kind=retention",)), ("qformer", ())],
)
def test_any_model_that_writes(tmp_path: Path, kind: str, overrides: tuple[str, ...], precision: torch.dtype) -> None:
    """And no random number is drawn for it."""
    made = Made(tiny_run(tmp_path, kind, *overrides))
    passes, batch = Passes(made.task, precision), made.batch("red", "green", "blue", "red")
    states, found = [], []
    for how in (None, speech(made.run, made.tokenizer)):
        found.append(validate(passes, lambda *_: iter([batch]), how))
        states.append(torch.get_rng_state())
    assert found[1].keys() - found[0].keys() == {SAID, TRUE}
    assert found[1] == found[0] | {SAID: found[1][SAID], TRUE: 0.5}
    assert 0.25 <= found[1][SAID] <= 1.0
    assert torch.equal(*states)


def test_nothing_to_compare(tmp_path: Path) -> None:
    """One picture alone, and a run that writes no text."""
    made = Made(tiny_run(tmp_path, "decoder"))
    assert set(given(made, made.batch("red"))) == {"val/loss_lm"}
    pairs = tiny_run(tmp_path, "clip")
    assert speech(pairs, made.tokenizer) is None


class Divided(Passes):
    """As over sharded weights."""

    sharded = True


def test_nothing_over_sharded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tiny_run(tmp_path, "decoder"))
    batch, how = made.batch("red", "green"), speech(made.run, made.tokenizer)
    whole = validate(made.passes, lambda *_: iter([batch]), how)
    monkeypatch.setattr(alike, "describe", None)
    found = validate(Divided(made.task, torch.float32), lambda *_: iter([batch]), how)
    assert found == {key: value for key, value in whole.items() if key not in (SAID, TRUE)}


def test_training_goes_on_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout and the average in between: all other numbers are the same."""
    wanted = ("train.eval_every=1", "train.ema=0.9", "model.connector.dropout=0.2")
    settings = tiny_run(tmp_path, "qformer", *wanted, f"data.val={squares(tmp_path / 'val.tar', 6, 'v')}")
    train_run(settings, tmp_path / "with")
    monkeypatch.setattr(run, "speech", lambda *_: None)
    train_run(settings, tmp_path / "without")
    ours = records(tmp_path / "with")
    assert sum(SAID in record for record in ours) == 4
    plain = [{key: value for key, value in record.items() if key not in (SAID, TRUE)} for record in ours]
    assert plain == records(tmp_path / "without")


@pytest.mark.parametrize(
    ("steps", "said", "true", "warnings"),
    [(400, 1.0, 0.2, 1), (400, 0.3, 0.2, 0), (400, 1.0, 1.0, 0), (150, 1.0, 0.2, 0)],
)
def test_warned_of_once_and_late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, said: float, true: float, warnings: int
) -> None:
    with Log(tmp_path, steps, "train", 1, {}) as log:
        for done in (50, steps - 1, steps):
            log.event(done, {"val/loss_lm": 1.0, SAID: said, TRUE: true})
    assert capsys.readouterr().err.count("the model says one thing of every picture") == warnings
    assert [record[SAID] for record in read_metrics(tmp_path)] == [said] * 3
