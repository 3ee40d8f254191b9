"""What a frozen image encoder gives, stored in place of pictures: tars like those of pictures, read by the same loader.

Letters: B images, N image tokens, C image width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.data.cache import Cache
from vlm.data.image import BadSample
from vlm.data.shards import Shards
from vlm.data.tars import INDEX

SUFFIX = "features"  # of a sample's member, and the entry of index.json that tells what made it
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FeatureDtype = Literal["float16", "bfloat16", "float32"]


@runtime_checkable
class Transform(Protocol):
    """From a stored member to what stands in a batch: of pictures (`ImageTransform`) or of features."""

    def read(self, data: bytes) -> Tensor:
        """One sample's. BadSample when it cannot be used."""
        ...

    def normalize(self, pixels: Tensor) -> Tensor:
        """Many samples', as the model takes them."""
        ...


@dataclass(frozen=True)
class FeatureInfo:
    """What features are, and what they came from: of other origin they would train something else."""

    tokens: int
    dim: int
    dtype: FeatureDtype
    encoder: str  # settings, as JSON
    weights: str  # SHA-256
    transform: str

    @property
    def size(self) -> int:
        """Bytes of one picture."""
        return self.tokens * self.dim * DTYPES[self.dtype].itemsize

    def read(self, data: bytes) -> Float[Tensor, "N C"]:
        """A sample's features, in the dtype they are stored in. BadSample for another length."""
        if len(data) != self.size:
            raise BadSample("damaged features", f"{len(data)} bytes for {self.tokens} x {self.dim} of {self.dtype}")
        return torch.frombuffer(bytearray(data), dtype=DTYPES[self.dtype]).view(self.tokens, self.dim)

    def write(self, features: Float[Tensor, "N C"]) -> bytes:
        """Bytes of a sample's features. ValueError for numbers that the dtype cannot hold."""
        stored = features.detach().to("cpu", DTYPES[self.dtype]).contiguous()
        if not stored.isfinite().all():
            raise ValueError(f"the encoder gives numbers that {self.dtype} cannot hold: take bfloat16 or float32")
        return stored.view(torch.uint8).numpy().tobytes()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Nothing is left to do."""
        return pixels

    def refuse_other(self, now: "FeatureInfo", where: Path) -> None:
        """ValueError when the encoder that is there now would give something else."""
        stale = [f.name for f in fields(self) if f.name != "dtype" and getattr(self, f.name) != getattr(now, f.name)]
        if stale:
            both = [(name, _short(getattr(self, name)), _short(getattr(now, name))) for name in stale]
            parts = "; ".join(f"{name}: {before}, now {after}" for name, before, after in both)
            raise ValueError(
                f"{where}: these features are stale ({parts}); write them anew with vlm shards features, "
                "or train on the pictures"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


class FeatureShards(Shards):
    """Shards of features, which are their own transform."""

    def __init__(self, folder: Path, info: FeatureInfo, max_bad_fraction: float, cache: Cache | None = None) -> None:
        """`folder` holds the tars and their index."""
        super().__init__(str(folder), SUFFIX, "json:captions", "picture", max_bad_fraction, cache)
        self.folder, self.info = folder, info


def open_features(
    spec: str | Sequence[str], max_bad_fraction: float = 0.05, cache: Cache | None = None
) -> FeatureShards | None:
    """The features in a folder that `vlm shards features` has written; None where `spec` is something else.

    ValueError: the index.json of the folder is damaged.
    """
    names = [spec] if isinstance(spec, str) else list(spec)
    if len(names) != 1 or not (Path(names[0]).expanduser() / INDEX).is_file():
        return None
    folder = Path(names[0]).expanduser()
    try:
        index: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if not isinstance(index, dict) or SUFFIX not in index:
            return None
        info = FeatureInfo(**index[SUFFIX])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / INDEX}: damaged ({error}); write the shards anew") from None
    return FeatureShards(folder, info, max_bad_fraction, cache)
