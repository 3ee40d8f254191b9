"""JPEGs of 640 x 480 to normalised batches of 224 x 224: our loader beside open_clip's transforms and its pipeline.

    python -m tests.bench.dataload [single] [pipeline]

Exact: whole decoding and open_clip's geometry. Fast: `data.scaled_decode`, JPEGs decoded at 1/2 of their size here.
Floor: the same files decoded by PIL at 1/8 of their size, which is little more than their entropy code.
open_clip's pipeline is put together from webdataset's stages as `open_clip_train.data.get_wds_dataset` does (that
package needs an older webdataset). CPU seconds of all processes count, workers included.
"""

import gc
import io
import resource
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import webdataset as wds
from open_clip.transform import image_transform
from PIL import Image

from tests.bench.side_by_side import alternate, table
from vlm.data.augment import Augment, Cut
from vlm.data.image import ImageTransform, decode
from vlm.data.loader import Loader
from vlm.data.shards import Shards
from vlm.data.text import clip_tokenizer

SIZE, BATCH, SHARDS, PER_SHARD = (224, 224), 64, 4, 256
SCALE, RATIO = (0.9, 1.0), 1 / 3  # of the part that open_clip cuts out in training
BASE, FLOOR = "open_clip evaluation", "floor: decoding at 1/8"
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
PICTURES = Path(__file__).parents[2] / "vlm" / "quickstart" / "data" / "train-0000.tar"


def photographs(count: int) -> list[bytes]:
    """Pictures of the quickstart, enlarged and made noisy so that they weigh what photographs do (about 90 KiB)."""
    random = np.random.default_rng(0)
    with tarfile.open(PICTURES) as tar:
        small = [Image.open(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".webp")][:40]
    found = []
    for i in range(count):
        large = small[i % len(small)].convert("RGB").resize((640, 480), Image.Resampling.BICUBIC)
        noisy = np.asarray(large, dtype=np.int16) + random.normal(0, 9, (480, 640, 3)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def single() -> None:
    """One process, pictures one by one, normalised together."""
    files = photographs(64)
    theirs = image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
    train = image_transform(SIZE, is_train=True, mean=MEAN, std=STD)
    exact = ImageTransform(SIZE, MEAN, STD)
    fast = replace(exact, scaled=True)

    def by(transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
        return torch.stack([transform(Image.open(io.BytesIO(file))) for file in files])

    def own(transform: ImageTransform) -> torch.Tensor:
        return transform.normalize(torch.stack([transform.read(file) for file in files]))

    def part(transform: ImageTransform) -> torch.Tensor:
        cut, random = Cut(transform, SCALE, RATIO), np.random.default_rng(0)
        return transform.normalize(torch.stack([cut(cut.read(file), random) for file in files]))

    deviation, expected = torch.tensor(STD).view(3, 1, 1) * 255, by(theirs)
    for name, transform in (("exact", exact), ("fast", fast)):
        difference = ((own(transform) - expected) * deviation).abs()
        print(f"{name}: mean difference {float(difference.mean()):.4f} of 255 levels")
    seconds = alternate(
        {
            BASE: lambda: by(theirs),
            "open_clip training": lambda: by(train),
            "exact": lambda: own(exact),
            "fast": lambda: own(fast),
            "exact, random part": lambda: part(exact),
            "fast, random part": lambda: part(fast),
            FLOOR: lambda: [decode(file, least=lambda width, height: 60) for file in files],
        }
    )
    table(f"64 JPEGs of {sum(map(len, files)) / 2**10 / 64:.0f} KiB", seconds, BASE)
    for name in ("fast", "fast, random part"):
        ratio = statistics.median(ours / floor for ours, floor in zip(seconds[name], seconds[FLOOR], strict=True))
        print(f"  {name}: {ratio:.2f} times the floor")


def write(folder: Path) -> str:
    """Shards; returns their pattern."""
    files = photographs(64)
    for number in range(SHARDS):
        with wds.TarWriter(str(folder / f"{number:04d}.tar")) as tar:
            for i in range(PER_SHARD):
                tar.write({"__key__": f"{number:04d}{i:04d}", "jpg": files[i % 64], "txt": f"a photo, number {i}"})
    return str(folder / f"{{0000..{SHARDS - 1:04d}}}.tar")


def their_pipeline(pattern: str, workers: int) -> Callable[[], int]:
    """The stages of open_clip 3.3 for training."""
    transform, tokenizer = image_transform(SIZE, is_train=True, mean=MEAN, std=STD), open_clip.get_tokenizer("ViT-B-32")
    stages = [
        wds.SimpleShardList(pattern),
        wds.detshuffle(2000, 500, seed=0),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(5000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    ]

    def run() -> int:
        loader = wds.WebLoader(wds.DataPipeline(*stages), batch_size=None, shuffle=False, num_workers=workers)
        return sum(len(images) for images, _ in loader)

    return run


def our_pipeline(pattern: str, workers: int, scaled: bool) -> Callable[[], int]:
    """An epoch of ours, a random part of each picture as theirs."""
    transform, tokenizer = ImageTransform(SIZE, MEAN, STD, scaled=scaled), clip_tokenizer()
    shards, augment = Shards(pattern), Augment(scale=SCALE, ratio=RATIO)

    def run() -> int:
        loader = Loader(
            shards, transform, tokenizer, BATCH,
            max_tokens=77, template=None, image_tokens=0, augment=augment, workers=workers,
        )  # fmt: skip
        return sum(batch.to("cpu").size for batch in loader.train(range(loader.steps_per_epoch)))

    return run


def spent() -> float:
    """CPU seconds of this process and its finished children."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def pipeline() -> None:
    """Whole epochs with one and two workers."""
    with tempfile.TemporaryDirectory() as folder:
        pattern = write(Path(folder))
        for workers in (1, 2):
            candidates = {
                "open_clip": their_pipeline(pattern, workers),
                "exact": our_pipeline(pattern, workers, False),
                "fast": our_pipeline(pattern, workers, True),
            }
            costs = epochs(candidates)
            print(f"\nepochs of {SHARDS * PER_SHARD} pictures, {workers} worker(s), CPU time of all processes")
            for name, each in costs.items():
                ratio = statistics.median(b / own for b, own in zip(costs["open_clip"], each, strict=True))
                middle, spread = statistics.median(each), (max(each) - min(each)) / statistics.median(each)
                print(f"  {name:20s} {middle * 1e3:7.2f} ms a picture  spread {spread:4.0%}  ratio {ratio:5.2f}")


def epochs(candidates: dict[str, Callable[[], int]], rounds: int = 5) -> dict[str, list[float]]:
    """CPU seconds for a picture in each of several epochs, in alternation, from another candidate on every time."""
    names = list(candidates)
    costs: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            before = spent()
            count = candidates[name]()
            gc.collect()  # ends the workers, whose time counts only then
            costs[name].append((spent() - before) / count)
    return costs


def main() -> None:
    torch.set_num_threads(1)
    sections = {"single": single, "pipeline": pipeline}
    for name in sys.argv[1:] or sections:
        sections[name]()


if __name__ == "__main__":
    main()
