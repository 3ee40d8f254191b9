"""What an index holds: files, contents, where their vectors stand. One SQLite file, whole after a kill at any moment.

Files of equal content share a vector. A content that no file has any more keeps it until `vlm.search.store` clears up,
so that what was moved or comes back is not encoded again. Paths are bytes, as the system has them, below their folder.
"""

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

FILE = "index.sqlite"
FORMAT = 1
YOUNG = -1  # in place of a time: the file is so new that a later change might not show in it
WAIT = 60.0  # seconds for another process to finish its commit

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE folders (id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE);
CREATE TABLE contents (
    id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, place INTEGER, fault TEXT, uses INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE files (
    id INTEGER PRIMARY KEY, folder INTEGER NOT NULL REFERENCES folders, path BLOB NOT NULL, size INTEGER NOT NULL,
    changed INTEGER NOT NULL, content INTEGER NOT NULL REFERENCES contents, UNIQUE (folder, path)
);
CREATE TABLE parts (name TEXT PRIMARY KEY, start INTEGER NOT NULL, rows INTEGER NOT NULL);
CREATE INDEX files_of ON files (content);
CREATE INDEX places ON contents (place);
CREATE INDEX unused ON contents (place) WHERE uses = 0;
CREATE INDEX faults ON contents (id) WHERE fault IS NOT NULL;
CREATE TRIGGER came AFTER INSERT ON files BEGIN
    UPDATE contents SET uses = uses + 1 WHERE id = NEW.content;
END;
CREATE TRIGGER went AFTER DELETE ON files BEGIN
    UPDATE contents SET uses = uses - 1 WHERE id = OLD.content;
END;
CREATE TRIGGER became AFTER UPDATE OF content ON files BEGIN
    UPDATE contents SET uses = uses - 1 WHERE id = OLD.content;
    UPDATE contents SET uses = uses + 1 WHERE id = NEW.content;
END;
"""


class Found(NamedTuple):
    """A file as a scan finds it."""

    folder: int
    path: bytes
    size: int
    changed: int  # nanoseconds, or YOUNG


class Todo(NamedTuple):
    """A file that is new or looks changed; `before`: the content it had."""

    found: Found
    before: int | None


class Content(NamedTuple):
    """What is known of a content: whether it is a picture (a place) or not (a fault), and how many files have it."""

    id: int
    place: int | None
    fault: str | None
    uses: int


class Part(NamedTuple):
    """A file of vectors: those of the places `start` to `start + rows`."""

    name: str
    start: int
    rows: int


class Manifest:
    """The tables in words; threads may share it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._sql, self._lock = connection, threading.RLock()

    # --- what holds for all --------------------------------------------------------------------------------------

    def meta(self) -> dict[str, str]:
        """Settings of the index."""
        return dict(self._rows("SELECT key, value FROM meta"))

    def remember(self, values: Mapping[str, str]) -> None:
        """Changes settings."""
        self._many("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))

    def folders(self) -> dict[int, bytes]:
        """Folders by number, as they were remembered."""
        return dict(self._rows("SELECT id, path FROM folders ORDER BY id"))

    def set_folders(self, paths: Sequence[bytes]) -> int:
        """The index is of these from now on; returns how many files of others it forgets."""
        with self.transaction():
            gone = [number for number, path in self.folders().items() if path not in paths]
            count = sum(self._run("DELETE FROM files WHERE folder = ?", (number,)).rowcount for number in gone)
            self._many("DELETE FROM folders WHERE id = ?", [(number,) for number in gone])
            self._many("INSERT OR IGNORE INTO folders (path) VALUES (?)", [(path,) for path in paths])
        return count

    def clear(self) -> None:
        """Forgets everything but folders and settings."""
        with self.transaction():
            for table in ("files", "contents", "parts"):
                self._run(f"DELETE FROM {table}")
            self._run("DELETE FROM meta WHERE key = 'graph'")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what is changed inside; what is read inside is of one moment."""
        with self._lock:
            if self._sql.in_transaction:
                yield
                return
            self._sql.execute("BEGIN")
            try:
                yield
            except BaseException:
                self._sql.rollback()
                raise
            self._sql.commit()

    # --- a scan --------------------------------------------------------------------------------------------------

    def begin_scan(self) -> None:
        """Forgets what an earlier scan has seen."""
        self._run("DELETE FROM temp.seen")
        self._run("DELETE FROM temp.todo")

    def scanned(self, found: Found) -> None:
        """Notes a file, and whether there is something to do about it."""
        query = "SELECT id, size, changed, content FROM files WHERE folder = ? AND path = ?"
        row = self._row(query, (found.folder, found.path))
        if row is not None:
            self._run("INSERT OR IGNORE INTO temp.seen VALUES (?)", row[:1])
        if row is None or found.changed == YOUNG or row[1:3] != (found.size, found.changed):
            self._run("INSERT INTO temp.todo VALUES (?, ?, ?, ?, ?)", (*found, None if row is None else row[3]))

    def keep_below(self, folder: int, path: bytes) -> None:
        """What lies below a folder that could not be looked at is not taken for deleted."""
        low = path + b"/" if path else b""
        high = path + b"0" if path else b"\xff"  # "0" follows "/"
        query = "INSERT OR IGNORE INTO temp.seen SELECT id FROM files WHERE folder = ? AND path >= ? AND path < ?"
        self._run(query, (folder, low, high))

    def gone(self) -> dict[int, tuple[int, int]]:
        """Of each folder: how many files it had, and how many of them the scan has not seen."""
        query = "SELECT folder, count(*), sum(id NOT IN (SELECT id FROM temp.seen)) FROM files GROUP BY folder"
        return {folder: (count, lost) for folder, count, lost in self._rows(query)}

    def forget_gone(self) -> int:
        """Takes out the files that the scan has not seen; their contents stay."""
        return self._run("DELETE FROM files WHERE id NOT IN (SELECT id FROM temp.seen)").rowcount

    def todo(self) -> tuple[int, Iterator[Todo]]:
        """What the scan found to do: how many, and one after the other."""
        (count,) = self._row("SELECT count(*) FROM temp.todo") or (0,)
        return count, self._todo()

    def _todo(self) -> Iterator[Todo]:
        last = 0
        while rows := self._rows(f"SELECT rowid, * FROM temp.todo WHERE rowid > {last} ORDER BY rowid LIMIT 1000"):
            yield from (Todo(Found(*row[1:5]), row[5]) for row in rows)
            last = rows[-1][0]

    # --- contents and files ----------------------------------------------------------------------------------------

    def content(self, digest: bytes) -> Content | None:
        """The content with this SHA-256."""
        row = self._row("SELECT id, place, fault, uses FROM contents WHERE digest = ?", (digest,))
        return None if row is None else Content(*row)

    def add_content(self, digest: bytes, place: int | None, fault: str | None) -> None:
        """A new content: a picture, whose vectors stand at `place`, or what is none, and why."""
        self._run("INSERT INTO contents (digest, place, fault) VALUES (?, ?, ?)", (digest, place, fault))

    def put_file(self, found: Found, content: int) -> None:
        """A file is new or has changed."""
        self._run(
            "INSERT INTO files (folder, path, size, changed, content) VALUES (?, ?, ?, ?, ?) ON CONFLICT (folder, path)"
            " DO UPDATE SET size = excluded.size, changed = excluded.changed, content = excluded.content",
            (*found, content),
        )

    def bad(self) -> int:
        """Files that are no pictures."""
        (count,) = self._row("SELECT coalesce(sum(uses), 0) FROM contents WHERE fault IS NOT NULL")
        return int(count)

    def known_faults(self, most: int) -> tuple[int, list[tuple[int, bytes, str]]]:
        """Those that the scan found nothing to do about: how many, and folder, path and reason of the first ones."""
        query = (
            "FROM contents JOIN files ON files.content = contents.id WHERE fault IS NOT NULL AND NOT EXISTS "
            "(SELECT 1 FROM temp.todo WHERE todo.folder = files.folder AND todo.path = files.path)"
        )
        (count,) = self._row(f"SELECT count(*) {query}")
        return count, self._rows(f"SELECT files.folder, files.path, fault {query} ORDER BY 1, 2 LIMIT ?", (most,))

    def counts(self) -> tuple[int, int]:
        """Files that are pictures, and different pictures among them."""
        query = "SELECT coalesce(sum(uses), 0), count(*) FROM contents WHERE place IS NOT NULL AND uses > 0"
        files, pictures = self._row(query) or (0, 0)
        return files, pictures

    def files_at(self, place: int) -> list[tuple[int, bytes]]:
        """Folder and path of all files whose vectors stand there."""
        query = "SELECT folder, path FROM files JOIN contents ON contents.id = content WHERE place = ?"
        return self._rows(query + " ORDER BY folder, path", (place,))

    # --- vectors ---------------------------------------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """The files of vectors, in order."""
        return [Part(*row) for row in self._rows("SELECT name, start, rows FROM parts ORDER BY start")]

    def add_part(self, part: Part, instead: Sequence[Part] = ()) -> None:
        """A part, maybe in place of others that hold the same."""
        self._many("DELETE FROM parts WHERE name = ?", [(old.name,) for old in instead])
        self._run("INSERT INTO parts VALUES (?, ?, ?)", part)

    def unused(self) -> list[int]:
        """Places whose vectors no file has, in order."""
        query = "SELECT place FROM contents WHERE uses = 0 AND place IS NOT NULL ORDER BY place"
        return [place for (place,) in self._rows(query)]

    def drop_unused(self, parts: Sequence[Part]) -> None:
        """Forgets contents that no file has; the others, in the same order, stand in these parts from now on."""
        with self.transaction():
            self._run("DELETE FROM contents WHERE uses = 0")
            self._run(
                "UPDATE contents SET place = ranked.new FROM (SELECT id, row_number() OVER (ORDER BY place) - 1 AS new "
                "FROM contents WHERE place IS NOT NULL) AS ranked WHERE ranked.id = contents.id"
            )
            self._run("DELETE FROM parts")
            self._run("DELETE FROM meta WHERE key = 'graph'")
            self._many("INSERT INTO parts VALUES (?, ?, ?)", list(parts))

    # --- SQL -------------------------------------------------------------------------------------------------------

    def _run(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        with self._lock:
            return self._sql.execute(query, values)

    def _many(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        with self.transaction():
            self._sql.executemany(query, rows)

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._sql.execute(query, values).fetchall()

    def _row(self, query: str, values: Sequence[Any] = ()) -> Any:
        with self._lock:
            return self._sql.execute(query, values).fetchone()


def is_index(folder: Path) -> bool:
    """Whether `vlm index` has made this folder."""
    return (folder / FILE).is_file()


@contextmanager
def opened(folder: Path, write: bool = False) -> Iterator[Manifest]:
    """The manifest of an index. ValueError: it is none, is damaged, or of another version; OSError: no room."""
    if not is_index(folder):
        what = "no such folder" if not folder.exists() else f"no index (it has no {FILE})"
        raise ValueError(f"{folder}: {what}; make one with vlm index FOLDER... INDEX --model MODEL")
    with _told(folder), _connected(folder / FILE, "rw" if write else "ro") as sql:
        (version,) = sql.execute("PRAGMA user_version").fetchone()
        if version != FORMAT:
            raise ValueError(f"{folder}: an index of version {version}, not {FORMAT}: delete it and make it anew")
        sql.execute("PRAGMA trusted_schema = OFF")
        if write:
            sql.execute("CREATE TEMP TABLE seen (id INTEGER PRIMARY KEY)")
            sql.execute("CREATE TEMP TABLE todo (folder, path, size, changed, before, UNIQUE (folder, path))")
        yield Manifest(sql)


def create(folder: Path, meta: Mapping[str, str]) -> None:
    """An empty index in a folder that is there; a kill leaves none, or all of it."""
    draft = folder / f".{FILE}.tmp"
    draft.unlink(missing_ok=True)
    with _told(folder), _connected(draft, "rwc") as sql:
        sql.executescript(f"BEGIN;{_TABLES}PRAGMA user_version = {FORMAT};")
        sql.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
        sql.execute("COMMIT")
    draft.replace(folder / FILE)


@contextmanager
def _connected(file: Path, mode: str) -> Iterator[sqlite3.Connection]:
    address = f"file:{quote(str(file.absolute()))}?mode={mode}"
    sql = sqlite3.connect(address, WAIT, isolation_level=None, check_same_thread=False, uri=True)
    try:
        yield sql
    finally:
        sql.close()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """SQLite's errors in words."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"{folder / FILE}: {error}") from None
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{folder / FILE}: damaged ({error}); delete the index and make it anew") from None
