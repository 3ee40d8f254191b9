"""The small twin of every published stage takes real steps on the pictures of the package, by its config alone."""

import json
import math
from pathlib import Path

import pytest

from tests.command import Commands

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny"
TWINS = sorted(path.name for path in TINY.glob("*.yaml") if "lm_pretrain" not in path.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_it_takes_steps(vlm: Commands, name: str, tmp_path: Path) -> None:
    given = [
        "model.init={vision: null, connector: null, language: null}",
        "tokenizer={kind: bpe, vocab: 500}",
        f"data.train={ROOT / 'vlm/quickstart/data/train-0000.tar'}",
        "data.augment=null",
        "train.steps=3",
        "train.batch_size=8",
        "train.accumulate=1",
        "train.warmup=1",
        "train.log_every=1",
        "train.seed=3",
    ]
    done = vlm("train", str(TINY / name), *given, "--out", "run", folder=tmp_path)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [value for row in rows for key, value in row.items() if key.startswith("train/loss_")]
    assert len(losses) >= 3 and all(math.isfinite(value) for value in losses)
