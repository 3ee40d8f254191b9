"""Files, names and settings that would run a command if anything unpickled, evaluated or ran them: `touch marker`."""

import io
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.faults.made import encoded, good, tar
from tests.tiny import squares

COMMAND = "touch marker"
PNG = encoded("red")
Words = tuple[str, ...]


class Evil:
    """Runs the command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (COMMAND,)


PICKLE = pickle.dumps(Evil(), protocol=2)
YAML = f"!!python/object/apply:os.system ['{COMMAND}']"
SHELL = "$(touch marker);touch marker|touch marker`touch marker`"


def _torch(path: Path, legacy: bool) -> Path:
    torch.save({"state_dict": {"weight": Evil()}}, path, _use_new_zipfile_serialization=not legacy)
    return path


def _script(path: Path) -> Path:
    """A zip as TorchScript writes it: with code inside, and the pickle that torch.load looks for."""
    with zipfile.ZipFile(path, "w") as out:
        for name, data in (("data.pkl", PICKLE), ("constants.pkl", PICKLE), ("version", b"3"), ("code/x.py", b"")):
            out.writestr(f"archive/{name}", data)
    return path


def _objects() -> bytes:
    """A .npy file of objects, which are pickled."""
    out = io.BytesIO()
    np.save(out, np.array([Evil()], dtype=object), allow_pickle=True)
    return out.getvalue()


@dataclass(frozen=True)
class Attack:
    """What is put into a folder with `s.tar`, `c.yaml` and a finished run `run`; commands; how each may end."""

    make: Callable[[Path], object]
    commands: tuple[Words, ...]
    code: int
    told: str  # somewhere in what each command says


def shard(*members: tuple[str, bytes]) -> Callable[[Path], object]:
    """A shard of good samples and these members."""
    return lambda folder: tar(folder / "evil.tar", [*good(12), *members])


def file(name: str, data: bytes | str) -> Callable[[Path], object]:
    """One file."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return write


def config(change: str, base: str = "") -> Callable[[Path], object]:
    """A config with a line of YAML at its end."""

    def write(folder: Path) -> None:
        (folder / "evil.yaml").write_text(base + (folder / "c.yaml").read_text() + change + "\n")

    return write


def index(folder: Path) -> None:
    """Cached indices in whose arrays stand pickled objects, with a right sum, under every name that is there."""
    data = _objects() * 5
    for path in Path(os.environ["VLM_CACHE"]).glob("index/*.index"):
        path.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))


def named(name: str) -> Callable[[Path], object]:
    """A shard under a name."""
    return lambda folder: squares(folder / name)


def kept(folder: Path) -> None:
    """A shard of features that claims to be ours, of which index.json is a pickle."""
    (folder / "kept").mkdir()
    squares(folder / "kept" / "000000.tar")
    (folder / "kept" / "index.json").write_bytes(PICKLE)


def nothing(folder: Path) -> None:
    """The command line alone is the attack."""


def read(source: str) -> tuple[Words, ...]:
    """All that reads shards."""
    train = ("train", "c.yaml", f"data.train='{source}'", "train.steps=2", "data.max_bad_fraction=1", "--out", "new")
    return (
        train,
        (*train[:-1], "workers", "data.workers=1"),
        ("shards", "check", source),
        ("shards", "preview", source),
        ("shards", "write", source, "written", "--max-bad-fraction", "1"),
        ("evaluate", source, "--model", "run"),
    )


def weights(name: str) -> tuple[Words, ...]:
    """All that reads weights of others."""
    clip = ("model.vision={kind: open_clip, name: ViT-B-32-quickgelu, weights: " + name + "}",)
    return (
        ("train", "c.yaml", f"model.vision.weights={name}", "--out", "new"),
        ("train", "c.yaml", *clip, "--out", "new"),
    )


RUN = (
    ("evaluate", "s.tar", "--model", "run"),
    ("train", "c.yaml", "--out", "run", "--resume"),
    ("train", "c.yaml", "--out", "run", "--resume", "auto"),
)
CONFIG = (("config", "evil.yaml"), ("train", "evil.yaml", "--out", "new"))
WRONG = "could not determine a constructor for the tag"
DAMAGED = "holds no whole checkpoint"
STEP = "run/step-0000004"

SHARDS = {
    f"{suffix} in a tar": Attack(shard((f"k0.{suffix}", PICKLE)), read("evil.tar"), 0, "")
    for suffix in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "cls", "ten", "pyc", "so")
} | {
    "a picture": Attack(shard(("x.png", PICKLE), ("x.txt", b"x")), read("evil.tar"), 0, ""),
    "objects as a picture": Attack(shard(("x.png", _objects()), ("x.txt", b"x")), read("evil.tar"), 0, ""),
    "PostScript": Attack(
        shard(("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%touch marker) (w) file\n"), ("x.txt", b"x")),
        read("evil.tar"), 0, "",
    ),
    "a caption": Attack(shard(("x.png", PNG), ("x.txt", SHELL.encode())), read("evil.tar"), 0, ""),
    "json": Attack(shard(("x.png", PNG), ("x.json", json.dumps({"caption": YAML}).encode())), read("evil.tar"), 0, ""),
    "a member's name": Attack(shard((f"{SHELL}.png", PNG), (f"{SHELL}.txt", b"x")), read("evil.tar"), 0, ""),
    "a member above": Attack(shard(("../marker.png", PNG), ("../marker.txt", b"x")), read("evil.tar"), 0, ""),
    "a shard's name": Attack(named("$(touch marker).tar"), read("$(touch marker).tar"), 0, ""),
    "a name with a bar": Attack(named("|touch marker;.tar"), read("|touch marker;.tar"), 0, ""),
    "pipe:": Attack(nothing, read("pipe:touch marker; cat s.tar"), 2, "would run a command in a shell"),
    "pipe: in braces": Attack(nothing, read("{pipe:touch marker,s.tar}"), 2, "no file matches pipe:"),
    "a chain of file systems": Attack(nothing, read("simplecache::pipe:touch marker"), 2, "no file matches"),
    "file:": Attack(nothing, read("file:touch marker|"), 2, "name local files by their path"),
    "a pickle as a shard": Attack(file("evil.tar", PICKLE), read("evil.tar"), 2, "is not a tar file"),
    "a pickle as parquet": Attack(file("evil.parquet", PICKLE), read("evil.parquet"), 2, "evil.parquet"),
    "a pickle as csv": Attack(file("evil.csv", PICKLE), read("evil.csv"), 2, "evil.csv"),
    "a pickle as jsonl": Attack(file("evil.jsonl", PICKLE), read("evil.jsonl"), 2, "evil.jsonl"),
    "a command in a table": Attack(
        file("evil.csv", "image,caption\npipe:touch marker,x\n|touch marker,x\n"), read("evil.csv"), 2, "is usable",
    ),
    "objects in a cached index": Attack(index, read("s.tar"), 0, ""),
    "a pickle as index.json": Attack(
        kept, tuple(w for w in read("kept") if {"train", "preview"} & {*w}), 2, "kept/index.json: damaged (",
    ),
    "a pickle as index.json, not needed": Attack(kept, (("shards", "check", "kept"),), 0, ""),
}  # fmt: skip

FILES = {
    "a pickle as .pt": Attack(lambda f: _torch(f / "e.pt", legacy=False), weights("e.pt"), 2, "holds more than plain"),
    "a legacy .pth": Attack(lambda f: _torch(f / "e.pth", legacy=True), weights("e.pth"), 2, "holds more than plain"),
    "a plain pickle as .bin": Attack(file("e.bin", PICKLE), weights("e.bin"), 2, "holds more than plain"),
    "TorchScript": Attack(lambda f: _script(f / "e.pt"), weights("e.pt"), 2, "TorchScript archive, which holds code"),
    "objects as .npz": Attack(file("e.npz", _objects()), weights("e.npz"), 2, "holds more than plain"),
    "a pickle as safetensors": Attack(
        file("e.safetensors", PICKLE), weights("e.safetensors"), 2, "not a whole safetensors file"
    ),
    "a pickle as tokenizer.json": Attack(
        file("evil/tokenizer.json", PICKLE),
        (("train", "c.yaml", "tokenizer={kind: file, path: evil}", "--out", "new"),),
        2,
        "not a readable tokenizer.json",
    ),
    "YAML in a config": Attack(config(f"seed: {YAML}"), CONFIG, 2, WRONG),
    "an object in a config": Attack(config("x: !!python/object/new:os.system ['touch marker']"), CONFIG, 2, WRONG),
    "a module in a config": Attack(config("extra: !!python/module:evil"), CONFIG, 2, WRONG),
    "base of a config": Attack(config("", "base: 'pipe:touch marker'\n"), CONFIG, 2, "No such file"),
    "YAML in an override": Attack(nothing, (("config", "c.yaml", f"train.steps={YAML}"),), 2, "is not YAML"),
    "a picture's name": Attack(
        nothing, (("caption", "|touch marker", "-mrun"), ("caption", "pipe:touch marker", "-mrun")), 2, "no such file"
    ),
    "a pickle as a picture": Attack(file("evil.png", PICKLE), (("caption", "evil.png", "-mrun"),), 1, "not an image"),
}  # fmt: skip

RUNS = {
    "a run's config": Attack(file("run/config.yaml", f"seed: {YAML}\n"), RUN, 2, WRONG),
    "a run's tokenizer": Attack(file("run/tokenizer.json", PICKLE), RUN, 2, "not a readable tokenizer.json"),
    "a run's state": Attack(file(f"{STEP}/state.json", PICKLE), RUN, 2, DAMAGED),
    "a run's weights": Attack(file(f"{STEP}/model.safetensors", PICKLE), RUN, 2, DAMAGED),
    "a run's optimizer": Attack(file(f"{STEP}/optimizer.safetensors", PICKLE), RUN, 2, DAMAGED),
    "metadata of a divided optimizer": Attack(file(f"{STEP}/optimizer/.metadata", PICKLE), RUN, 0, ""),
    "parts of a divided optimizer": Attack(file(f"{STEP}/optimizer/__0_0.distcp", PICKLE), RUN, 2, DAMAGED),
    "a pointer out of the run": Attack(file("run/latest", "../../$(touch marker)\n"), RUN, 0, ""),
    "a run's log": Attack(file("run/metrics.jsonl", PICKLE), RUN, 0, ""),
    "packages beside a run": Attack(file("run/yaml.py", f"import os\nos.system('{COMMAND}')\n"), RUN, 0, ""),
}  # fmt: skip
