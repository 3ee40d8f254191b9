"""Several processes equal one: losses, gradients, weights, samples, whatever the engine and the number of processes."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.command import Commands
from tests.tiny import members, pack, picture, records, settings, squares, write_config
from tests.train.test_text import config as text_config
from vlm.config.load import dump
from vlm.train.alike import SAID, TRUE
from vlm.train.run import numbers
from vlm.world import World

EXPERTS = {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "bias_rate": 0.01, "balance": 0.01}}
ENGINES = [("ddp", 2, 1), ("fsdp", 2, 1), ("fsdp", 4, 1), ("hsdp", 4, 2)]
pytestmark = pytest.mark.slow


def write(folder: Path, kind: str = "qformer", **train: Any) -> Path:
    """Four lanes, dropout, an average, a validation that does not divide by the processes."""
    given = settings(kind, squares(folder / "squares.tar", 22), steps=3, accumulate=4, save_every=1, keep=9)
    given["data"]["val"] = str(squares(folder / "val.tar", 9, "v"))
    given["train"] |= {"ema": 0.9, "eval_every": 3} | train
    if kind == "qformer":
        given["model"]["connector"] = {**given["model"]["connector"], "dropout": 0.1}
    if kind == "decoder":
        given["model"]["language"] = {**given["model"]["language"], "layers": 2, **EXPERTS}
    return write_config(folder / f"{kind}.yaml", given)


def equal(ours: Path, theirs: Path, step: int, bound: float = 2e-6) -> None:
    """Logs and weights, whoever wrote them."""
    rows = list(zip(records(ours), records(theirs), strict=True))
    assert rows
    for one, other in rows:
        assert one.keys() | {SAID, TRUE} == other.keys() | {SAID, TRUE}  # over sharded weights nothing is captioned
        for key, value in one.items():
            assert value == pytest.approx(other[key], abs=2e-5, rel=2e-5), key
        assert one.get("train/samples_crc") == other.get("train/samples_crc")
    for name in ("model", "average"):
        one, other = (load_file(run / f"step-{step:07d}" / f"{name}.safetensors") for run in (ours, theirs))
        assert one.keys() == other.keys()
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < bound


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """Those of the first step: ten times Adam's first moments after it (betas 0.9)."""
    found = load_file(run / "step-0000001" / "optimizer.safetensors")
    return {key: value * 10 for key, value in found.items() if key.endswith("/exp_avg")}


@pytest.fixture(scope="module")
def alone(vlm: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's run of `qformer`."""
    folder = tmp_path_factory.mktemp("alone")
    assert vlm("train", write(folder), "--out", "run", folder=folder).code == 0
    return folder


@pytest.mark.parametrize(("engine", "count", "machines"), ENGINES)
def test_equals_one_process(vlm: Commands, alone: Path, tmp_path: Path, engine: str, count: int, machines: int) -> None:
    """ITC, ITM and LM with dropout: the same losses, validation, average and weights; captions come of them."""
    run = tmp_path / "run"
    given = ("train", alone / "qformer.yaml", f"train.parallel={engine}", "--out", run)
    for done in vlm.together(count, *given, folder=tmp_path, machines=machines):
        assert done.code == 0, done.err
    equal(run, alone / "run", 3)
    assert (run / "step-0000003" / "optimizer").is_dir() == (engine != "ddp")
    assert {SAID, TRUE} <= records(alone / "run")[-1].keys()
    assert {SAID, TRUE} & records(run)[-1].keys() == ({SAID, TRUE} if engine == "ddp" else set())


@pytest.mark.parametrize("over", ["pass", "step"])
@pytest.mark.parametrize("count", [2, 4])
def test_gradients_of_all_losses(vlm: Commands, tmp_path: Path, over: str, count: int) -> None:
    """ITC also over all passes, with exact slopes across processes, by a second pass (2) and without one (4)."""
    itc = f"{{kind: itc, over: {over}, weight: 2, label_smoothing: 0.1}}"
    given = ("train", write(tmp_path, steps=1, clip=None), f"losses=[{itc}, {{kind: itm}}, {{kind: lm}}]")
    assert vlm(*given, "--out", "one", folder=tmp_path).code == 0
    assert all(done.code == 0 for done in vlm.together(count, *given, "--out", "many", folder=tmp_path))
    one, many = gradients(tmp_path / "one"), gradients(tmp_path / "many")
    assert one.keys() == many.keys() and any("log_scale" in key for key in one)
    assert sum(float(gradient.abs().max()) > 1e-4 for gradient in one.values()) > len(one) / 2
    for key, gradient in one.items():
        assert float((many[key] - gradient).abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max())), key
    losses = [records(tmp_path / run)[0]["train/loss_itc"] for run in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_experts_balanced_by_a_bias(vlm: Commands, tmp_path: Path, engine: str) -> None:
    config = write(tmp_path, "decoder")
    assert vlm("train", config, "--out", "one", folder=tmp_path).code == 0
    given = ("train", config, f"train.parallel={engine}", "train.activation_checkpointing=true", "--out", "two")
    for done in vlm.together(2, *given, folder=tmp_path):
        assert done.code == 0, done.err
    equal(tmp_path / "two", tmp_path / "one", 3)
    (tmp_path / "red.png").write_bytes(picture("red"))
    assert vlm("caption", "red.png", "--model", "two", folder=tmp_path).code == 0
    biases = [key for key in load_file(tmp_path / "two/step-0000003/model.safetensors") if key.endswith("router.bias")]
    assert len(biases) == 2


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_packed_text(vlm: Commands, tmp_path: Path, engine: str) -> None:
    path = tmp_path / "text.yaml"
    path.write_text(dump(text_config(tmp_path, keep_best=False, ema=0.9, save_every=6)), encoding="utf-8")
    assert vlm("train", path, "--out", "one", folder=tmp_path).code == 0
    for done in vlm.together(2, "train", path, f"train.parallel={engine}", "--out", "two", folder=tmp_path):
        assert done.code == 0, done.err
    equal(tmp_path / "two", tmp_path / "one", 6)


@pytest.mark.parametrize("counts", [(2, 1, 4), (1, 2), (4, 2, 1)])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_number_of_processes_may_change(
    vlm: Commands, alone: Path, tmp_path: Path, engine: str, counts: tuple[int, ...]
) -> None:
    """Each remaining sample once, the same losses, and shards of the optimizer's memory that are cut anew."""
    run = tmp_path / "run"
    given = ("train", alone / "qformer.yaml", f"train.parallel={engine}", "--out", run, "--resume", "auto")
    for stop, count in enumerate(counts, 1):
        for done in vlm.together(count, *given, folder=tmp_path) if count > 1 else [vlm(*given, folder=tmp_path)]:
            assert done.code == 0, done.err
        if stop < len(counts):  # as if it had been killed after step `stop`
            for step in range(stop + 1, 4):
                for file in sorted((run / f"step-{step:07d}").rglob("*"), reverse=True):
                    file.rmdir() if file.is_dir() else file.unlink()
                (run / f"step-{step:07d}").rmdir()
            (run / "latest").write_text(f"step-{stop:07d}\n")
    equal(run, alone / "run", 3)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
def test_lanes_are_dealt_out_once(lanes: int) -> None:
    device = torch.device("cpu")
    expected = list(islice(numbers(3, lanes, World(device)), 5 * lanes))
    assert expected == list(range(3 * lanes, 8 * lanes))
    for size in (size for size in (1, 2, 4, 8) if lanes % size == 0):
        dealt = [list(islice(numbers(3, lanes, World(device, rank, size)), 5 * lanes // size)) for rank in range(size)]
        assert sorted(number for own in dealt for number in own) == expected
        assert len({len(own) for own in dealt}) == 1


@pytest.mark.parametrize("sizes", [(1, 7, 2), (10,), (5, 0, 5), (0, 1, 12)])
def test_uneven_shards(vlm: Commands, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """One epoch on 4 processes: the same steps in all of them, every sample once, nobody waits for ever."""
    for i, size in enumerate(sizes):
        squares(tmp_path / f"s-{i}.tar", size, f"{i}-")
    given = settings("clip", tmp_path / "s-*.tar", steps=sum(sizes) // 4, accumulate=4, batch_size=1)
    config = write_config(tmp_path / "clip.yaml", given | {"losses": [{"kind": "itc", "over": "step"}]})
    assert vlm("train", config, "--out", "one", folder=tmp_path).code == 0
    for count in (2, 4):
        for done in vlm.together(count, "train", config, "--out", f"run{count}", folder=tmp_path):
            assert done.code == 0, done.err
        crc = [[row["train/samples_crc"] for row in records(tmp_path / run)] for run in ("one", f"run{count}")]
        assert crc[0] == crc[1] and len(crc[0]) == sum(sizes) // 4


def test_settings_that_do_not_go_with_so_many(vlm: Commands, tmp_path: Path) -> None:
    config = write(tmp_path, accumulate=3, parallel="fsdp", params=[{"match": ".*", "lr": 1e-3, "muon": 1e-2}])
    first, second = vlm.together(2, "train", config, "--out", "run", folder=tmp_path)
    assert (first.code, second.code) == (2, 2)
    assert first.err.splitlines() == [
        "train.accumulate=3: 2 processes share the forward passes of a step, so it must be a multiple of 2; a step is "
        "batch_size x accumulate samples, however many processes there are",
        "train.parallel=fsdp: Muon needs whole matrices; take ddp, or AdamW alone",
    ]
    assert second.err == "" and not (tmp_path / "run").exists()
    alone = vlm.together(2, "train", config, "--overfit", 4, folder=tmp_path)
    assert alone[0].err == "vlm: --overfit: one process does it; leave torchrun away\n"
    alone = vlm.together(2, "shards", "features", config, "kept", folder=tmp_path)
    assert alone[0].err == "vlm: shards features: one process does it; leave torchrun away\n"


def test_what_a_process_sees_alone_is_told_once_for_all(vlm: Commands, tmp_path: Path) -> None:
    """Unusable samples are met by whoever has them, and counted in the state and at the end for all."""
    bad = [(f"{i:04d}.png", b"no picture") for i in range(3)]
    config = write(tmp_path, steps=6)
    texts = [(name.replace("png", "txt"), b"a red square") for name, _ in bad]
    pack(tmp_path / "squares.tar", sorted(bad + texts) + members(19, "x"))
    one = vlm("train", config, "data.max_bad_fraction=1", "--out", "one", folder=tmp_path)
    two = vlm.together(2, "train", config, "data.max_bad_fraction=1", "--out", "two", folder=tmp_path)
    last = one.err.splitlines()[-1]
    assert last.startswith("unusable samples: ") and last == two[0].err.splitlines()[-1]
    told = [json.loads((tmp_path / run / "step-0000006/state.json").read_text())["bad"] for run in ("one", "two")]
    assert told[0] == told[1] and sum(told[0].values()) > 0
