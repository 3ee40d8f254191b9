"""`vlm models` and the README hold one table, and it names every config that there is."""

import json
from pathlib import Path

from click.testing import CliRunner

from vlm.cli import app
from vlm.models import SYSTEMS, files, markdown, rows

ROOT = Path(__file__).parents[1]


def test_every_config_is_of_a_system() -> None:
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    named = {name for system in SYSTEMS for name in files(system)}
    assert named == there


def test_the_readme_has_the_table() -> None:
    assert markdown() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_printed() -> None:
    found = CliRunner().invoke(app, ["models"], env={"COLUMNS": "300"})
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert len(lines) == 1 + len(SYSTEMS)
    assert all(cell in line for line, row in zip(lines[1:], rows(), strict=True) for cell in row)


def test_json() -> None:
    found = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert [entry["name"] for entry in found] == [system.name for system in SYSTEMS]
    assert "configs/tiny/clip.yaml" in found[0]["configs"]
