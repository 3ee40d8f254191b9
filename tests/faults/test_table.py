"""README.md beside this file: every row of its table names a test that is there."""

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
ROW = re.compile(r"\| (\d+) \| ([^|]+) \| ([^|]+) \| `([\w/.]+)::(\w+)` \|")


def rows() -> list[tuple[str, ...]]:
    """Number, fault, expected, file, test."""
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    found = [ROW.fullmatch(line) for line in table]
    assert [line for line, row in zip(table, found, strict=True) if row is None] == []
    return [row.groups() for row in found if row is not None]


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_names_a_test() -> None:
    assert [row for row in rows() if not (ROOT / row[3]).is_file() or row[4] not in names_in(ROOT / row[3])] == []


def test_rows_are_numbered_and_many() -> None:
    found = rows()
    assert [int(row[0]) for row in found] == list(range(1, len(found) + 1))
    assert len({row[1] for row in found}) == len(found)
    assert len({row[3:] for row in found if row[3].startswith("tests/faults/")}) >= 40


def test_every_file_of_faults_is_told_of() -> None:
    told = {row[3] for row in rows()}
    files = {f"tests/faults/{file.name}" for file in FOLDER.glob("test_*.py")} - {"tests/faults/test_table.py"}
    assert files - told == set()
