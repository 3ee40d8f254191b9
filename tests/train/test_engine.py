"""Activation checkpointing, compiled blocks, what is repeated in a model, and the exchanges between processes."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.command import commands
from tests.tiny import Made, records, settings, squares, tiny_run, write_config
from vlm.nn.block import Block
from vlm.train.parallel import compile_layers, layers, recompute
from vlm.world import Lost, World, exchanging, joined, started

DEEP = ["model.language.layers=4", "model.language.dropout=0.1"]
CAPTIONS = ("red", "a green square", "a blue square on white", "yellow")


def gradients(made: Made) -> tuple[dict[str, Tensor], int]:
    """Of one pass in training mode, and the bytes that were kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    made.task.train()
    made.task.zero_grad()
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = made.task(made.batch(*CAPTIONS)).total
    total.backward()
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("decoder", DEEP), ("decoder", [*DEEP, "model.language.mixer.kind=retention"]), ("qformer", [])],
)
def test_recomputed_gradients_are_the_same_bits(tmp_path: Path, kind: str, overrides: list[str]) -> None:
    """With dropout, and for a trained image encoder; less is kept."""
    deep = ["model.vision.args={patch_size: 16, embed_dim: 16, depth: 6, num_heads: 2}"]
    plain, again = (Made(tiny_run(tmp_path, kind, *overrides, *deep)) for _ in range(2))
    recompute(again.model)
    (expected, room), (found, less) = gradients(plain), gradients(again)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert less < 0.7 * room


def test_nothing_is_recomputed_without_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = Made(tiny_run(tmp_path, "decoder", *DEEP)), list[object]()
    recompute(made.model)
    monkeypatch.setattr("vlm.nn.block.checkpoint", lambda block, *given, **_: (calls.append(block), block(*given))[1])
    with torch.no_grad():
        made.task(made.batch(*CAPTIONS))
    assert calls == []
    made.task(made.batch(*CAPTIONS))
    assert len(calls) == 4


@pytest.mark.slow
def test_compiled_blocks_give_the_same_curve(tmp_path: Path) -> None:
    """In processes of their own: what checks shapes here is not to be compiled. Checkpoints have the same names."""
    given = settings("decoder", squares(tmp_path / "squares.tar"), steps=4)
    config = write_config(tmp_path / "decoder.yaml", given)
    with commands(tmp_path) as vlm:
        for name, switch in (("plain", "false"), ("compiled", "true")):
            done = vlm("train", config, f"train.compile={switch}", "--out", name, folder=tmp_path)
            assert done.code == 0, done.err
    plain, compiled = (records(tmp_path / name) for name in ("plain", "compiled"))
    for one, other in zip(plain, compiled, strict=True):
        assert other["train/loss_lm"] == pytest.approx(one["train/loss_lm"], abs=1e-4)
    files = [load_file(tmp_path / name / "step-0000004" / "model.safetensors") for name in ("plain", "compiled")]
    assert files[0].keys() == files[1].keys()


def test_what_is_compiled(tmp_path: Path) -> None:
    model = Made(tiny_run(tmp_path, "decoder", *DEEP)).model
    names = list(model.state_dict())
    compile_layers(model)
    assert all(layer._compiled_call_impl is not None for layer in layers(model))
    assert list(model.state_dict()) == names


def test_what_is_repeated(tmp_path: Path) -> None:
    """Blocks of the language model and of the image encoder; not those with cross-attention, whose keys come before."""
    vision = "model.vision.args={patch_size: 16, embed_dim: 16, depth: 3, num_heads: 2}"
    decoder = Made(tiny_run(tmp_path, "decoder", *DEEP, vision)).model
    found = list(layers(decoder))
    assert sum(isinstance(layer, Block) for layer in found) == 4 and len(found) == 7
    qformer = Made(tiny_run(tmp_path, "qformer", vision, "model.connector.layers=4")).model
    kept = [layer for layer in layers(qformer) if isinstance(layer, Block)]
    assert len(kept) == 2 and all(block.cross is None for block in kept)


def test_alone_every_exchange_is_the_identity() -> None:
    world = World(torch.device("cpu"))
    assert world.first and list(world.share(3)) == [0, 1, 2]
    assert world.sum([1, 2.5]) == [1.0, 2.5] and world.most(7) == 7
    assert world.texts("grün\n") == ["grün\n"]
    (part,) = world.gather(torch.ones(2, 3, requires_grad=True))
    assert part.shape == (2, 3) and not part.requires_grad
    with pytest.raises(OSError, match="full"):
        world.first_does(lambda: (_ for _ in ()).throw(OSError("full")))


def test_what_other_processes_cause_is_told_apart() -> None:
    with (
        pytest.raises(Lost, match=r"another process .* \(\[gloo/pair\.cc:1\] Connection closed by peer\)"),
        exchanging(),
    ):
        raise RuntimeError("[gloo/pair.cc:1] Connection closed by peer\nmore")
    with pytest.raises(RuntimeError, match="size of tensor"), exchanging():
        raise RuntimeError("The size of tensor a must match")


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = "WORLD_SIZE=4, but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start the processes with torchrun"
    with pytest.raises(ValueError, match=message):
        started()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined(5) as world:
        assert world.size == 1 and not torch.distributed.is_initialized()


EXCHANGES = """
import sys, torch
from vlm.world import joined
with joined(60) as world:
    r = world.rank
    assert world.sum([r, 2**40 + 1]) == [1.0, 2.0**41 + 2]
    assert world.most(5 - 3 * r) == 5
    assert [part.tolist() for part in world.gather(torch.full((r + 1, 2), float(r)))] == [[[0, 0]], [[1, 1], [1, 1]]]
    assert [len(part) for part in world.gather(torch.zeros(3 * r, 2, dtype=torch.int64))] == [0, 3]
    assert world.texts("é" * r + "\\n") == ["\\n", "é\\n"]
    try:
        world.first_does(lambda: open("/nowhere/at/all", "w"))
    except OSError as error:
        assert "nowhere" in str(error)
    else:
        raise AssertionError("all processes fail alike")
    with world.in_turn():
        print("turn", r, flush=True)
"""


@pytest.mark.slow
def test_exchanges_of_two_processes_under_torchrun(tmp_path: Path) -> None:
    """Started by torchrun itself; the training of the other tests is started as torchrun would."""
    script = tmp_path / "exchanges.py"
    script.write_text(EXCHANGES, encoding="utf-8")
    done = torchrun(tmp_path, str(script))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"turn \d", done.stdout) == ["turn 0", "turn 1"]


@pytest.mark.slow
def test_the_command_of_the_readme_under_torchrun(tmp_path: Path) -> None:
    given: dict[str, Any] = settings("clip", squares(tmp_path / "squares.tar"), steps=2, accumulate=2)
    config = write_config(tmp_path / "clip.yaml", given)
    done = torchrun(tmp_path, "-m", "vlm", "train", str(config), "losses.0.over=step", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "step-0000002" / "state.json").is_file()


def torchrun(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
