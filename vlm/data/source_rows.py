"""Rows of text files by number: JSON lines, CSV and TSV, Flickr30k's token file, JSON that was parsed whole.

In memory is where each row begins, eight bytes a row, not the rows.
"""

import csv
import json
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from vlm.data.captions import json_fields
from vlm.data.image import BadSample
from vlm.data.record import MAX_BYTES

Row = dict[str, Any]
_HEAD = 100  # rows that are asked for their columns


@runtime_checkable
class Rows(Protocol):
    """Rows by number; `scan` must have run to its end before the others are used."""

    files: list[Path]
    kind: str  # "CSV"
    columns: list[str]  # as the first row or the header has them

    def scan(self, columns: Iterable[str]) -> Iterator[Row | BadSample]:
        """Every row in order, with at least these columns; what cannot be read gives the reason in its place."""
        ...

    def row(self, number: int) -> Row:
        """One row. ValueError when its file has changed."""
        ...

    def where(self, number: int) -> str:
        """File and row, from 1 on, for messages."""
        ...


class Places:
    """Where rows begin in files, as flat arrays; a file that has changed since is refused."""

    def __init__(self, files: list[Path]) -> None:
        """Note size and time of each file."""
        self.files = files
        self._stamps = [_stamp(os.stat(file)) for file in files]
        self._begins, self._firsts = array("q"), array("q")

    def begin(self) -> None:
        """The rows that follow are in the next file."""
        self._firsts.append(len(self._begins))

    def add(self, offset: int) -> None:
        """One more row."""
        self._begins.append(offset)

    @contextmanager
    def at(self, number: int) -> Iterator[BinaryIO]:
        """The file of a row, open where the row begins."""
        file = bisect_right(self._firsts, number) - 1
        self.check(file)
        with self.files[file].open("rb") as handle:
            handle.seek(self._begins[number])
            yield handle

    def check(self, file: int) -> None:
        """ValueError when the file is not the one that was indexed."""
        if _stamp(os.stat(self.files[file])) != self._stamps[file]:
            raise ValueError(
                f"{self.files[file]}: changed since it was indexed; start again, and leave it alone meanwhile"
            )

    def where(self, number: int) -> str:
        """File and row."""
        file = bisect_right(self._firsts, number) - 1
        return f"{self.files[file]}, row {number - self._firsts[file] + 1}"


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


class Lines:
    """Files with one row a line, which `parse` (BadSample) makes of its bytes; blank lines do not count."""

    def __init__(self, files: list[Path], kind: str, parse: Callable[[bytes], Row]) -> None:
        """Read the first lines. ValueError when the very first is no row."""
        self.files, self.kind, self._parse = files, kind, parse
        self._places = Places(files)
        first = islice(self.scan(()), _HEAD)
        self.columns = _columns(row for row in first if not isinstance(row, BadSample))
        if not self.columns:
            raise ValueError(f"{files[0]}: not {kind}: {self._why(files[0])}")
        self._places = Places(files)

    def scan(self, columns: Iterable[str]) -> Iterator[Row | BadSample]:
        """All rows, whole."""
        for file in self.files:
            self._places.begin()
            with file.open("rb") as handle:
                offset = 0
                while line := handle.readline(MAX_BYTES):
                    if line.strip():
                        self._places.add(offset)
                        yield self._try(line)
                    offset += len(line)

    def _why(self, file: Path) -> str:
        with file.open("rb") as handle:
            line = handle.readline(MAX_BYTES)
        return f"row 1: {self._try(line)}" if line.strip() else "it is empty"

    def _try(self, line: bytes) -> Row | BadSample:
        try:
            return self._parse(line)
        except BadSample as bad:
            return bad

    def row(self, number: int) -> Row:
        """One row."""
        with self._places.at(number) as handle:
            return self._parse(handle.readline(MAX_BYTES))

    def where(self, number: int) -> str:
        """File and row."""
        return self._places.where(number)


def _columns(rows: Iterable[Row]) -> list[str]:
    """All names in a few rows: not every row has every column."""
    return list(dict.fromkeys(name for row in rows for name in row))


def json_lines(files: list[Path]) -> Lines:
    """One JSON object a line."""
    return Lines(files, "JSON lines", json_fields)


def token_lines(files: list[Path]) -> Lines:
    """Flickr30k's and Flickr8k's `picture.jpg#0<TAB>caption`."""
    return Lines(files, "Flickr token lines", _token)


def _token(line: bytes) -> Row:
    found = TOKEN.match(line)
    if found is None:
        raise BadSample("unreadable row", f"not picture#number<TAB>caption: {line[:60]!r}")
    try:
        return {"image": found[1].decode("utf-8-sig").strip(), "caption": found[2].decode()}
    except UnicodeDecodeError as error:
        raise BadSample("not UTF-8", str(error)) from None


TOKEN = re.compile(rb"([^\t]+)#\d+\t(.*)")


class Delimited:
    """CSV and its kin: a header, quoted cells that may hold line ends, the delimiter that the header shows."""

    def __init__(self, files: list[Path]) -> None:
        """Read the headers. ValueError: an empty file, headers that differ."""
        self.files = files
        self._places = Places(files)
        self._delimiter = _delimiter(files[0])
        self.kind = {",": "CSV", "\t": "TSV"}.get(self._delimiter, f"table with {self._delimiter!r}")
        headers = [self._header(file) for file in files]
        self.columns = headers[0]
        for file, header in zip(files, headers, strict=True):
            if header != self.columns:
                raise ValueError(f"{file}: its header {header} is not that of {files[0]}: {self.columns}")

    def scan(self, columns: Iterable[str]) -> Iterator[Row | BadSample]:
        """All rows, whole."""
        for file in self.files:
            self._places.begin()
            with file.open("rb") as handle:
                lines = _Counted(handle)
                reader = self._reader(lines)
                next(reader)
                while True:
                    begin = lines.consumed
                    try:
                        found: Row | BadSample = self._row(next(reader))
                    except StopIteration:
                        break
                    except BadSample as bad:
                        found = bad
                    except csv.Error as error:
                        found = BadSample("unreadable row", str(error))
                    if found:
                        self._places.add(begin)
                        yield found

    def row(self, number: int) -> Row:
        """One row."""
        with self._places.at(number) as handle:
            return self._row(next(self._reader(_Counted(handle))))

    def where(self, number: int) -> str:
        """File and row, the header not counted."""
        return self._places.where(number)

    def _reader(self, lines: Iterable[str]) -> "Iterator[list[str]]":
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _header(self, file: Path) -> list[str]:
        with file.open("rb") as handle:
            try:
                return [name.strip() for name in next(self._reader(_Counted(handle)))]
            except StopIteration:
                raise ValueError(f"{file}: is empty; expected a header") from None
            except csv.Error as error:
                raise ValueError(f"{file}: no header: {error}") from None

    def _row(self, cells: list[str]) -> Row:
        """Empty for a blank line."""
        if cells and len(cells) != len(self.columns):
            raise BadSample("unreadable row", f"{len(cells)} cells, the header has {len(self.columns)}")
        if any(not cell.isascii() and not cell.isprintable() and _lone(cell) for cell in cells):
            raise BadSample("not UTF-8", repr(cells)[:80])
        return dict(zip(self.columns, cells, strict=False))


class _Counted:
    """Lines as text, bytes that are not UTF-8 as half surrogates; `consumed`: bytes so far."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self.consumed = handle, 0

    def __iter__(self) -> Iterator[str]:
        while line := self._handle.readline(MAX_BYTES):
            start = self._handle.tell() == len(line)
            self.consumed += len(line)
            yield line.decode("utf-8-sig" if start else "utf-8", "surrogateescape")


def _lone(cell: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in cell)


def _delimiter(file: Path) -> str:
    with file.open("rb") as handle:
        header = handle.readline(MAX_BYTES).decode("utf-8-sig", "replace")
    return max("\t,|;", key=header.count) if header.strip() else ","


class Whole:
    """Rows that came out of a JSON file parsed whole, kept as one flat piece of JSON instead of as objects."""

    def __init__(self, file: Path, kind: str, rows: Iterable[Row]) -> None:
        """ValueError when there is no row."""
        self.files, self.kind = [file], kind
        self._text, self._ends = bytearray(), array("q", [0])
        for row in rows:
            self._text += json.dumps(row).encode()
            self._ends.append(len(self._text))
        if len(self._ends) == 1:
            raise ValueError(f"{file}: {kind} without an entry")
        self.columns = _columns(islice(map(self.row, range(len(self._ends) - 1)), _HEAD))

    def scan(self, columns: Iterable[str]) -> Iterator[Row | BadSample]:
        """All rows, whole."""
        return (self.row(number) for number in range(len(self._ends) - 1))

    def row(self, number: int) -> Row:
        """One row."""
        found: Row = json.loads(self._text[self._ends[number] : self._ends[number + 1]])
        return found

    def where(self, number: int) -> str:
        """File and entry."""
        return f"{self.files[0]}, entry {number + 1}"
