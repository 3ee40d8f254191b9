"""JPEGs of 640 x 480 to normalised batches of 224 x 224: our loader beside open_clip's transforms and its pipeline.

    python -m tests.bench.dataload [single] [pipeline]

open_clip's pipeline is put together from webdataset's stages as `open_clip_train.data.get_wds_dataset` does (that
package needs an older webdataset). CPU seconds of all processes count, workers included.
"""

import gc
import io
import resource
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
from vlm.data.augment import Augment
from vlm.data.image import ImageTransform
from vlm.data.loader import Loader
from vlm.data.shards import Shards
from vlm.data.text import clip_tokenizer

SIZE, BATCH, SHARDS, PER_SHARD = (224, 224), 64, 4, 256
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
    """One process, picture by picture."""
    files = photographs(64)
    ours, theirs = ImageTransform(SIZE, MEAN, STD), image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
    train = image_transform(SIZE, is_train=True, mean=MEAN, std=STD)
    scaled = replace(ours, scaled=True)

    def by(transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
        return torch.stack([transform(Image.open(io.BytesIO(file))) for file in files])

    def own(transform: ImageTransform) -> torch.Tensor:
        return transform.normalize(torch.stack([transform.read(file) for file in files]))

    deviation = torch.tensor(STD).view(3, 1, 1) * 255
    for name, found in (("ours", own(ours)), ("ours, scaled decoding", own(scaled))):
        print(f"{name}: mean difference {float(((found - by(theirs)) * deviation).abs().mean()):.4f} of 255 levels")
    seconds = alternate(
        {
            "open_clip evaluation": lambda: by(theirs),
            "open_clip training": lambda: by(train),
            "ours": lambda: own(ours),
            "ours, scaled decoding": lambda: own(scaled),
        }
    )
    table(f"64 JPEGs of {sum(map(len, files)) / 2**10 / 64:.0f} KiB", seconds, "open_clip evaluation")


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
    """An epoch of ours, each picture cut at random as theirs are."""
    transform = ImageTransform(SIZE, MEAN, STD, scaled=scaled)
    augment = Augment(scale=(0.9, 1.0), ratio=1 / 3)

    def run() -> int:
        loader = Loader(
            Shards(pattern), transform, clip_tokenizer(), BATCH,
            max_tokens=77, template=None, image_tokens=0, augment=augment, workers=workers,
        )  # fmt: skip
        batches = loader.train()
        return sum(next(batches).size for _ in range(loader.steps_per_epoch))

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
                "ours": our_pipeline(pattern, workers, False),
                "ours, scaled decoding": our_pipeline(pattern, workers, True),
            }
            costs: dict[str, list[float]] = {name: [] for name in candidates}
            for _ in range(3):
                for name, run in candidates.items():
                    before = spent()
                    count = run()
                    gc.collect()  # ends the workers, whose time counts only then
                    costs[name].append((spent() - before) / count)
            print(f"\nepochs of {SHARDS * PER_SHARD} pictures, {workers} worker(s), CPU time of all processes")
            for name, each in costs.items():
                ratio = min(costs["open_clip"]) / min(each)
                print(f"  {name:30s} {min(each) * 1e3:7.2f} ms a picture  ratio {ratio:5.2f}")


def main() -> None:
    torch.set_num_threads(1)
    sections = {"single": single, "pipeline": pipeline}
    for name in sys.argv[1:] or sections:
        sections[name]()


if __name__ == "__main__":
    main()
