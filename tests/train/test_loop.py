"""One optimizer step and the loop around it: accumulation, gradients that are not finite, Ctrl-C, draws by step."""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import Made, tiny_run
from vlm.data.batch import Batch
from vlm.train.average import Average
from vlm.train.log import Log, read_metrics
from vlm.train.loop import Plan, fit, gradient_norm
from vlm.train.signals import Interrupted, catch_signals

CAPTIONS = ("red", "a green square", "a blue square on white, a blue one", "yellow square")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tiny_run(tmp_path, "decoder"))


def gradients(made: Made) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


def weights(made: Made) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def halves(batch: Batch) -> list[Batch]:
    """The batch in two, each with its own rows alone."""

    def part(rows: slice) -> Batch:
        assert batch.prompts is not None
        index = torch.arange(len(batch.owner))[rows]
        return replace(
            batch,
            keys=batch.keys[rows],
            images=batch.images[rows],
            image_ids=batch.image_ids[rows],
            owner=torch.arange(len(index)),
            strings=batch.strings[rows],
            captions=batch.captions.select(index),
            prompts=batch.prompts.select(index),
            positive=batch.positive[rows, rows],
        )

    middle = len(batch.images) // 2
    return [part(slice(0, middle)), part(slice(middle, None))]


def frozen_step(made: Made, group: list[Batch], clip: float | None = None) -> tuple[dict[str, float], float]:
    """A step at rate 0, so that it can be compared with another from the same weights."""
    made.optimizer.param_groups[0]["lr"] = made.optimizer.param_groups[1]["lr"] = 0.0
    return made.step(group, clip)


def test_two_halves_equal_one_batch(made: Made) -> None:
    batch = made.batch(*CAPTIONS)
    parts = halves(batch)
    counts = [made.task.objectives[0].share(part) for part in parts]
    assert counts[0] != counts[1]  # else halves weighted alike would pass too
    losses, norm = frozen_step(made, [batch])
    whole = gradients(made)
    accumulated, other_norm = frozen_step(made, parts)
    split = gradients(made)
    assert set(whole) == set(split)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-6, rtol=1e-5, msg=name)
    assert accumulated["lm"] == pytest.approx(losses["lm"], abs=1e-5)
    assert other_norm == pytest.approx(norm, abs=1e-5)


def test_halves_weighted_alike_would_differ(made: Made) -> None:
    batch = made.batch(*CAPTIONS)
    whole, _ = frozen_step(made, [batch])
    parts = [frozen_step(made, [part])[0]["lm"] for part in halves(batch)]
    assert abs(sum(parts) / 2 - whole["lm"]) > 1e-4


def test_the_norm_is_the_one_before_clipping(made: Made) -> None:
    batch = made.batch(*CAPTIONS)
    _, norm = frozen_step(made, [batch])
    _, reported = frozen_step(made, [batch], clip=norm / 4)
    assert reported == pytest.approx(norm, rel=1e-5)
    assert gradient_norm(made.task, None) == pytest.approx(norm / 4, rel=1e-3)


def spoil(batch: Batch) -> Batch:
    return replace(batch, images=torch.full_like(batch.images, math.nan))


def test_a_step_without_a_finite_gradient_changes_nothing(made: Made) -> None:
    batch = made.batch(*CAPTIONS)
    made.step([batch], 1.0)
    before = weights(made)
    moments = {key: value.clone() for state in made.optimizer.state.values() for key, value in state.items()}
    _, norm = made.step([batch, spoil(batch)], 1.0)
    assert not math.isfinite(norm)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(made).items())
    after = {key: value for state in made.optimizer.state.values() for key, value in state.items()}
    assert all(torch.equal(moments[key], value) for key, value in after.items())


def loop(
    made: Made,
    folder: Path,
    batches: Iterator[Batch],
    plan: Plan,
    save: Callable[[int], None] = lambda step: None,
    start: int = 0,
    **more: Any,
) -> None:
    with Log(folder, plan.steps, "train", 1, {}, start) as log:
        fit(
            made.passes,
            batches,
            made.optimizer,
            plan,
            log,
            lambda step, lowest, best: save(step),
            start=start,
            **more,
        )


def test_the_best_is_saved_when_it_comes(made: Made, tmp_path: Path) -> None:
    """A resumed run knows what an earlier part has reached, and the average loss is weighed as in training."""
    losses, saved = iter([3.0, 1.0, 2.0, 0.75]), list[tuple[int, float, bool]]()

    def evaluate() -> dict[str, float]:
        value = next(losses)
        return {f"val/loss_{o.name}": value for o in made.task.objectives}

    weight = sum(o.weight for o in made.task.objectives)
    with Log(tmp_path, 4, "train", 1, {}) as log:
        fit(
            made.passes,
            repeat(made.batch(*CAPTIONS)),
            made.optimizer,
            Plan(4, eval_every=1, keep_best=True),
            log,
            lambda *given: saved.append(given),
            evaluate,
            best=2.5 * weight,
        )
    assert saved == [(2, weight, True), (4, 0.75 * weight, True)]


def test_aborts_after_many_bad_steps_in_a_row(made: Made, tmp_path: Path) -> None:
    good = made.batch(*CAPTIONS)
    bad, before = spoil(good), weights(made)
    saved: list[int] = []
    rows = [*repeat(bad, 4), good, *repeat(bad, 10)]
    message = r"no finite gradient in the last 5 steps \(up to 10\): the pixels are not finite, samples 0, 1, 2, 3\."
    with pytest.raises(ValueError, match=message):
        loop(made, tmp_path, iter(rows), Plan(40), saved.append)
    assert saved == []
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(made).items())  # the good one counted
    assert all(tensor.isfinite().all() for tensor in weights(made).values())


def test_saves_at_its_steps_and_at_the_end(made: Made, tmp_path: Path) -> None:
    saved: list[int] = []
    loop(made, tmp_path, repeat(made.batch(*CAPTIONS)), Plan(5, save_every=2), saved.append)
    assert saved == [2, 4, 5]


def test_a_save_that_fails_is_tried_again_but_not_at_the_end(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    def save(step: int) -> None:
        tried.append(step)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        loop(made, tmp_path, repeat(made.batch(*CAPTIONS)), Plan(5, save_every=2), save)
    assert tried == [2, 4, 5]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning: the disk is full; training goes on and saves again after 2 steps") == 2


def test_evaluates_the_average_and_trains_on(made: Made, tmp_path: Path) -> None:
    average = Average(made.model, 0.99)
    seen = []

    def evaluate() -> dict[str, float]:
        made.task.eval()
        name, parameter = next(iter(made.model.named_parameters()))
        seen.append(torch.equal(parameter, average.tensors[name]))
        return {f"val/loss_{o.name}": 1.0 for o in made.task.objectives}

    batches = repeat(made.batch(*CAPTIONS))
    loop(made, tmp_path, batches, Plan(5, eval_every=2), evaluate=evaluate, average=average)
    assert seen == [True, True, True]
    assert [r["step"] for r in read_metrics(tmp_path) if "val/loss_lm" in r] == [2, 4, 5]
    name, parameter = next(iter(made.model.named_parameters()))
    assert not torch.equal(parameter, average.tensors[name])
    assert made.task.training


def interrupting(batch: Batch, at: int) -> Iterator[Batch]:
    """The same batch for ever; Ctrl-C while batch number `at` (from 1) is fetched."""
    count = 0
    while True:
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGINT)
        yield batch


def test_ctrl_c_finishes_the_step_saves_and_says_where(made: Made, tmp_path: Path) -> None:
    saved: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped at step 3") as caught:
        loop(made, tmp_path, interrupting(made.batch(*CAPTIONS), 3), Plan(100), saved.append)
    assert (caught.value.step, saved) == (3, [3])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_the_last_step_is_a_finished_run(made: Made, tmp_path: Path) -> None:
    saved: list[int] = []
    loop(made, tmp_path, interrupting(made.batch(*CAPTIONS), 3), Plan(3), saved.append)
    assert saved == [3]


def test_a_second_ctrl_c_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), catch_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    found: list[int] = []

    def body() -> None:
        with catch_signals() as asked:
            found.append(asked())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [0]


def test_draws_depend_on_the_step_alone(made: Made, tmp_path: Path) -> None:
    batch, drawn = made.batch(*CAPTIONS), dict[str, list[float]]()

    def record(name: str, start: int, noise: int, seed: int = 0) -> None:
        draws = drawn.setdefault(name, [])
        hook = made.task.register_forward_pre_hook(lambda *_: draws.append(float(torch.rand(()))))
        torch.rand(noise)  # what the process drew before must not matter
        (tmp_path / name).mkdir()
        loop(made, tmp_path / name, repeat(batch), Plan(5, seed=seed), start=start)
        hook.remove()

    record("whole", 0, 3)
    record("resumed", 3, 8)
    record("other", 0, 3, seed=1)
    assert drawn["resumed"] == drawn["whole"][3:]
    assert len(set(drawn["whole"] + drawn["other"])) == 10
