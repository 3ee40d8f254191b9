"""A tiny CLIP with the same weights everywhere: uniform noise of a seed, no training."""

from pathlib import Path
from typing import Any

import torch

from tests.tiny import settings, squares, write_config
from vlm import build, build_data
from vlm.config.load import load
from vlm.config.schema import Run
from vlm.restore import Ready


def noisy(folder: Path, kind: str = "clip", seed: int = 12, batch_size: int = 4, tokenizer: Any = None) -> Ready:
    """A model of `settings(kind)`, filled with noise; its tokenizer is CLIP's own unless given."""
    given = settings(kind, squares(folder / "noisy.tar"), batch_size=batch_size)
    given["tokenizer"] = tokenizer or {"kind": "clip"}
    run = load(Run, write_config(folder / f"noisy-{kind}.yaml", given), [])
    tokens = build_data.tokenizer(run.tokenizer, build_data.shards(run.data, run.data.train).captions())
    model = build.model(run, tokens)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, value in sorted(model.state_dict().items()):
            if value.is_floating_point() and value.ndim:
                value.copy_((torch.rand(value.shape, generator=generator) - 0.5) * 2.5)
    model.eval().requires_grad_(False)
    return Ready("noisy", model, tokens, run.data, False, batch_size, run.model.vision)
