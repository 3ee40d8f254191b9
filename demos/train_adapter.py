"""Your own pictures to an MLP adapter: python demos/train_adapter.py FOLDER OUT [key=value …]

FOLDER holds pictures and, beside each, its captions in a text file of the same name, one a line. The encoder stays
frozen; by default it is the one that `make quickstart` trained. Any other is one setting away, for example
model.vision='{kind: open_clip, name: ViT-B-32, weights: laion2b_s34b_b79k}' with model.init.vision=null.
"""

import sys
from pathlib import Path

from vlm.captioning.run import caption, find_images
from vlm.train.run import train

CONFIG = Path(__file__).parents[1] / "configs" / "tiny" / "adapter.yaml"


def main(folder: str, out: str, *overrides: str) -> None:
    """Trains the adapter on the folder as it is and captions the first pictures."""
    train(CONFIG, [f"data.train={folder}", *overrides], out=Path(out))
    caption(out, [str(path) for path in list(find_images([folder]))[:5]])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
