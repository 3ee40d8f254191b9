"""Pretraining on text: a run from documents to a checkpoint, resumed to the identical curve, and what its speed is."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny import records
from vlm import build, checkpoint
from vlm.checkpoint import CONFIG
from vlm.config.load import ConfigError, load
from vlm.config.schema import Run
from vlm.data.text import train_bpe
from vlm.model.vlm import need
from vlm.nn.tokens import Tokens
from vlm.restore import initialise, restore
from vlm.train.run import train_run
from vlm.train.speed import flops_per_token, peak_flops

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "one",
    "dog",
    "ran",
    "after",
    "red",
    "balls",
    "over",
    "green",
    "hills",
]


def config(folder: Path, *overrides: str, **train: Any) -> Run:
    for name, count in (("train", 60), ("val", 6)):
        rows = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for i in range(1, 40))} for k in range(1, count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {
        "model": {"language": {"kind": "transformer", "dim": 16, "layers": 2, "heads": 2}},
        "tokenizer": {"kind": "bpe", "vocab": 300},
        "data": {"kind": "text", "train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl"), "length": 16},
        "losses": [{"kind": "lm"}],
        "train": {"steps": 6, "batch_size": 4, "accumulate": 2, "log_every": 1, "precision": "float32", "eval_every": 2}
        | {"keep_best": True, "save_every": 3, "params": [{"match": ".*", "lr": 1e-2}]}
        | train,
    }
    path = folder / "lm.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return load(Run, path, overrides)


CHOICES = {
    "transformer": (),
    "retention": ("model.language.mixer.kind=retention",),
    "moe": ("model.language.ffn.kind=moe", "model.language.ffn.bias_rate=0.01"),
}


def plain(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in record.items() if "mfu" not in k} for record in records(folder)]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_resumed_run_has_the_identical_curve(tmp_path: Path, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path, *CHOICES[choice])
    train_run(run, tmp_path / "whole")
    real, saves = checkpoint.save, []

    def dies(*given: Any) -> Path:
        made = real(*given)
        saves.append(made)
        if made.name == "step-0000003":
            raise RuntimeError("killed")
        return made

    monkeypatch.setattr(checkpoint, "save", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train_run(run, tmp_path / "torn")
    monkeypatch.setattr(checkpoint, "save", real)
    train_run(load(Run, tmp_path / "torn" / CONFIG), tmp_path / "torn", resume=True)
    assert plain(tmp_path / "torn") == plain(tmp_path / "whole")
    ours, theirs = (restore(tmp_path / name).model.state_dict() for name in ("torn", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_learns_and_uses_the_best(tmp_path: Path) -> None:
    train_run(config(tmp_path, steps=30), tmp_path / "run")
    losses = {r["step"]: r["val/loss_lm"] for r in records(tmp_path / "run") if "val/loss_lm" in r}
    assert min(losses.values()) < 0.8 * math.log(300)
    assert restore(tmp_path / "run").step == min(losses, key=lambda step: losses[step])


def test_a_pretrained_language_model_is_taken_up(tmp_path: Path) -> None:
    train_run(config(tmp_path), tmp_path / "run")
    again = config(tmp_path, f"model.init.language={tmp_path / 'run'}", steps=1, eval_every=1)
    train_run(again, tmp_path / "more")
    after = next(r["val/loss_lm"] for r in records(tmp_path / "more") if "val/loss_lm" in r)
    assert after < next(r["train/loss_lm"] for r in records(tmp_path / "run") if "train/loss_lm" in r)


def test_a_dense_model_is_upcycled_to_experts(tmp_path: Path) -> None:
    """Whole copies under weights that sum to 1 are the dense model itself, before anything is learned."""
    dense = config(tmp_path)
    train_run(dense, tmp_path / "dense")
    names = [f"model.init.language={tmp_path / 'dense'}", "model.language.ffn.kind=moe"]
    before = restore(tmp_path / "dense")
    run = config(tmp_path, *names, "model.language.ffn.hidden=64")
    model = build.model(run, before.tokenizer)
    assert initialise(model, run, tmp_path)[0].endswith("2 dense networks upcycled to experts")
    ids = torch.randint(0, 300, (2, 9))
    logits = [
        m.logits(m(Tokens.of(m.embed(ids))).hidden)
        for m in (need(part, "language model") for part in (before.model.language, model.language))
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"ffn\.hidden: 24 does not divide 64, which is to be upcycled"):
        odd = config(tmp_path, *names, "model.language.ffn.hidden=24")
        initialise(build.model(odd, before.tokenizer), odd, tmp_path)


def test_settings_that_text_has_no_use_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, "model.connector.kind=mean", "losses=[{kind: itc}]", "data.val=null")
    for words in (
        "model.connector: data.kind=text has no pictures",
        "losses: itc needs pictures",
        "train.keep_best: the best is told by data.val",
    ):
        assert words in str(caught.value)


def test_flops_by_hand(tmp_path: Path) -> None:
    """6 for each weight a token meets; attention 12 x width x length a layer (PaLM, appendix B)."""
    tokenizer = train_bpe(WORDS, 300)

    def cost(*overrides: str) -> float:
        run = config(tmp_path, *overrides)
        return flops_per_token(need(build.model(run, tokenizer).language, "language model"), 16)

    shared, head = 3 * 16 * 64, tokenizer.size * 16
    assert cost() == 6 * (2 * (4 * 16 * 16 + shared) + head) + 2 * 12 * 16 * 16
    moe = 8 * 16 + 2 * 3 * 16 * 32  # the router, and two of eight experts half as wide
    assert cost("model.language.ffn.kind=moe") == 6 * (2 * (4 * 16 * 16 + moe) + head) + 2 * 12 * 16 * 16
    mixing = 6 * 2 * (16 * (8 + 16) + 2 * 8 * 16)
    assert cost("model.language.mixer.kind=retention") == 6 * (2 * (8 * 16 * 16 + shared) + head) + 2 * mixing


def test_peak_is_a_speed() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32, size=128) < 1e15
