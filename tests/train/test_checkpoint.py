"""Checkpoints: what is stored, what is refused, and that a save is whole or leaves everything as it was."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm import checkpoint
from vlm.train.optim import Rule, assign, make_optimizer
from vlm.world import World

ALONE = World(torch.device("cpu"))


class Net(nn.Module):
    """A frozen encoder with a buffer, and what learns on top of it."""

    def __init__(self, seed: int = 0, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vision = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
        self.connector = nn.Sequential(nn.Linear(width, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.connector(self.vision(x))
        return out


class Job:
    """A model with its optimizer, saved into a folder that looks like a run's."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.run = folder
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").touch()
        self.net = Net(seed)
        self.optimizer = make_optimizer(self.net, assign(self.net, [Rule(".*", 1e-2, 0.1)], ["vision"]), (0.9, 0.98))
        self.net.vision.eval()
        self.stored = checkpoint.divide(self.net, {"vision"})

    def step(self, seed: int) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        self.optimizer.zero_grad()
        self.net(x).square().sum().backward()
        self.optimizer.step()

    def save(self, step: int, **more: Any) -> Path:
        checkpoint.save(self.run, step, self.net, self.stored, self.optimizer, ALONE, **more)
        return self.run / f"step-{step:07d}"

    def load(self, folder: Path, averaged: bool = True) -> int:
        return checkpoint.load_weights(folder, self.net, {"vision"}, averaged)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path / "run")
    job.step(0)
    return job


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_frozen_weights_of_a_source_are_hashed_not_stored(job: Job) -> None:
    folder = job.save(7)
    held = load_file(folder / "model.safetensors")
    assert set(held) == {name for name in job.net.state_dict() if name.startswith("connector")}
    assert "connector.1.running_mean" in held
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["frozen"]["tensors"]) == (7, 7)
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_frozen_weights_without_a_source_are_stored(job: Job) -> None:
    assert checkpoint.divide(job.net, set()).frozen == []


def test_buffers_of_a_part_that_learns_are_stored(job: Job) -> None:
    job.net.vision[0].weight.requires_grad_(True)  # its running means move with it
    stored = checkpoint.divide(job.net, {"vision"})
    assert "vision.1.running_mean" in stored.kept
    assert "vision.0.bias" in stored.frozen


def test_fingerprint_sees_names_shapes_types_and_bytes() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    own = checkpoint.fingerprint(tensors, ["b", "a"])
    assert own == checkpoint.fingerprint({"b": torch.ones(2), "a": torch.zeros(3, 2).T.contiguous()}, ["a", "b"])
    for other in (
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 2.0])},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(2)},
    ):
        assert checkpoint.fingerprint(other, ["a", "b"]) != own


def test_round_trip(job: Job) -> None:
    folder = job.save(1)
    other = Job(job.run)
    other.net.connector.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Linear) else None)
    assert other.load(folder) == 1
    assert equal(job.net.state_dict(), other.net.state_dict())


def test_optimizer_continues_bit_equal(job: Job) -> None:
    folder = job.save(1)
    other = Job(job.run)
    other.load(folder)
    checkpoint.load_optimizer(folder, other.net, other.optimizer)
    for seed in (1, 2):
        job.step(seed)
        other.step(seed)
    assert equal(job.net.state_dict(), other.net.state_dict())
    ours = checkpoint.optimizer_tensors(job.net, job.optimizer)
    theirs = checkpoint.optimizer_tensors(other.net, other.optimizer)
    assert {name.rsplit("/")[1] for name in ours} == {"step", "exp_avg", "exp_avg_sq"}
    assert equal(ours, theirs)


def test_memory_is_laid_out_as_its_parameter(job: Job) -> None:
    """The fused optimizer pairs raw memory; a convolution in channels_last order would get another's moments."""

    def conv() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)
        return net, make_optimizer(net, assign(net, [Rule(".*", 1e-2, 0.0)]), (0.9, 0.98))

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        net(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    net, optimizer = conv()
    step(net, optimizer, 0)
    checkpoint.save(job.run, 1, net, checkpoint.divide(net, ()), optimizer, ALONE)
    folder = job.run / "step-0000001"
    other, again = conv()
    checkpoint.load_weights(folder, other, ())
    checkpoint.load_optimizer(folder, other, again)
    step(net, optimizer, 1)
    step(other, again, 1)
    assert equal(net.state_dict(), other.state_dict())


def test_memory_of_what_does_not_learn_now_is_refused(job: Job) -> None:
    folder = job.save(1)
    other = Job(job.run)
    rules = [Rule(r"connector\.0\.weight", 1e-2, 0.0), Rule(".*", None, 0.0)]
    optimizer = make_optimizer(other.net, assign(other.net, rules), (0.9, 0.98))
    with pytest.raises(ValueError, match=r"was trained with connector\.0\.bias, which does not learn now: compare"):
        checkpoint.load_optimizer(folder, other.net, optimizer)


def test_average_is_preferred_unless_training_goes_on(job: Job) -> None:
    average = {"connector.0.weight": torch.full((2, 3), 7.0)}
    folder = job.save(1, average=average)
    live = job.net.connector[0].weight.detach().clone()
    job.load(folder)
    assert torch.equal(job.net.connector[0].weight, average["connector.0.weight"])
    job.load(folder, averaged=False)
    assert torch.equal(job.net.connector[0].weight, live)


def test_other_frozen_weights_are_refused(job: Job) -> None:
    folder = job.save(1)
    other = Job(job.run, seed=1)
    with pytest.raises(ValueError, match=r"trained on other frozen weights .* model\.vision\.weights and model\.init"):
        other.load(folder)


def test_differing_names_and_shapes_are_listed(job: Job) -> None:
    folder = job.save(1)
    tensors = load_file(folder / "model.safetensors")
    tensors["connector.0.wieght"] = tensors.pop("connector.0.weight")
    tensors["connector.0.bias"] = torch.zeros(5)
    save_file(tensors, folder / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in job.net.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit the model of its config") as caught:
        job.load(folder)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "missing: connector.0.weight 2x3",
        "not in the model: connector.0.wieght 2x3",
        "other shape: connector.0.bias is 5, the model's is 2",
    ]
    assert equal(before, job.net.state_dict())


def test_a_cut_off_file_is_refused(job: Job) -> None:
    file = job.save(1) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        job.load(file.parent)


def failing(original: Callable[..., Any], at: int, error: Exception) -> Callable[..., Any]:
    """`original`, but the call number `at` (from 0) leaves half a file and fails."""
    calls = 0

    def call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            if original is save_file:
                arguments[1].write_bytes(b"half")
            raise error
        return original(*arguments)

    return call


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FILES = [
    (save_file, "vlm.checkpoint.save_file", at, error)
    for at in range(3)
    for error in (FULL, SafetensorError("Error while serializing: I/O error: No space left on device"))
]
SYNCS = [(os.fsync, "os.fsync", at, FULL) for at in range(5)]


@pytest.mark.parametrize(("original", "name", "at", "error"), FILES + SYNCS)
def test_a_full_disk_leaves_the_checkpoint_before_whole(
    job: Job, monkeypatch: pytest.MonkeyPatch, original: Any, name: str, at: int, error: Exception
) -> None:
    average = {"connector.0.weight": torch.zeros(2, 3)}
    before = job.save(1, average=average)
    held = snapshot(job.run)
    job.step(1)
    with monkeypatch.context() as patch:
        patch.setattr(name, failing(original, at, error))
        with pytest.raises(OSError, match=r"could not save step 2 in .*No space left.*checkpoints before it are whole"):
            job.save(2, average=average)
    after = snapshot(job.run)
    assert {path: data for path, data in after.items() if not path.startswith("step-0000002/")} == held
    assert checkpoint.latest(job.run) == before
    Job(job.run).load(before)
    assert checkpoint.latest(job.save(2).parent).name == "step-0000002"  # and once there is room, it saves


def test_a_full_disk_at_a_small_file(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    held = snapshot(job.save(1).parent)
    for name in ("state.json", ".latest.tmp"):

        def write(path: Path, text: str, name: str = name, **options: Any) -> int:
            if path.name == name:
                raise FULL
            return path.write_bytes(text.encode())

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", write)
            with pytest.raises(OSError, match="could not save step 2"):
                job.save(2)
        kept = snapshot(job.run)
        assert {path: data for path, data in kept.items() if not path.startswith("step-0000002/")} == held
        assert checkpoint.latest(job.run).name == "step-0000001"


def test_an_unwritable_place_is_an_error_in_words(job: Job) -> None:
    shutil.rmtree(job.run)
    job.run.write_text("a file")
    with pytest.raises(OSError, match="could not save step 1"):
        job.save(1)


def test_torn_folders_are_ignored_and_later_removed(job: Job) -> None:
    first = job.save(1)
    for torn in (job.run / ".step-0000002.tmp", job.run / "step-0000003"):
        torn.mkdir()
        (torn / "model.safetensors").write_bytes(b"half")
    assert checkpoint.latest(job.run) == first
    assert checkpoint.checkpoints(job.run) == [first]
    job.save(3)
    assert not (job.run / ".step-0000002.tmp").exists()
    assert checkpoint.latest(job.run).name == "step-0000003"
    assert Job(job.run).load(checkpoint.latest(job.run)) == 3


def test_keeps_the_last_ones(job: Job) -> None:
    for step in (1, 2, 10, 11):
        job.save(step, keep=2)
    assert [path.name for path in checkpoint.checkpoints(job.run)] == ["step-0000010", "step-0000011"]
    assert (job.run / "latest").read_text() == "step-0000011\n"


def test_latest_without_its_pointer(job: Job) -> None:
    job.save(1)
    newest = job.save(2)
    (job.run / "latest").unlink()
    assert checkpoint.latest(job.run) == newest
    (job.run / "latest").write_text("step-0000009\n")
    assert checkpoint.latest(job.run) == newest


def test_latest_of_no_run(tmp_path: Path, job: Job) -> None:
    with pytest.raises(ValueError, match=r"is not the folder of a run: it has no config\.yaml"):
        checkpoint.latest(tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint yet: let it train up to its first save"):
        checkpoint.latest(job.run)


def test_the_best_outlives_the_newest(job: Job) -> None:
    for step, best in ((1, True), (2, True), (3, False), (4, False)):
        job.save(step, keep=1, best=best)
    assert [folder.name for folder in checkpoint.checkpoints(job.run)] == ["step-0000002", "step-0000004"]
    assert checkpoint.whole(job.run, checkpoint.BEST).name == "step-0000002"
    assert checkpoint.latest(job.run).name == "step-0000004"


def test_without_a_best_the_newest_is_used(job: Job) -> None:
    job.save(1)
    job.save(2)
    assert checkpoint.whole(job.run, checkpoint.BEST) == checkpoint.latest(job.run)
