"""CLIP_benchmark's data sets on disk: numbered shards, how many there are, class names and templates beside them.

Layout of github.com/LAION-AI/CLIP_benchmark (webdataset_builder.py): FOLDER/test/0.tar …, FOLDER/test/nshards.txt,
FOLDER/classnames.txt, FOLDER/zeroshot_classification_templates.txt, FOLDER/dataset_type.txt.
"""

from dataclasses import dataclass
from pathlib import Path

COUNT, TYPE = "nshards.txt", "dataset_type.txt"
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
IMAGES = "webp;png;jpg;jpeg"  # in this order there too
LABEL, TEXT = "cls", "txt"


@dataclass(frozen=True)
class Benchmark:
    """One split. `classes`: it is for classification, with a number of a class beside each picture; else captions."""

    folder: Path
    split: str
    shards: list[str]
    classes: bool

    @property
    def caption(self) -> str:
        """Where its captions, or the numbers of its classes, stand."""
        return LABEL if self.classes else TEXT


def find_benchmark(name: str, split: str = "test") -> Benchmark | None:
    """The data set in a folder, or in the folder of one of its splits; None where it is something else.

    ValueError: shards that are counted and not there, several classes a picture, a split that is not there.
    """
    folder = Path(name).expanduser()
    if (folder / COUNT).is_file():
        folder, split = folder.parent, folder.resolve().name
    elif not (folder / split / COUNT).is_file():
        others = sorted(path.parent.name for path in folder.glob(f"*/{COUNT}"))
        if others:
            raise ValueError(f"{folder}: CLIP_benchmark's layout without {split}/{COUNT}; name {folder / others[0]}")
        return None
    kind = _first_word(folder / TYPE) or "classification"
    if kind not in ("classification", "retrieval"):
        raise ValueError(f"{folder / TYPE}: {kind}: known are retrieval, and classification with one class a picture")
    return Benchmark(folder, split, _shards(folder / split), kind == "classification")


def _shards(folder: Path) -> list[str]:
    said = _first_word(folder / COUNT)
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(f"{folder / COUNT}: {said!r}: should be the number of shards")
    files = [folder / f"{number}.tar" for number in range(int(said))]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{folder / COUNT}: counts {said} shards, and {missing[0].name} is not there: fetch it")
    return [str(file) for file in files]


def _first_word(file: Path) -> str:
    if not file.is_file():
        return ""
    words = file.read_text(encoding="utf-8", errors="replace").lower().split()
    return words[0] if words else ""
