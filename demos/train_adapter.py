"""Your own pictures to an MLP adapter: python demos/train_adapter.py FOLDER OUT [key=value …]

FOLDER holds pictures and, beside each, its captions in a text file of the same name, one a line. The encoder stays
frozen; by default it is the one that `make quickstart` trained. Any other is one setting away, for example
model.vision='{kind: open_clip, name: ViT-B-32, weights: laion2b_s34b_b79k}' with model.init.vision=null.
"""

import sys
from pathlib import Path

import webdataset

from vlm.eval.run import caption, find_images
from vlm.train.run import train

CONFIG = Path(__file__).parents[1] / "configs" / "tiny" / "adapter.yaml"


def write_shards(folder: Path, out: Path) -> int:
    """Packs a folder into tar shards and returns how many pictures have captions."""
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    with webdataset.ShardWriter(str(out / "%04d.tar"), maxcount=5000, verbose=0) as writer:
        for picture in find_images([str(folder)]):
            text = picture.with_suffix(".txt")
            if text.is_file():
                suffix = picture.suffix.lower().removeprefix(".")
                writer.write({"__key__": f"{count:06d}", suffix: picture.read_bytes(), "txt": text.read_text("utf-8")})
                count += 1
    return count


def main(folder: str, out: str, *overrides: str) -> None:
    """Writes shards, trains the adapter and captions the first pictures."""
    count = write_shards(Path(folder), Path(out, "shards"))
    if not count:
        sys.exit(f"{folder}: no picture has a text file of the same name beside it")
    print(f"{count} pictures with captions")
    run = Path(out, "run")
    train(CONFIG, [f"data.train={out}/shards", *overrides], out=run)
    caption(run, [str(path) for path in list(find_images([folder]))[:5]])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
