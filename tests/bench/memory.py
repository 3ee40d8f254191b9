"""Resident memory of a training run, epoch by epoch: its slope once it has warmed up.

    python -m tests.bench.memory [--workers 0 2] [--epochs 8] [--samples 2048]

A small CLIP on JPEGs of the bench `dataload`, each cut at random. The main process and its workers are added up by
proportional set size, so that what they share counts once; mapped files such as libraries are left out (Linux).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import webdataset as wds

from tests.bench.dataload import photographs
from tests.tiny import read, settings, write_config
from vlm.train import loop
from vlm.train.run import train_run

BATCH, WARM_UP = 32, 2  # epochs that are not part of the slope


def shards(folder: Path, samples: int) -> Path:
    """Four shards of so many samples, no two captions alike."""
    files = photographs(32)
    for number in range(4):
        with wds.TarWriter(str(folder / f"{number}.tar")) as tar:
            for i in range(number * samples // 4, (number + 1) * samples // 4):
                tar.write({"__key__": f"{i:08d}", "jpg": files[i % 32], "txt": f"photo {i} of {i * i}"})
    return folder


def memory() -> float:
    """MiB of this process and its children."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    return sum(_proportional(name) for name in [str(me), *children])


def _proportional(process: str) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024


def measure(folder: Path, workers: int, epochs: int, samples: int) -> list[float]:
    """MiB at the end of each epoch of one run."""
    steps = samples // BATCH
    given = settings("clip", folder, steps=epochs * steps, batch_size=BATCH, log_every=steps)
    given["data"] |= {"workers": workers, "augment": {"scale": [0.9, 1.0], "ratio": 0.3}}
    found: list[float] = []
    inner = loop.one_step
    done = 0

    def watched(*args: object, **options: object) -> object:
        nonlocal done
        result = inner(*args, **options)  # type: ignore[arg-type]
        done += 1
        if done % steps == 0:
            found.append(memory())
        return result

    loop.one_step = watched  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as out:
            train_run(read(write_config(Path(out) / "run.yaml", given)), Path(out) / "run")
    finally:
        loop.one_step = inner
    return found


def report(folder: Path, workers: int, epochs: int, samples: int) -> dict[str, object]:
    """The epochs' memory and the slope of a line through those after the warm-up."""
    found = measure(folder, workers, epochs, samples)
    kept = found[WARM_UP:]
    slope = float(np.polyfit(np.arange(len(kept)), kept, 1)[0])
    return {
        "workers": workers,
        "samples": samples,
        "MiB": [round(value, 1) for value in found],
        "slope, MiB an epoch": round(slope, 3),
        "slope, KiB a 1000 samples": round(slope * 1024 * 1000 / samples, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2048)
    given = parser.parse_args()
    if given.epochs < WARM_UP + 3:
        parser.error(f"--epochs {given.epochs}: a slope needs at least {WARM_UP + 3}, of which {WARM_UP} are warm-up")
    with tempfile.TemporaryDirectory() as name:
        folder = shards(Path(name), given.samples)
        for workers in given.workers:
            print(json.dumps(report(folder, workers, given.epochs, given.samples)))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
