"""Published weights where they lie: names, shapes and types at once, a tensor's numbers when they are asked for.

Both formats are read by position, not through mapped memory, whose pages would count beside the model. A pickle is only
ever read with `weights_only=True`, which runs no code.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm.model.weights.layout import FOLDER, INDEX, PICKLES, SAFE

PIECE = 2**22  # bytes that are cast, or sent to a device, at once
WRAPPERS = ("state_dict", "model", "module")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class InFile:
    """A tensor that is still in its file; `like` has its shape, type and strides, on the meta device."""

    file: Path
    start: int
    like: Tensor

    @property
    def place(self) -> tuple[str, int]:
        """File and position, by which tensors are best read in order."""
        return str(self.file), self.start

    def into(self, out: Tensor, buffer: Tensor) -> None:
        """Copies it into a dense tensor of its shape, of any type, on any device, by way of a buffer of bytes.

        ValueError: the file ends early.
        """
        if not self.like.is_contiguous():
            out.copy_(self._strided())
            return
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            if out.dtype == self.like.dtype and out.device.type == "cpu":
                self._fill(stream, out.view(-1))
                return
            piece = buffer.view(self.like.dtype)
            for part in out.view(-1).split(len(piece)):
                self._fill(stream, piece[: len(part)])
                part.copy_(piece[: len(part)])

    def _strided(self) -> Tensor:
        span = torch.empty(_span(self.like), dtype=self.like.dtype)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            self._fill(stream, span)
        return span.as_strided(self.like.shape, self.like.stride())

    def _fill(self, stream: FileIO, out: Tensor) -> None:
        rest = out.view(torch.uint8).numpy().data
        while rest:
            if not (count := stream.readinto(rest)):
                raise ValueError(f"{self.file}: ends {len(rest)} bytes too early: it is cut off, fetch it again")
            rest = rest[count:]


@dataclass(frozen=True)
class InMemory:
    """A tensor that could only be had with its whole file."""

    file: Path
    tensor: Tensor

    @property
    def like(self) -> Tensor:
        """Its shape and type."""
        return torch.empty(self.tensor.shape, dtype=self.tensor.dtype, device="meta")

    @property
    def place(self) -> tuple[str, int]:
        """Its file."""
        return str(self.file), 0

    def into(self, out: Tensor, buffer: Tensor) -> None:
        """As of `InFile`."""
        out.copy_(self.tensor)


@runtime_checkable
class Stored(Protocol):
    """A tensor of some format of files."""

    @property
    def like(self) -> Tensor:
        """Its shape, type and strides, on the meta device."""
        ...

    @property
    def place(self) -> tuple[str, int]:
        """File and position, by which tensors are best read in order."""
        ...

    def into(self, out: Tensor, buffer: Tensor) -> None:
        """Copies it into a dense tensor of its shape, of any type, on any device; `buffer`: bytes to do it with."""
        ...


class Weights(Mapping[str, Tensor]):
    """Tensors of a published checkpoint by name, as tensors on the meta device; `read` and `read_into` give numbers."""

    def __init__(self, source: Path, stored: Mapping[str, Stored]) -> None:
        """`source`: the file or folder, for messages."""
        self.source = source
        self._stored = dict(stored)
        self._like = {name: found.like for name, found in stored.items()}
        # One for all: made anew each time, it would leave holes between the tensors that stay.
        self._buffer = torch.empty(PIECE, dtype=torch.uint8)

    def __getitem__(self, name: str) -> Tensor:
        return self._like[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def read(self, name: str) -> Tensor:
        """A tensor as published, in memory of its own. ValueError: the file ends early."""
        out = torch.empty(self[name].shape, dtype=self[name].dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Reads into a dense tensor of that shape, of any type and on any device, a piece at a time."""
        self._stored[name].into(out, self._buffer)

    def place(self, name: str) -> tuple[str, int]:
        """File and position, by which tensors are best read in order."""
        return self._stored[name].place


def open_weights(path: Path) -> Weights:
    """The weights of a published file or folder, of which only names and shapes are read.

    A folder: model.safetensors or its index, else pytorch_model.bin or its index, else the only file of weights.
    Of pickles wrappers such as {"state_dict": …} and the prefix "module." are taken off.

    ValueError: no weights there, a missing shard, a damaged file, a pickle that holds more than plain tensors.
    """
    if path.is_dir():
        return Weights(path, _open(_weights_of(path)))
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return Weights(path, _open(path))


def open_file(path: Path) -> Weights:
    """The weights of one file. Errors as of `open_weights`, and OSError where it cannot be read."""
    return Weights(path, _open(path))


def _weights_of(folder: Path) -> Path:
    for name in FOLDER:
        if (folder / name).is_file():
            return folder / name
    names = sorted(path.name for path in folder.iterdir())
    for endings in ((SAFE,), PICKLES):
        found = [name for name in names if name.endswith(endings)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise ValueError(
                f"{folder}: holds several files of weights and no {INDEX}: {_shown(found)}; name one of them"
            )
    kinds = ", ".join((SAFE, *PICKLES))
    raise ValueError(f"{folder}: holds no weights that vlm reads ({kinds}); it holds {_shown(names) or 'nothing'}")


def _open(path: Path) -> dict[str, Stored]:
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if path.suffix == SAFE:
        return dict(_safe(path))
    return _pickled(path)


def _indexed(index: Path) -> dict[str, Stored]:
    listed = _listing(index)
    shards = sorted(set(listed.values()))
    if odd := [name for name in shards if Path(name).name != name or name == ".."]:
        raise ValueError(f"{index}: names shards outside its folder: {_shown(odd)}")
    if absent := [name for name in shards if not (index.parent / name).is_file()]:
        raise ValueError(f"{index}: names shards that are not there: {_shown(absent)}; fetch them into the same folder")
    opened = {name: _open(index.parent / name) for name in shards}
    if lost := [f"{name} in {shard}" for name, shard in listed.items() if name not in opened[shard]]:
        raise ValueError(f"{index}: names tensors that its shards do not hold: {_shown(lost)}")
    every = {name: stored for found in opened.values() for name, stored in found.items()}
    return every | {name: opened[shard][name] for name, shard in listed.items()}


def _listing(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        listed = None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()) or not listed:
        raise ValueError(f"{index}: is no index of shards (JSON with a weight_map of names and files)")
    return listed


def _safe(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        with safe_open(path, "pt"):  # checks the header against itself and against the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if (dtype := DTYPES.get(entry["dtype"])) is None:
            raise ValueError(
                f"{path}: {name} is of type {entry['dtype']}, which vlm does not read ({', '.join(DTYPES)})"
            )
        like = torch.empty(entry["shape"], dtype=dtype, device="meta")
        yield name, InFile(path, 8 + size + entry["data_offsets"][0], like)


def _pickled(path: Path) -> dict[str, Stored]:
    found = _plain(path, _load(path, "meta"))
    starts = {name: _start(path, name, tensor) for name, tensor in found.items()}
    known = {name: InFile(path, start, found[name]) for name, start in starts.items() if start is not None}
    if len(known) == len(found):
        return dict(known)
    # Of a torch before 1.6, or read by one that does not tell where in the file they are.
    return {name: InMemory(path, tensor) for name, tensor in _plain(path, _load(path, "cpu")).items()}


def _start(path: Path, name: str, tensor: Tensor) -> int | None:
    storage = tensor.untyped_storage()
    if (start := getattr(storage, "_checkpoint_offset", None)) is None:
        return None
    skipped = int(tensor.storage_offset()) * tensor.itemsize
    inside = skipped + _span(tensor) * tensor.itemsize <= storage.nbytes()
    if not inside or start + storage.nbytes() > path.stat().st_size:
        raise ValueError(f"{path}: refused, for it is damaged ({name} lies outside of it)")
    return int(start) + skipped


def _span(tensor: Tensor) -> int:
    """Numbers from the first to the last in memory."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _load(path: Path, device: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the error
            return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # where a damaged pickle breaks the reader is anybody's guess
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path}: refused, for it is a TorchScript archive, which holds code: take a copy of these weights as "
                "safetensors, or save the state_dict() of the module in it"
            ) from None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: refused, for it is damaged or holds more than plain tensors ({reason})") from None


def _plain(path: Path, found: Any) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(_dense(value) for value in found.values()):
        raise ValueError(f"{path}: holds no plain table of tensors")
    return {name.removeprefix("module."): value.detach() for name, value in found.items()}


def _dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def _shown(names: Iterable[str], most: int = 8) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (f", … ({len(every)} in all)" if len(every) > most else "")
