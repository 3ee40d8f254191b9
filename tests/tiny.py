"""Coloured squares as shards, and the smallest runs there are: shared by the tests of training and the command line."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from vlm import build, build_data
from vlm.config.load import load
from vlm.config.schema import Run
from vlm.data.batch import Batch, collate
from vlm.data.image import decode
from vlm.data.shards import Sample
from vlm.train.experts import Health
from vlm.train.loop import one_step
from vlm.train.optim import assign, make_optimizer
from vlm.train.parallel import Passes
from vlm.train.run import frozen_parts, objective, rules, train_run
from vlm.train.task import Task

COLOURS = ("red", "green", "blue", "yellow", "black", "orange", "purple", "cyan")
VISION = {
    "kind": "timm",
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "frozen": False,
    "args": {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
}
QFORMER = {"kind": "qformer", "queries": 2, "dim": 16, "layers": 2, "heads": 2, "hidden": 32, "dropout": 0.0}
TEXT = {"dim": 24, "layers": 1, "heads": 2, "hidden": 32}
LANGUAGE = {"kind": "transformer", "dim": 24, "layers": 1, "heads": 2}
ITC, ITM, LM = {"kind": "itc"}, {"kind": "itm"}, {"kind": "lm"}
MODELS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "clip": ({"connector": {"kind": "mean"}, "text": TEXT}, [ITC]),
    "qformer": ({"connector": QFORMER}, [ITC, ITM, LM]),
    "decoder": ({"connector": {"kind": "mlp"}, "language": LANGUAGE}, [LM]),
}


def picture(colour: str, size: int = 32, shift: int = 0) -> bytes:
    """A coloured square on white, as PNG."""
    image = Image.new("RGB", (size, size), "white")
    image.paste(colour, (4 + shift, 4, size - 6, size - 6))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pack(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar of members in order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(count: int = 16, prefix: str = "") -> list[tuple[str, bytes]]:
    """Pictures and captions of `count` samples: the colours in turn, each time a little moved."""
    found = []
    for i in range(count):
        colour = COLOURS[i % len(COLOURS)]
        found.append((f"{prefix}{i:04d}.png", picture(colour, shift=i // len(COLOURS))))
        found.append((f"{prefix}{i:04d}.txt", f"a {colour} square".encode()))
    return found


def squares(path: Path, count: int = 16, prefix: str = "") -> Path:
    """A shard of coloured squares."""
    return pack(path, members(count, prefix))


def settings(kind: str, shards: Path, **train: Any) -> dict[str, Any]:
    """A config of one of MODELS, as YAML would hold it; `train` changes its training."""
    model, losses = MODELS[kind]
    return {
        "model": {"vision": VISION, "embed_dim": 16, **model},
        "tokenizer": {"kind": "bpe", "vocab": 280},
        "data": {"train": str(shards), "max_tokens": 12},
        "losses": losses,
        "train": {
            "steps": 4,
            "batch_size": 4,
            "log_every": 1,
            "precision": "float32",
            "params": [{"match": ".*", "lr": 1e-3}],
        }
        | train,
    }


def write_config(path: Path, given: dict[str, Any]) -> Path:
    """The settings as a YAML file."""
    path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return path


def read(path: Path, *overrides: str) -> Run:
    """The settings of a file with overrides."""
    return load(Run, path, overrides)


def tiny_run(folder: Path, kind: str, *overrides: str, **train: Any) -> Run:
    """Settings of a tiny run on 16 squares written into `folder`."""
    shards = folder / "squares.tar"
    if not shards.exists():
        squares(shards)
    return read(write_config(folder / f"{kind}.yaml", settings(kind, shards, **train)), *overrides)


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("second", "data_share", "memory", "mfu")
    return [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in lines]


class Made:
    """What a run is made of, short of training it."""

    def __init__(self, run: Run) -> None:
        self.shards = build_data.shards(run.data, run.data.train)
        self.tokenizer = build_data.tokenizer(run.tokenizer, self.shards.captions())
        self.model = build.model(run, self.tokenizer)
        decided = assign(self.model, rules(run), frozen_parts(run))
        self.optimizer = make_optimizer(self.model, decided, run.train.betas)
        self.task = Task(self.model, [objective(loss, self.tokenizer, run.train.accumulate) for loss in run.losses])
        self.loader = build_data.training_loader(
            run,
            self.shards,
            self.model.vision.transform,
            self.tokenizer,
            self.model.image_tokens,
            self.model.reply_start,
        )
        self.run = run
        self.passes = Passes(self.task, torch.float32)

    def step(
        self, group: Sequence[Batch], clip: float | None = 1.0, health: Health | None = None
    ) -> tuple[dict[str, float], float]:
        """One step over micro-batches; each draws as in training, by its place."""
        return one_step(self.passes, group, range(len(group)), self.optimizer, clip, health)

    def batch(self, *captions: str) -> Batch:
        """One sample for each caption; the first picture is that of sample 0, and so on."""
        samples = []
        for i, caption in enumerate(captions):
            pixels = self.model.vision.transform.pixels(decode(self.shards.raw(i).image))
            samples.append(Sample(str(i), str(i), pixels, [caption]))
        template = build_data.caption_template(self.run)
        made = collate(samples, self.tokenizer, self.run.data.max_tokens, template, self.model.image_tokens)
        return replace(made, images=self.model.vision.transform.normalize(made.images))


def rate(value: float) -> str:
    """One learning rate for all."""
    return f"train.params=[{{match: '.*', lr: {value}}}]"


def learned(folder: Path, *kinds: str) -> None:
    """Runs FOLDER/KIND that have learned eight colours; "clip" first, from whose encoder the others start."""
    common = ("train.batch_size=16", "train.log_every=60", "train.warmup=10", "data.cache_mb=8")
    frozen = ("model.vision.frozen=true", f"model.init.vision={folder / 'clip'}", rate(2e-2))
    given = {
        "clip": ("train.steps=60", rate(5e-3)),
        "qformer": (*frozen, "train.steps=120", "model.connector.queries=4"),
        "decoder": (*frozen, "train.steps=60"),
    }
    for kind in kinds:
        train_run(tiny_run(folder, kind, *common, *given[kind]), folder / kind)
