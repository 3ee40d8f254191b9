"""`vlm index`: makes an index of folders of pictures, or brings it up to date; only what is new is encoded."""

import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json import dumps, loads
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vlm.data.image import BadSample, ImageTransform
from vlm.data.record import MAX_BYTES
from vlm.search import graph
from vlm.search.ahead import ahead
from vlm.search.encoder import BATCH, Encoder, open_encoder, refuse_other
from vlm.search.manifest import FILE, Manifest, Todo, create, is_index, opened
from vlm.search.places import as_told, place_of, remembered
from vlm.search.scan import Scan
from vlm.search.store import Form, Store
from vlm.train.lock import locked
from vlm.train.log import note

KINDS = ("added", "changed", "moved", "copied", "deleted", "encoded")  # what is counted
AHEAD = 2 * BATCH  # pictures that are read while the model computes
ENOUGH = 1.0  # seconds of work, or MANY pictures, after which they are put into the index
MANY = 512
NAMED = 10  # bad pictures of earlier runs that are named again


@dataclass(frozen=True)
class Options:
    """`model`, `parts`: as of `open_model`. None: as it is; new ones have float16, no hidden pictures."""

    model: str | None = None
    parts: Mapping[str, str] | None = None
    dtype: str | None = None
    hidden: bool | None = None
    workers: int | None = None
    rebuild: bool = False
    json: bool = False


def index(folders: Sequence[Path], out: Path, options: Options) -> bool:
    """Brings the index `out` up to date and prints counts; returns whether all pictures can be searched.

    `folders`: what it is of from now on; none: what it is of already.
    Errors: no index and nothing to make one of, another model, a folder that is not there, another process at work.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder of pictures")
    if not is_index(out):
        _refuse_new(folders, out, options)
    with locked(out, "wait for it, or stop it"):
        encoder = None
        if not is_index(out):
            encoder = Encoder(str(options.model), options.parts)
            create(out, {"hidden": "", **_made(encoder, options.dtype or "float16")})
        with opened(out, write=True) as manifest:
            return _Update(out, manifest, options, encoder).run(folders)


def _refuse_new(folders: Sequence[Path], out: Path, options: Options) -> None:
    if not folders:
        what = f"no index (it has no {FILE})" if out.exists() else "no such index"
        raise ValueError(f"{out}: {what}; to make one: vlm index FOLDER... {out} --model MODEL")
    if options.model is None:
        raise ValueError(f"{out}: no index yet; a new one needs --model MODEL")
    if out.exists() and (not out.is_dir() or any(not name.startswith(".") for name in os.listdir(out))):
        raise ValueError(f"{out}: is there and is no index; name a folder that is new or empty")


def _made(encoder: Encoder, dtype: str) -> dict[str, str]:
    form = encoder.form(dtype)
    return {"vectors": str(form.vectors), "dim": str(form.dim), "dtype": dtype, **encoder.about()}


def form_of(meta: Mapping[str, str]) -> Form:
    """What a picture of the index has."""
    return Form(int(meta["vectors"]), int(meta["dim"]), meta["dtype"])


class _Update:
    """One run of `vlm index` over an index that is there, and this process's alone."""

    def __init__(self, out: Path, manifest: Manifest, options: Options, encoder: Encoder | None) -> None:
        self.out, self.manifest, self.options, self.encoder = out, manifest, options, encoder
        self.counts: Counter[str] = Counter()
        self.unreadable = 0
        self.roots: dict[int, bytes] = {}

    def run(self, folders: Sequence[Path]) -> bool:
        """As of `index`."""
        self._settle_model()
        store = Store(self.out, self.manifest, form_of(self.manifest.meta()))
        store.remove_strays()
        self._settle_folders(folders)
        self._scan()
        total, todo = self.manifest.todo()
        if total:
            self._encode(store, todo, total)
        cleared = store.clear_up()
        graph.extend(store)
        return self._report(cleared)

    def _settle_model(self) -> None:
        """Another place of the same model is remembered, another model refused unless all is encoded again."""
        meta, options = self.manifest.meta(), self.options
        if options.rebuild and self.encoder is None:
            self.encoder = Encoder(options.model or meta["model"], options.parts or loads(meta["parts"]))
            made = _made(self.encoder, options.dtype or meta["dtype"])
            with self.manifest.transaction():
                self.manifest.clear()
                self.manifest.remember(made)
        elif options.model is not None and self.encoder is None:
            self.encoder = Encoder(options.model, options.parts)
            refuse_other(self.out, meta, self.encoder)
            self.manifest.remember(self.encoder.about())
        if options.hidden is not None:
            self.manifest.remember({"hidden": "yes" if options.hidden else ""})
        if options.dtype not in (None, self.manifest.meta()["dtype"]):
            raise ValueError(
                f"--dtype {options.dtype}: {self.out} holds {meta['dtype']}; encode all pictures again with --rebuild"
            )

    def _settle_folders(self, folders: Sequence[Path]) -> None:
        if folders:
            self.counts["deleted"] += self.manifest.set_folders([remembered(folder, self.out) for folder in folders])
        self.roots = {number: place_of(path, self.out) for number, path in self.manifest.folders().items()}
        for root in self.roots.values():
            if not os.path.isdir(root):
                raise ValueError(
                    f"{os.fsdecode(root)}: the pictures of {self.out} were in this folder, which is not there: bring "
                    f"it back, or say where they are: vlm index FOLDER... {self.out}"
                )

    def _scan(self) -> None:
        scan = Scan(self._cannot_look, bool(self.manifest.meta()["hidden"]))
        scan.leave_out(os.fsencode(self.out))
        with self.manifest.transaction():
            self.manifest.begin_scan()
            files = Counter[int]()
            for number, root in self.roots.items():
                for found in scan.pictures(number, root):
                    self.manifest.scanned(found)
                    files[number] += 1
            for number, (had, lost) in self.manifest.gone().items():
                if had == lost and not files[number]:
                    raise ValueError(
                        f"{os.fsdecode(self.roots[number])}: no picture in it, and {had} are in the index: bring them "
                        f"back (is a disk not mounted?), or delete {self.out}"
                    )
            self.counts["deleted"] += self.manifest.forget_gone()
        known, first = self.manifest.known_faults(NAMED)
        for number, path, why in first:
            self._name(number, path, f"{why}; not tried again while it stays as it is")
        if known > len(first):
            note(f"vlm: … and {known - len(first)} more that could not be read before")

    def _cannot_look(self, folder: int, path: bytes, why: str, is_folder: bool) -> None:
        self._name(folder, path, why)
        self.unreadable += 1
        if is_folder:
            self.manifest.keep_below(folder, path)

    def _name(self, folder: int, path: bytes, why: str) -> None:
        shown = os.fsdecode(as_told(os.path.join(self.roots[folder], path)))
        print(f"vlm: {shown}: {why}", file=sys.stderr)

    def _encode(self, store: Store, todo: Iterator[Todo], total: int) -> None:
        encoder = self.encoder or open_encoder(self.out, self.manifest.meta())
        read = _Reader(self.roots, encoder.transform, self.manifest)
        workers = self.options.workers or min(8, os.cpu_count() or 1)
        console = Console(stderr=True)
        batch = _Batch(store, encoder, self.counts)
        with ahead(read, todo, workers, AHEAD) as results:
            shown = track(results, "index", total, console=console, disable=not console.is_terminal, transient=True)
            for one in shown:
                if one.fault:
                    self._name(one.todo.found.folder, one.todo.found.path, one.fault)
                if one.digest is None:
                    self.unreadable += 1
                else:
                    batch.add(one)
            batch.put()

    def _report(self, cleared: bool) -> bool:
        files, pictures = self.manifest.counts()
        back = max(0, self.counts["moved"] - self.counts["deleted"])  # of an earlier run, or one that was killed
        self.counts.update(added=back, moved=-back)
        self.counts["deleted"] -= self.counts["moved"]
        counts = {"files": files, "pictures": pictures, **{kind: self.counts[kind] for kind in KINDS}}
        counts["bad"] = self.manifest.bad() + self.unreadable
        if self.options.json:
            print(dumps({**counts, "folders": [os.fsdecode(root) for root in self.roots.values()]}))
        else:
            told = ", ".join(f"{count} {kind}" for kind, count in list(counts.items())[2:] if count) or "nothing new"
            print(f"{self.out}: {files} files, {pictures} different pictures; {told}")
        if cleared:
            note(f"{self.out}: vectors of deleted pictures were cleared away")
        if counts["bad"]:
            note(f"vlm: {counts['bad']} of {files + counts['bad']} pictures could not be read")
        return not counts["bad"]


@dataclass(frozen=True)
class _Read:
    """A file as it was read: without a digest it could not be, with pixels it is a picture that is new."""

    todo: Todo
    digest: bytes | None = None
    pixels: Tensor | None = None
    fault: str = ""


class _Reader:
    """A file to what is to be encoded; runs in threads."""

    def __init__(self, roots: Mapping[int, bytes], transform: ImageTransform, manifest: Manifest) -> None:
        self._roots, self._transform, self._manifest = roots, transform, manifest

    def __call__(self, todo: Todo) -> _Read:
        path = os.path.join(self._roots[todo.found.folder], todo.found.path)
        if todo.found.size > MAX_BYTES:
            return _Read(todo, fault=f"{todo.found.size} bytes, at most {MAX_BYTES}")
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES)
        except OSError as error:
            return _Read(todo, fault=str(error.strerror))
        digest = hashlib.sha256(data).digest()
        if (known := self._manifest.content(digest)) is not None:
            return _Read(todo, digest, fault=known.fault or "")
        try:
            return _Read(todo, digest, self._transform.read(data))
        except BadSample as bad:
            return _Read(todo, digest, fault=str(bad))


class _Batch:
    """What is read and not yet in the index; it goes there in one transaction, its vectors first."""

    def __init__(self, store: Store, encoder: Encoder, counts: Counter[str]) -> None:
        self._store, self._encoder, self._counts = store, encoder, counts
        self._new: dict[bytes, Tensor] = {}  # pixels of what is not encoded yet
        self._encoded: dict[bytes, Tensor] = {}
        self._faults: dict[bytes, str] = {}
        self._files: list[tuple[Todo, bytes]] = []
        self._since = time.monotonic()

    def add(self, one: _Read) -> None:
        """Encodes when there are enough for the model, and puts away when they were much work."""
        assert one.digest is not None
        if one.fault:
            self._faults[one.digest] = one.fault
        elif one.pixels is not None and not self._is_known(one.digest):
            self._new[one.digest] = one.pixels
        self._files.append((one.todo, one.digest))
        if len(self._new) == BATCH:
            self._encode()
        if len(self._files) >= MANY or (not self._new and time.monotonic() - self._since > ENOUGH):
            self.put()

    def _is_known(self, digest: bytes) -> bool:
        """Its copy may have got here after this one was read."""
        return digest in self._encoded or self._store.manifest.content(digest) is not None

    def _encode(self) -> None:
        if self._new:
            vectors = self._encoder.images(torch.stack(list(self._new.values())))
            self._encoded.update(zip(self._new, vectors, strict=True))
            self._new.clear()

    def put(self) -> None:
        """A kill before the commit leaves a file that nobody knows, after it one that is not needed: both go later."""
        self._encode()
        manifest, start = self._store.manifest, self._store.rows()
        written = [self._store.append(torch.stack(list(self._encoded.values())))] if self._encoded else []
        with manifest.transaction():
            for part, instead in written:
                manifest.add_part(part, instead)
            for place, digest in enumerate(self._encoded):
                manifest.add_content(digest, start + place, None)
            for digest, fault in self._faults.items():
                if manifest.content(digest) is None:
                    manifest.add_content(digest, None, fault)
            kinds = Counter(self._link(todo, digest) for todo, digest in self._files)
        for _, instead in written:
            self._store.remove(instead)
        self._counts.update(kinds)
        self._counts["encoded"] += len(self._encoded)
        self._encoded, self._faults, self._files = {}, {}, []
        self._since = time.monotonic()

    def _link(self, todo: Todo, digest: bytes) -> str:
        """Tells the manifest what a file holds; returns what that is to the user."""
        content = self._store.manifest.content(digest)
        assert content is not None
        self._store.manifest.put_file(todo.found, content.id)
        if todo.before == content.id:
            return "unchanged"
        if content.fault is not None:
            return "bad"
        if todo.before is not None:
            return "changed"
        if digest in self._encoded and content.uses == 0:
            return "added"
        return "copied" if content.uses else "moved"
