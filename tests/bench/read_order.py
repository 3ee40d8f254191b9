"""What the order of reading costs on a disk whose pages are not in memory: MB/s by the clock, undecoded samples.

    python -m tests.bench.read_order [FOLDER]

Shards of together about 200 MB are written into a temporary folder (in FOLDER, to choose the disk). Before each pass
the page cache gives them up (posix_fadvise); a file system that ignores this is told by the share of pages left.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import webdataset as wds

from vlm.data.plan import Order
from vlm.data.shards import Shards

SHARDS, PER_SHARD, SIZE, ROUNDS = 20, 400, 25_000, 7
TOTAL = SHARDS * PER_SHARD


def write(folder: Path) -> list[Path]:
    """Shards of members that no disk can compress, as large as small photographs."""
    random, files = np.random.default_rng(0), []
    for number in range(SHARDS):
        files.append(folder / f"{number:04d}.tar")
        with wds.TarWriter(str(files[-1])) as tar:
            for i in range(PER_SHARD):
                tar.write({"__key__": f"{number:04d}{i:04d}", "jpg": random.bytes(SIZE), "txt": f"number {i}"})
    return files


def forget(files: Iterable[Path]) -> None:
    """The page cache gives the files up."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def by_index(shards: Shards, indices: Iterable[int]) -> int:
    """Samples by number; returns the bytes of their pictures."""
    return sum(len(shards.raw(index).image) for index in indices)


def candidates(files: list[Path]) -> dict[str, Callable[[], int]]:
    """Whole epochs in each order."""
    names = [str(file) for file in files]
    shards = Shards(names)

    def ours(window: int) -> Callable[[], int]:
        def epoch() -> int:
            order = Order(shards.starts, len(shards), 0, window)
            return by_index(shards, map(order, range(TOTAL)))

        return epoch

    return {
        "webdataset, in sequence": lambda: sum(len(s["jpg"]) for s in wds.WebDataset(names, shardshuffle=False)),
        "ours, in sequence": lambda: by_index(shards, range(TOTAL)),
        "ours, windows of 1 shard": ours(PER_SHARD),
        "ours, windows of 5 shards": ours(5 * PER_SHARD),
        "ours, one window: random": ours(TOTAL),
    }


def main() -> None:
    """Passes in alternation, so that what else the machine does falls on all of them."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        files = write(Path(folder))
        runs = candidates(files)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                forget(files)
                start = time.perf_counter()
                size = run()
                rates[name].append(size / 1e6 / (time.perf_counter() - start))
                assert size == TOTAL * SIZE
    print(f"{TOTAL} samples of {SIZE / 1e3:.0f} kB in {SHARDS} shards, {ROUNDS} passes each")
    for name, each in rates.items():
        print(f"  {name:28s} median {statistics.median(each):6.0f} MB/s  ({min(each):.0f} to {max(each):.0f})")


if __name__ == "__main__":
    main()
