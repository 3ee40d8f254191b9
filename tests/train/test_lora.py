"""Runs with adapters: what learns, what is stored, resumed bit for bit, restored, merged into what follows."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.command import Commands
from tests.tiny import VISION, Made, picture, read, records, settings, squares, tiny_run, write_config
from tests.train.test_parallel import equal
from tests.train.test_resume import Killed, at_step, kill
from vlm import build, checkpoint
from vlm.config.schema import Run
from vlm.model.adapter_file import load_adapter, save_adapter
from vlm.model.lora import merge_lora
from vlm.model.weights.files import fingerprint
from vlm.nn.adapter import adapters, is_adapter, plain
from vlm.restore import initialise, restore
from vlm.train.features import features
from vlm.train.optim import Rule, assign, make_optimizer, table
from vlm.train.run import train_run

LANGUAGE = r"{match: 'language\..*\.(query|value)', rank: 2, dropout: 0.2}"
ENCODER = r"{match: 'vision\..*\.fc1', rank: 2}"


def source(folder: Path) -> Path:
    """The folder of a run whose language model others adapt, and a file of the encoder's weights."""
    torch.manual_seed(0)
    encoder = timm.create_model(str(VISION["name"]), num_classes=0, **VISION["args"])  # type: ignore[arg-type]
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    train_run(tiny_run(folder, "decoder", "train.steps=2"), folder / "source")
    return folder / "source"


def adapted(folder: Path, *overrides: str, lora: str = f"[{LANGUAGE}, {ENCODER}]") -> Run:
    """Adapters in a frozen encoder and in a language model from another run."""
    start = folder / "source" if (folder / "source").exists() else source(folder)
    return tiny_run(
        folder,
        "decoder",
        f"model.lora={lora}",
        f"model.init.language={start}",
        f"model.vision.weights={folder / 'encoder.safetensors'}",
        "model.vision.frozen=true",
        "train.params.0.lr=0.01",
        *overrides,
    )


def hashes(model: nn.Module) -> str:
    """Of what stands still in the adapted parts."""
    state = {plain(name): value for name, value in model.state_dict().items() if not is_adapter(name)}
    return fingerprint(state, [name for name in state if not name.startswith("connector")])


def made(folder: Path, run: Run) -> tuple[Made, dict[str, Rule]]:
    job = Made(run)
    initialise(job.model, run, folder)
    decided = assign(job.model, [Rule(g.match, g.lr, 0.05, g.muon) for g in run.train.params], ["vision"])
    job.optimizer = make_optimizer(job.model, decided, (0.9, 0.98))
    return job, decided


def test_adapters_and_the_connector_learn_and_nothing_else(tmp_path: Path) -> None:
    job, decided = made(tmp_path, adapted(tmp_path))
    assert {name.partition(".")[0] for name in decided} == {"vision", "connector", "language"}
    assert all(is_adapter(name) for name in decided if not name.startswith("connector"))
    lines = [(line.part, line.match, line.tensors) for line in table(job.model, decided)]
    assert ("vision", ".*", 2) in lines and ("language", ".*", 4) in lines and ("language", "–", 11) in lines
    still, before = hashes(job.model), {name: value.clone() for name, value in job.model.state_dict().items()}
    batch = job.batch("a red square", "a green square")
    job.task.train()
    losses = [job.step([batch])[0]["lm"] for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    assert hashes(job.model) == still
    moved = {name for name, value in job.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(decided)


def test_the_file_holds_adapters_and_no_base(tmp_path: Path) -> None:
    run = adapted(tmp_path, "train.ema=0.9")
    train_run(run, tmp_path / "run")
    folder = checkpoint.latest(tmp_path / "run")
    for file in ("model", "average"):
        held = load_file(folder / f"{file}.safetensors")
        assert {name.partition(".")[0] for name in held} == {"vision", "connector", "language"}
        assert all(is_adapter(name) for name in held if not name.startswith("connector"))
    small = sum(v.numel() for n, v in load_file(folder / "model.safetensors").items() if is_adapter(n))
    assert small < 0.05 * sum(
        v.numel() for v in load_file(checkpoint.latest(tmp_path / "source") / "model.safetensors").values()
    )
    trained = restore(tmp_path / "run")
    assert len(adapters(trained.model)) == 3
    assert any(float(own.up.weight.abs().max()) > 1e-3 for own in adapters(trained.model).values())
    expected = said(trained.model, trained)
    save_adapter(trained.model, tmp_path / "adapter")
    merge_lora(trained.model)
    torch.testing.assert_close(said(trained.model, trained), expected, atol=1e-5, rtol=1e-5)
    fresh = build.model(run, trained.tokenizer)
    initialise(fresh, run.model_copy(update={"model": run.model.model_copy(update={"lora": []})}), tmp_path)
    fresh.connector.load_state_dict(trained.model.connector.state_dict())
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(said(fresh.eval(), trained), expected, atol=1e-6, rtol=1e-6)


def said(model: Any, trained: Any) -> Tensor:
    from vlm.data.batch import Text

    ids = torch.full((1, 9), 3)
    ids[0, :5] = -1
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool), ids)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.logits(model.write(model.see(pixels), text).hidden)


def test_a_base_without_a_source_is_stored_with_its_adapters(tmp_path: Path) -> None:
    train_run(tiny_run(tmp_path, "decoder", f"model.lora=[{LANGUAGE}]"), tmp_path / "run")
    held = load_file(checkpoint.latest(tmp_path / "run") / "model.safetensors")
    assert "language.stack.blocks.0.mixer.query.base_layer.weight" in held and "language.embedding.weight" in held
    assert len(adapters(restore(tmp_path / "run").model)) == 2


def test_another_base_is_noticed(tmp_path: Path) -> None:
    train_run(adapted(tmp_path), tmp_path / "run")
    train_run(tiny_run(tmp_path, "decoder", "train.steps=2", "train.seed=1"), tmp_path / "source", overwrite=True)
    with pytest.raises(ValueError, match="trained on other frozen weights"):
        restore(tmp_path / "run")


def test_what_follows_starts_from_the_merged_weights(tmp_path: Path) -> None:
    train_run(adapted(tmp_path), tmp_path / "run")
    following = adapted(tmp_path, f"model.init.language={tmp_path / 'run'}", lora="[]")
    train_run(following, tmp_path / "next")
    before = restore(tmp_path / "run").model
    model = build.model(following, restore(tmp_path / "run").tokenizer)
    initialise(model, following, tmp_path)
    names = merge_lora(before)
    assert all(torch.equal(before.get_parameter(f"{n}.weight"), model.get_parameter(f"{n}.weight")) for n in names[1:])
    assert restore(tmp_path / "next").step == 4


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("train.activation_checkpointing=true",)])
def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    """Dropout in the adapters, an average, accumulation; killed between two saves."""
    run = adapted(tmp_path, "train.steps=9", "train.save_every=3", "train.ema=0.9", "train.accumulate=2", *more)
    train_run(run, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        train_run(run, tmp_path / "parts")
    torch.rand(5)
    train_run(run, tmp_path / "parts", resume=True)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for name in ("model", "average", "optimizer"):
        file = f"step-0000009/{name}.safetensors"
        whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert whole.keys() == parts.keys()
        assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("dtype", ["null", "bfloat16"])
def test_several_processes_equal_one(vlm: Commands, tmp_path: Path, engine: str, dtype: str) -> None:
    """Also in a frozen encoder of another dtype than its adapters."""
    source(tmp_path)
    given = settings("decoder", squares(tmp_path / "squares.tar", 22), steps=3, accumulate=4, save_every=3, ema=0.9)
    config = write_config(tmp_path / "lora.yaml", given)
    overrides = [
        f"model.lora=[{LANGUAGE}, {ENCODER}]",
        f"model.init.language={tmp_path / 'source'}",
        f"model.vision.weights={tmp_path / 'encoder.safetensors'}",
        "model.vision.frozen=true",
        f"model.vision.dtype={dtype}",
    ]
    assert vlm("train", config, *overrides, "--out", "one", folder=tmp_path).code == 0
    for done in vlm.together(
        2, "train", config, *overrides, f"train.parallel={engine}", "--out", "two", folder=tmp_path
    ):
        assert done.code == 0, done.err
    equal(tmp_path / "two", tmp_path / "one", 3, 1e-5 if dtype == "bfloat16" else 2e-6)


@pytest.mark.slow
def test_on_the_command_line(vlm: Commands, tmp_path: Path) -> None:
    """The table of what learns, a caption, compiled blocks, and all mistakes of patterns at once."""
    run = adapted(tmp_path)
    overrides = [f"model.lora=[{LANGUAGE}, {ENCODER}]", "train.params.0.lr=0.01", "model.vision.frozen=true"]
    config = tmp_path / "decoder.yaml"
    assert run.model.lora[0].rank == 2
    done = vlm("train", config, *overrides, "--out", "run", folder=tmp_path)
    assert done.code == 0, done.err
    assert "adapter of rank 2: language.stack.blocks.N.mixer.query (1)" in done.err.splitlines()
    assert "language   –        frozen  11" in done.err
    (tmp_path / "red.png").write_bytes(picture("red"))
    captioned = vlm("caption", "red.png", "--model", "run", "--json", folder=tmp_path)
    assert captioned.code == 0 and "caption" in json.loads(captioned.out)
    wrong = vlm(
        "train",
        config,
        "model.lora=[{match: 'langage.*'}, {match: '.*fc1'}]",
        "model.vision.frozen=true",
        "--out",
        "wrong",
        folder=tmp_path,
    )
    assert wrong.code == 2 and len(wrong.err.splitlines()) == 2 and not (tmp_path / "wrong").exists()
    assert wrong.err.startswith("vlm: model.lora.0: 'langage.*' matches nothing; linear layers are: ")
    typed = vlm("train", config, "model.lora=[{match: x, rnk: 3, alpha: 0}]", folder=tmp_path)
    assert typed.code == 2 and "model.lora.0.rnk: no such setting (did you mean 'rank'?)" in typed.err
    assert "model.lora.0.alpha" in typed.err


def test_features_of_an_adapted_encoder_are_not_kept(tmp_path: Path) -> None:
    run = adapted(tmp_path)
    config = tmp_path / "decoder.yaml"
    start = ["model.vision.frozen=true", f"model.vision.weights={tmp_path / 'encoder.safetensors'}"]
    with pytest.raises(ValueError, match=r"model\.lora: adapts the encoder: what it gives can be kept only while"):
        features(config, [*start, f"model.lora=[{LANGUAGE}, {ENCODER}]"], tmp_path / "kept")
    features(config, [*start, f"model.lora=[{LANGUAGE}]"], tmp_path / "kept")
    kept = f"data.train={tmp_path / 'kept' / 'train'}"
    with pytest.raises(ValueError, match=r"model\.lora: an encoder with adapters cannot learn from"):
        train_run(adapted(tmp_path, kept), tmp_path / "run")
    train_run(adapted(tmp_path, kept, lora=f"[{LANGUAGE}]"), tmp_path / "run")
    assert len(run.model.lora) == 2 and read(tmp_path / "run" / "config.yaml").model.lora[0].dropout == 0.2
