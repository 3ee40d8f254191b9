"""Runs on parts of published checkpoints: they train, are saved by name and hash alone, restored, resumed, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests import folders, folders_own
from tests.tiny import ITC, ITM, LM, read, records, squares
from vlm import checkpoint
from vlm.captioning.run import caption
from vlm.captioning.wishes import Words, Work
from vlm.config.schema import Run
from vlm.restore import restore
from vlm.train.run import train_run

QFORMER = {
    "kind": "qformer",
    "queries": folders.QUERIES,
    "dim": 32,
    "layers": 4,
    "heads": 4,
    "hidden": 56,
    "dropout": 0.0,
}
OWN = {"kind": "transformer", "dim": 24, "layers": 1, "heads": 2}
LEARNS = [{"match": "connector.*", "lr": 1e-2}, {"match": ".*", "lr": None}]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """BLIP-2, a Llama, a BERT."""
    root = tmp_path_factory.mktemp("published")
    folders.blip2(root / "blip2", "opt")
    folders_own.language(root / "llama", "llama")
    folders_own.bert(root / "bert")
    return {name: root / name for name in ("blip2", "llama", "bert")}


def run_of(folder: Path, model: dict[str, Any], tokenizer: object, *overrides: str, losses: Any = (LM,)) -> Run:
    """A run on coloured squares."""
    shards = folder / "squares.tar"
    if not shards.exists():
        squares(shards)
    train = {"steps": 4, "batch_size": 4, "log_every": 1, "precision": "float32", "params": LEARNS}
    settings = {
        "model": {"embed_dim": 16, **model},
        "tokenizer": tokenizer,
        "data": {"train": str(shards), "max_tokens": 24},
        "losses": list(losses),
        "train": train,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return read(path, *overrides)


def of(folder: Path, **more: object) -> dict[str, Any]:
    return {"kind": "published", "name": str(folder), **more}


def llava(published: dict[str, Path], **language: object) -> dict[str, Any]:
    """BLIP-2's tower, an MLP that learns, a frozen Llama."""
    return {
        "vision": of(published["blip2"]),
        "connector": {"kind": "mlp"},
        "language": of(published["llama"], **language),
    }


def losses_of(out: Path) -> list[float]:
    return [record["train/loss_lm"] for record in records(out) if "train/loss_lm" in record]


def stored(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(checkpoint.whole(out, checkpoint.BEST) / "model.safetensors")
    return found


def test_frozen_parts_are_named_and_not_stored(
    published: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train_run(run_of(tmp_path, llava(published), of(published["llama"]), "train.steps=12"), out)
    losses = losses_of(out)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert {name.partition(".")[0] for name in stored(out)} == {"connector"}
    trained = restore(out)
    original = folders_own.load_language(published["llama"])
    assert trained.model.language is not None
    found = trained.model.language.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in original.state_dict().items())
    picture = tmp_path / "a.png"
    folders.photographs(1)[0].save(picture)
    capsys.readouterr()
    caption(str(out), [str(picture)], Words(max_new=4), Work(format="jsonl"))
    assert json.loads(capsys.readouterr().out)["image"] == str(picture)


def test_a_folder_that_was_named_from_elsewhere_is_found(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published["llama"].parent)
    here = {name: Path(path.name) for name, path in published.items()}
    train_run(run_of(tmp_path, llava(here), of(here["llama"]), "train.steps=2"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    trained = restore(tmp_path / "run")
    assert trained.run.model.language is not None
    assert trained.run.model.language.source == str(published["llama"])


def test_a_source_that_changed_is_refused(published: dict[str, Path], tmp_path: Path) -> None:
    here = {**published, "llama": tmp_path / "llama"}
    shutil.copytree(published["llama"], here["llama"])
    out = tmp_path / "run"
    train_run(run_of(tmp_path, llava(here), of(here["llama"]), "train.steps=2"), out)
    restore(out)
    shard = sorted(here["llama"].glob("*.safetensors"))[0]
    weights = load_file(shard)
    next(iter(weights.values()))[0] += 1
    save_file(weights, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=r"other frozen weights"):
        restore(out)


def test_resumed_is_identical(published: dict[str, Path], tmp_path: Path) -> None:
    settings = run_of(tmp_path, llava(published), of(published["llama"]), "train.steps=6", "train.save_every=3")
    train_run(settings, tmp_path / "whole")
    train_run(settings, tmp_path / "parts")
    last = max((tmp_path / "parts").glob("step-*"))
    shutil.rmtree(last)
    train_run(settings, tmp_path / "parts", resume=True)
    first, second = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


def test_a_frozen_language_model_in_bfloat16(published: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_run(run_of(tmp_path, llava(published, dtype="bfloat16"), of(published["llama"]), "train.steps=12"), out)
    language = restore(out).model.language
    assert language is not None and {p.dtype for p in language.parameters()} == {torch.bfloat16}
    assert sum(losses_of(out)[-3:]) < sum(losses_of(out)[:3])


def test_a_vocabulary_that_is_too_small_is_refused(published: dict[str, Path], tmp_path: Path) -> None:
    settings = run_of(tmp_path, {**llava(published), "language": of(published["bert"])}, of(published["blip2"]))
    with pytest.raises(ValueError, match="has no part 'language'"):
        train_run(settings, tmp_path / "run")
    small = folders_own.language(tmp_path / "small", "t5").folder
    settings = run_of(tmp_path, {**llava(published), "language": of(small)}, of(published["llama"]))
    with pytest.raises(ValueError, match=r"it knows 401 tokens, the tokenizer 601: take its own \(tok"):
        train_run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_blip2_s_qformer_before_another_language_model(
    published: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    source = str(published["blip2"])
    model = {"vision": of(published["blip2"]), "connector": QFORMER, "language": OWN, "init": {"connector": source}}
    everything = "train.params=[{match: '(connector.out|language).*', lr: 0.01}, {match: '.*', lr: null}]"
    train_run(run_of(tmp_path, model, {"kind": "bpe", "vocab": 280}, everything, "train.steps=12"), out)
    line = next(line for line in capsys.readouterr().err.splitlines() if "connector: " in line and source in line)
    assert "new here: out.bias, out.weight" in line
    assert sum(losses_of(out)[-3:]) < sum(losses_of(out)[:3])
    trained = restore(out)
    own = folders_own.open_folder(published["blip2"]).connector.state_dict()
    found = trained.model.connector.state_dict()
    kept = {name for name in own if not name.startswith("out.")}
    assert len(kept) > 40 and all(torch.equal(own[name], found[name]) for name in kept)
    assert not any(name.startswith("connector.") and ".out." not in name for name in stored(out))


def test_a_qformer_that_starts_from_bert(
    published: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    source = str(published["bert"])
    model = {"vision": of(published["blip2"]), "connector": QFORMER, "init": {"connector": source}}
    tokenizer = of(published["bert"], add=["[DEC]"])
    learns = "train.params=[{match: 'vision.*', lr: null}, {match: '.*', lr: 0.01}]"
    train_run(run_of(tmp_path, model, tokenizer, learns, losses=(ITC, ITM, LM)), out)
    line = next(line for line in capsys.readouterr().err.splitlines() if "connector: " in line and source in line)
    assert "which is BERT" in line and "new here: " in line
    assert not any(name.startswith("vision.") for name in stored(out))
    assert restore(out).step == 4


@pytest.mark.parametrize("maker", [folders.clip, folders.siglip, folders.retrieval])
def test_towers_of_all_kinds(maker: Callable[[Path], folders.Made], published: dict[str, Path], tmp_path: Path) -> None:
    made, out = maker(tmp_path / "tower"), tmp_path / "run"
    model = {**llava(published), "vision": of(made.folder)}
    train_run(run_of(tmp_path, model, of(published["llama"]), "train.steps=2"), out)
    vision = restore(out).model.vision
    assert vision is not None
    picture = folders.photographs(1)[0]
    pixels = made.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    theirs = made.model.vision_model
    with torch.no_grad():
        found = vision(vision.transform(picture)[None])
        wanted = theirs(pixels).last_hidden_state
        if maker is folders.clip:  # there the norm stands behind the class token alone, here behind all
            wanted = theirs.post_layernorm(wanted)
        if maker is folders.retrieval:  # here it belongs to the Q-Former
            found = theirs.post_layernorm(found)
    assert float((found - wanted).abs().max()) < 1e-4


def test_a_gguf_file_as_the_language_model(published: dict[str, Path], tmp_path: Path) -> None:
    from tests.parity.test_gguf import published as theirs
    from tests.parity.test_gguf import write

    path = write(tmp_path / "model.gguf", theirs(tied=True), tied=True)
    out = tmp_path / "run"
    model = {**llava(published), "language": of(path)}
    train_run(run_of(tmp_path, model, of(path), "train.steps=12"), out)
    assert sum(losses_of(out)[-3:]) < sum(losses_of(out)[:3])
    assert {name.partition(".")[0] for name in stored(out)} == {"connector"}
    assert restore(out).step == 12
