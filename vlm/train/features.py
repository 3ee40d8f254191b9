"""`vlm shards features`: what a config's frozen image encoder makes of its pictures, once, as shards to train from."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from vlm import build, build_data
from vlm.config import schema
from vlm.config.load import load
from vlm.data.features import SUFFIX, FeatureDtype, FeatureInfo, FeatureShards
from vlm.data.image import BadSample, ImageTransform
from vlm.data.loader import in_order
from vlm.data.mixture import Mixture
from vlm.data.pictures import Pictures
from vlm.data.shards import check_bad
from vlm.data.tars import Names, Tars, check_out, drafted, write_index
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.backend import autocast, best_device, fast_float32
from vlm.restore import initialise
from vlm.train.log import note
from vlm.world import started

SAMPLES, MAX_BYTES = 10_000, 2**30  # of a shard
BATCH = 32


def features(
    config: Path,
    overrides: Sequence[str],
    out: Path,
    dtype: FeatureDtype = "float16",
    workers: int = 0,
    overwrite: bool = False,
) -> None:
    """Writes OUT/train and, where the config has data.val, OUT/val, and prints their counts as JSON.

    Errors: mistakes in the settings, an encoder that learns or is random, too little room on the disk.
    """
    if started() > 1:
        raise ValueError("shards features: one process does it; leave torchrun away")
    run = load(schema.Run, config, overrides)
    data, vision = run.pairs, run.model.vision
    assert vision is not None
    _refuse(run)
    specs: dict[str, build_data.Spec] = {"train": data.train} | ({} if data.val is None else {"val": data.val})
    for name in specs:
        check_out(out / name, overwrite)
    sources = {name: build_data.shards(data, spec) for name, spec in specs.items()}
    if finished := [name for name, source in sources.items() if isinstance(source, FeatureShards)]:
        raise ValueError(f"data.{finished[0]}: holds features already; name the pictures")
    if isinstance(sources["train"], Mixture):
        raise ValueError("data.train: a mixture, whose weights features would lose; name one source, data.train=SOURCE")
    model = VisionLanguageModel(build.image_encoder(vision))
    source = run.model.init.get("vision")
    only = {} if source is None else {"vision": source}
    alone = run.model_copy(update={"model": run.model.model_copy(update={"init": only, "lora": []})})
    for line in initialise(model, alone, out):
        note(line)
    maker = _Maker(model.to(best_device()).eval(), run, dtype)
    _room(maker.info, {name: len(source) for name, source in sources.items()}, out)
    found = {name: _write(maker, source, out / name, workers, overwrite) for name, source in sources.items()}
    print(json.dumps(found, indent=1))


def _refuse(run: schema.Run) -> None:
    vision = run.model.vision
    assert vision is not None
    problems = []
    if not vision.frozen:
        problems.append("model.vision.frozen=false: what an encoder gives can be kept only while it stays as it is")
    if any(spec.match.startswith("vision") for spec in run.model.lora):  # no other pattern reaches a frozen encoder
        problems.append("model.lora: adapts the encoder: what it gives can be kept only while it stays as it is")
    if vision.source is None and not run.model.init.get("vision"):
        problems.append("model.vision: names no weights, nor does model.init.vision: it would be another next time")
    if run.pairs.augment is not None:
        problems.append("data.augment: every epoch changes the pictures, and features are of one state; set it to null")
    if problems:
        raise ValueError("\n".join(problems))


def _room(info: FeatureInfo, counts: dict[str, int], out: Path) -> None:
    """Tells what the features take; refuses a disk that has no room for them."""
    total = sum(counts.values())
    there = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    note(
        f"{info.tokens} x {info.dim} of {info.dtype}: {info.size / 2**10:.1f} KiB a picture, "
        f"{total * info.size / 2**20:.1f} MiB for {total} pictures; {free / 2**20:.0f} MiB are free"
    )
    if total * info.size > free:
        raise ValueError(f"{out}: too little room; another folder, a smaller dtype, or model.vision.class_token=drop")


class _Read(NamedTuple):
    """A picture and what goes beside its features, or why there is none."""

    key: str
    pixels: UInt8[Tensor, "3 H W"] | None
    beside: bytes
    reason: str = ""


class _Pixels(Dataset[_Read]):
    """Number to picture, for `DataLoader`."""

    def __init__(self, source: Pictures, transform: ImageTransform) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, index: int) -> _Read:
        try:
            raw = self.source.raw(index)
            beside = {"key": raw.key, "picture": raw.id, "captions": raw.captions}
            return _Read(raw.key, self.transform.read(raw.image), json.dumps(beside, ensure_ascii=False).encode())
        except BadSample as bad:
            return _Read(self.source.key(index), None, b"", bad.reason)


class _Maker:
    """The encoder as training would run it."""

    def __init__(self, model: VisionLanguageModel, run: schema.Run, dtype: FeatureDtype) -> None:
        assert run.model.vision is not None and model.vision is not None
        self.vision, self.device = model.vision, next(model.parameters()).device
        self.info = build_data.feature_info(run.model.vision, model.vision, dtype)
        self.precision = build.precision(run, self.device)

    @torch.no_grad()
    def __call__(self, pixels: Sequence[Tensor]) -> list[bytes]:
        images = self.vision.transform.normalize(torch.stack(list(pixels))).to(self.device)
        with fast_float32(), autocast(self.device, self.precision):
            return [self.info.write(row) for row in self.vision(images)]


def _write(maker: _Maker, source: Pictures, out: Path, workers: int, overwrite: bool) -> dict[str, Any]:
    """One data set: whole, or not there at all."""
    bad = source.bad.copy()
    with drafted(out, overwrite) as draft:
        tars = Tars(draft, SAMPLES, MAX_BYTES)
        names = Names(source.key(index) for index in range(len(source)))
        for number, group in enumerate(_groups(source, maker.vision.transform, workers)):
            good = [(index, read) for index, read in group if read.pixels is not None]
            bad += Counter(read.reason for _, read in group if read.pixels is None)
            check_bad(bad, number * BATCH + len(group), source.max_bad_fraction, str(source.files[0]))
            made = maker([read.pixels for _, read in good if read.pixels is not None]) if good else []
            for (place, read), row in zip(good, made, strict=True):
                tars.add(names(place, read.key), {SUFFIX: row, "json": read.beside})
        tars.close()
        if not tars.written:
            raise ValueError(f"{source.files[0]}: no picture is usable: {dict(bad)}")
        index: dict[str, Any] = {
            "samples": sum(shard.samples for shard in tars.written),
            "bad": dict(bad),
            "shards": [asdict(shard) for shard in tars.written],
            SUFFIX: asdict(maker.info),
        }
        write_index(draft, index)
    return {"samples": index["samples"], "bad": index["bad"], "bytes": sum(shard.bytes for shard in tars.written)}


def _groups(source: Pictures, transform: ImageTransform, workers: int) -> Iterator[list[tuple[int, _Read]]]:
    """All samples in order, BATCH at a time."""
    reads = in_order(_Pixels(source, transform), len(source), workers)
    group: list[tuple[int, _Read]] = []
    console = Console(stderr=True)
    shown = track(reads, "features", len(source), console=console, disable=not console.is_terminal, transient=True)
    for index, read in enumerate(shown):
        group.append((index, read))
        if len(group) == BATCH or index == len(source) - 1:
            yield group
            group = []
