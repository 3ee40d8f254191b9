"""Standard benchmarks as data: which split, how many pictures and captions there must be, how figures are averaged.

Imports no torch: the command line offers these names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """What figures of this name stand for. Only the first captions of a picture count, as in the literature."""

    name: str
    about: str
    file: str  # Karpathy's JSON, by its usual name
    split: str  # of it
    images: int
    captions: int  # after the first of each picture are taken
    first: int = 5
    folds: int = 1  # neighbouring pictures, in the order of the file; figures are the mean over them

    def fold(self, number: int) -> range:
        """Places in the data of the pictures of a fold."""
        size = self.images // self.folds
        return range(number * size, (number + 1) * size)

    def spec(self, name: str) -> str:
        """The split of a Karpathy JSON, or of that in a folder; other data is taken as it is.

        ValueError: another split was named.
        """
        if (Path(name).expanduser() / self.file).is_file():
            name = str(Path(name).expanduser() / self.file)
        path, _, split = name.rpartition("#")
        if split and path.lower().endswith(".json") and not Path(name).exists():
            if split != self.split:
                raise ValueError(f"{name}: {self.name} is the split {self.split}; name {path}, or give no protocol")
            return name
        return f"{name}#{self.split}" if name.lower().endswith(".json") else name

    def refuse(self, images: int, where: str) -> None:
        """ValueError: so many pictures are not this benchmark."""
        if images != self.images:
            raise ValueError(
                f"{where}: {images} pictures, and {self.name} ({self.about}) has {self.images}: name its data, or give "
                "no protocol"
            )

    def deviations(self, images: int, captions: int) -> list[str]:
        """In which counts the usable data differs: with any, the figures are not to be compared with published ones."""
        pairs = (("usable pictures", images, self.images), ("captions", captions, self.captions))
        return [f"{found} {what} in place of {wanted}" for what, found, wanted in pairs if found != wanted]


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("coco-5k", "test split of Karpathy & Fei-Fei 2015", "dataset_coco.json", "test", 5000, 25_000),
        Protocol("coco-1k", "that of coco-5k in five parts", "dataset_coco.json", "test", 5000, 25_000, folds=5),
        Protocol("flickr30k-1k", "Karpathy's test split of Flickr30k", "dataset_flickr30k.json", "test", 1000, 5000),
    )
}


def find_protocol(name: str) -> Protocol:
    """ValueError: there is none of this name."""
    if name not in PROTOCOLS:
        raise ValueError(f"--protocol {name}: there is no such protocol; there are: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def mean_over_folds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested figures of the same names, each the mean over the folds."""
    first = found[0]
    return {
        name: mean_over_folds([fold[name] for fold in found])
        if isinstance(first[name], Mapping)
        else sum(fold[name] for fold in found) / len(found)
        for name in first
    }
