"""Rows of Parquet files (the extra `parquet`), a row group in memory at a time."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm.data.image import BadSample
from vlm.data.source_rows import Places, Row

_BATCH = 1024  # rows turned into objects at a time


class Parquet:
    """Rows by number, as `vlm.data.source_rows.Rows`; fast in order, a row group is read for each jump.

    Pictures may be paths, bytes, or Hugging Face's struct of bytes and path.
    """

    kind = "Parquet (fast in order; for training, write shards)"

    def __init__(self, files: list[Path]) -> None:
        """Read the footers. ValueError: no pyarrow, no Parquet, columns that differ."""
        self.files = files
        self._places = Places(files)
        self._groups: list[tuple[int, int]] = []  # file and row group
        self._firsts: list[int] = []  # the first row of each group
        self._rows = 0
        schemas = [self._read_footer(number) for number in range(len(files))]
        for file, schema in zip(files, schemas, strict=True):
            if schema.names != schemas[0].names:
                raise ValueError(f"{file}: its columns {schema.names} are not those of {files[0]}: {schemas[0].names}")
        self.columns: list[str] = schemas[0].names
        self._inline = {name for name in self.columns if _holds_bytes(schemas[0].field(name).type)}
        self._held: tuple[int, Any] = -1, None

    def _read_footer(self, number: int) -> Any:
        with _opened(self.files[number]) as file:
            for group in range(file.num_row_groups):
                self._groups.append((number, group))
                self._firsts.append(self._rows)
                self._rows += file.metadata.row_group(group).num_rows
            return file.schema_arrow

    def scan(self, columns: Iterable[str]) -> Iterator[Row | BadSample]:
        """These columns of every row; a column that holds pictures gives no bytes: it is not read."""
        wanted = list(dict.fromkeys(columns))
        empty = {name: b"" for name in wanted if name in self._inline}
        plain = [name for name in wanted if name not in empty]
        for path in self.files:
            with _opened(path) as file:
                if plain:
                    for batch in file.iter_batches(_BATCH, columns=plain):
                        yield from (row | empty for row in batch.to_pylist())
                else:
                    yield from (empty for _ in range(file.metadata.num_rows))

    def row(self, number: int) -> Row:
        """One row. ValueError when its file has changed."""
        place = bisect_right(self._firsts, number) - 1
        if self._held[0] != place:
            path, group = self._groups[place]
            self._places.check(path)
            with _opened(self.files[path]) as file:
                self._held = place, file.read_row_group(group)
        (found,) = self._held[1].slice(number - self._firsts[place], 1).to_pylist()
        return dict(found)

    def where(self, number: int) -> str:
        """File and row."""
        place = bisect_right(self._firsts, number) - 1
        path = self._groups[place][0]
        first = self._firsts[next(i for i, (file, _) in enumerate(self._groups) if file == path)]
        return f"{self.files[path]}, row {number - first + 1}"


def _holds_bytes(kind: Any) -> bool:
    name = str(kind)
    return name.startswith(("binary", "large_binary", "fixed_size_binary", "struct")) or (
        name.startswith(("list", "large_list")) and "binary" in name
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file; what pyarrow has to say against it becomes one message."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet is read with pyarrow: pip install 'vlm[parquet]'") from None
    with path.open("rb") as handle:
        try:
            yield parquet.ParquetFile(handle)
        except (ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{path}: not a Parquet file, or a damaged one: {error}") from None
