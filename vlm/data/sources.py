"""Pictures with captions from whatever holds them: the layout is recognised, told in words, and read as shards are."""

import itertools
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.data.cache import Cache
from vlm.data.captions import Captions, clean_captions, find_captions, json_fields, parse_caption
from vlm.data.fetch import is_address
from vlm.data.image import BadSample
from vlm.data.pictures import PICTURES, Folder, Pictures, Record, Records, picture_key
from vlm.data.plan import Indices, blocks
from vlm.data.shards import RawSample, Shards, check_bad, expand
from vlm.data.source_json import Conversations, json_records, talks
from vlm.data.source_parquet import Parquet
from vlm.data.source_rows import TOKEN, Delimited, Rows, json_lines, token_lines
from vlm.data.source_tables import Table

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".token")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # Hugging Face's ImageFolder
_TRIALS = 64


def open_pictures(
    spec: str | Sequence[str],
    image: str = PICTURES,
    caption: str = "txt;json:caption",
    id_field: str | None = None,
    images: Path | str | None = None,
    max_bad_fraction: float = 0.05,
    cache: Cache | None = None,
    talks: bool = False,
) -> Pictures:
    """Tar shards as `Shards`; a folder of pictures, a table, a JSON file as `Source`, whichever `spec` names.

    `image`: suffixes of pictures, and columns that hold them; `caption`: as in `Shards`, json:FIELD is also a column;
    `id_field`: json field or column. `images`: the folder that paths are relative to, the file's own unless
    given. `file.json#val` names a split of Karpathy's. `cache`: as in `Shards`. `talks`: conversations with all their
    turns and pictures; without it they are a picture with its first answer.
    ValueError: nothing there, an unknown layout (with what was found), no usable record, too many bad ones.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    plain, splits = zip(*map(_split, patterns), strict=True) if patterns else ((), ())
    kinds = {_kind(pattern) for pattern in plain}
    if kinds <= {".tar"}:
        return Shards(spec, image, caption, id_field, max_bad_fraction, cache, talks)
    if len(kinds) > 1 or (len(plain) > 1 and kinds & {"", ".json"}):
        raise ValueError(f"{', '.join(patterns)}: one folder or JSON file at a time, or several files of one kind")
    wanted = parse_caption(caption)
    if kinds == {""}:
        folder = Path(plain[0]).expanduser()
        if not (tables := _tables_in(folder)):
            return Source(PictureFolder(folder, image, wanted), Folder(folder), max_bad_fraction)
        files, root = tables, folder
    else:
        files = expand(plain, SUFFIXES)
        root = files[0].parent
    place = Folder(Path(images).expanduser() if images is not None else root)
    return Source(
        _records(files, [name.strip() for name in image.split(";")], wanted, id_field, splits[0], place.path, talks),
        place,
        max_bad_fraction,
    )


def has_paths(spec: Sequence[str]) -> bool:
    """Whether a source names its pictures by path: all do but folders of pictures and tars."""
    kinds = {_kind(_split(pattern)[0]) for pattern in spec}
    return bool(kinds - {".tar", ""}) or (kinds == {""} and bool(_tables_in(Path(spec[0]).expanduser())))


def _split(pattern: str) -> tuple[str, str]:
    name, mark, split = pattern.rpartition("#")
    return (name, split) if mark and name.lower().endswith(".json") and not os.path.exists(pattern) else (pattern, "")


def _kind(pattern: str) -> str:
    """Suffix of the files, empty for a folder without tars; what is none of ours is a matter of shards."""
    if is_address(pattern):
        return ".tar"
    path = Path(pattern).expanduser()
    if path.is_dir():
        return ".tar" if any(name.endswith(".tar") for name in os.listdir(path)) else ""
    return path.suffix.lower() if path.suffix.lower() in SUFFIXES else ".tar"


def _tables_in(folder: Path) -> list[Path]:
    if found := [folder / name for name in _METADATA if (folder / name).is_file()]:
        return found[:1]
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    alone = all(
        (folder / name).is_file() and Path(name).suffix.lower()[1:] not in PICTURES.split(";") for name in names
    )
    return [folder / name for name in names if alone and name.endswith(".parquet")]


def _records(
    files: list[Path],
    image: list[str],
    caption: Captions,
    id_field: str | None,
    split: str,
    images: Path,
    whole: bool,
) -> Records:
    suffix = files[0].suffix.lower()
    if strange := [file for file in files if file.suffix.lower() != suffix or file.is_dir()]:
        raise ValueError(f"{strange[0]}: not a {suffix} file as {files[0]}; several files must be of one kind")
    if suffix == ".json":
        if len(files) > 1:
            raise ValueError(f"{files[0]} and {len(files) - 1} more: one JSON file at a time; .jsonl may be several")
        return json_records(files[0], image, caption, id_field, split, images, whole)
    rows = _rows(files, suffix)
    return Conversations(rows, whole) if talks(rows.columns) else Table(rows, image, caption, id_field)


def _rows(files: list[Path], suffix: str) -> Rows:
    if suffix == ".parquet":
        return Parquet(files)
    if suffix in (".jsonl", ".ndjson"):
        return json_lines(files)
    return token_lines(files) if suffix in (".txt", ".token") and _is_token(files[0]) else Delimited(files)


def _is_token(file: Path) -> bool:
    with file.open("rb") as handle:
        return TOKEN.match(handle.readline(4096)) is not None


class Source:
    """Records and the folder their pictures are in, as `Pictures`: to train on, to evaluate, to write as shards.

    Pictures are read when a sample is asked for. `bad` counts the records left out on opening, by reason.
    """

    def __init__(self, records: Records, images: Folder, max_bad_fraction: float = 0.05) -> None:
        """Tries a few records. ValueError: none usable, more than `max_bad_fraction` left out."""
        self.files, self.bad, self.max_bad_fraction = records.files, records.bad, max_bad_fraction
        self._records, self._images = records, images
        left = ", ".join(f"{count} x {reason}" for reason, count in self.bad.most_common())
        self.about = f"{self.files[0]}: {records.about}; {len(self)} pictures" + (f"; left out: {left}" if left else "")
        if not len(self):
            raise ValueError(f"{self.about}: nothing to use")
        check_bad(self.bad, records.seen, max_bad_fraction, str(self.files[0]))
        self._refuse_unusable()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def starts(self) -> Indices:
        """Of neighbouring records."""
        return blocks(len(self))

    def key(self, index: int) -> str:
        """Name of the sample; its number where the record has none."""
        try:
            return self._records[index].key
        except BadSample:
            return f"{index:08d}"

    def where(self, index: int) -> str:
        """File and row, for messages."""
        return self._records.where(index)

    def raw(self, index: int) -> RawSample:
        """Read one sample. BadSample when it cannot be used; ValueError when the source has changed."""
        record = self._records[index]
        texts = _texts(record)
        first, *more = [self._picture(found) for found in (record.image, *record.more) if found] or [b""]
        return RawSample(record.key, record.id, first, texts, record.fields, tuple(more), record.talk)

    def _picture(self, found: str | bytes) -> bytes:
        return found if isinstance(found, bytes) else self._images.read(found)

    def captions(self) -> Iterator[str]:
        """All captions of all usable records, in order; pictures are not read."""
        for index in range(len(self)):
            try:
                record = self._records[index]
                turns = () if record.talk is None else record.talk.turns
                yield from _texts(record) if record.talk is None else (turn.text for turn in turns if turn.text)
            except BadSample:
                continue

    def _refuse_unusable(self) -> None:
        """A wrong folder or column shows only inside the records: a few spread ones tell it before training starts."""
        count = min(len(self), _TRIALS)
        reasons = [self._trial(place * len(self) // count) for place in range(count)]
        if all(reasons):
            raise ValueError(
                f"{self.about}. None of {count} tried is usable: {reasons[0]}; pictures are looked for in "
                f"{self._images.path} (--images, data.images)"
            )

    def _trial(self, index: int) -> str:
        try:
            self.raw(index)
        except BadSample as bad:
            return str(bad)
        return ""


def _texts(record: Record) -> list[str]:
    if not record.captions:
        raise BadSample("no caption")
    return clean_captions(record.captions)


class PictureFolder:
    """Pictures in a folder and those below it, each with its captions in a file of the same name beside it.

    `image`: suffixes, `caption`: `txt` or `json:FIELD`, first found wins. Hidden files are passed over, as are folders
    behind links. In memory are the names, one after the other.
    """

    def __init__(self, folder: Path, image: str, caption: Captions) -> None:
        """List the folder. ValueError: nothing in it has both picture and caption, told with what is there."""
        self.files = [folder]
        self._folder, self._caption = Folder(folder), caption
        self._images = [f".{suffix.strip().lower()}" for suffix in image.split(";")]
        self._beside = [f".{suffix}" for suffix in dict.fromkeys(suffix for suffix, _ in caption)]
        self.bad: Counter[str] = Counter()
        self._names, self._ends = bytearray(), array("q", [0])
        seen: Counter[str] = Counter()
        for where, below, names in os.walk(folder, onerror=_raise):
            below[:] = sorted(name for name in below if not name.startswith("."))
            shown = sorted(name for name in names if not name.startswith("."))
            seen.update(Path(name).suffix.lower() for name in shown)
            self._add(os.path.relpath(where, folder), shown)
        self.seen = len(self) + self.bad.total()
        self.about = f"folder of pictures with {' or '.join(self._beside)} beside them"
        if not len(self):
            found = ", ".join(f"{suffix or 'no suffix'} ({count})" for suffix, count in seen.most_common(12))
            raise ValueError(
                f"{folder}: an unknown layout: no tar file directly in it, and no picture ({', '.join(self._images)}) "
                f"with a {' or '.join(self._beside)} file of its name beside it. Found: {found or 'nothing'}. "
                f"Where captions stand in a table ({', '.join(SUFFIXES)}), name that file"
            )

    def _add(self, folder: str, names: list[str]) -> None:
        """The samples of one folder."""
        for stem, group in itertools.groupby(sorted(map(os.path.splitext, names)), lambda parts: parts[0]):
            suffixes = [suffix for _, suffix in group]
            pictures = sorted(
                (s for s in suffixes if s.lower() in self._images), key=lambda s: self._images.index(s.lower())
            )
            captioned = any(suffix in self._beside for suffix in suffixes)
            if not pictures:
                self.bad["no image"] += captioned
                continue
            name = os.path.normpath(os.path.join(folder, stem + pictures[0]))
            self.bad["repeated name"] += len(pictures) - 1
            if not captioned:
                self.bad["no caption"] += 1
            elif name != name.encode("utf-8", "replace").decode():
                self.bad["name is not UTF-8"] += 1
            else:
                self._names += name.encode()
                self._ends.append(len(self._names))
        self.bad = +self.bad

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Record:
        name = self._names[self._ends[index] : self._ends[index + 1]].decode()
        stem, data = os.path.splitext(name)[0], dict[str, bytes]()
        for suffix in dict.fromkeys([*self._beside, ".json"]):
            if os.path.lexists(self._folder.path / (stem + suffix)):
                data[suffix[1:]] = self._folder.read(stem + suffix)
        fields = json_fields(data["json"]) if "json" in data else {}
        return Record(picture_key(name), name, name, [*find_captions(self._caption, data, fields)], fields)

    def where(self, index: int) -> str:
        """Folder and picture."""
        return f"{self.files[0]}: {self._names[self._ends[index] : self._ends[index + 1]].decode()}"


def _raise(error: OSError) -> None:
    raise error
