"""An evaluation for people: its page, and its first tables as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.eval.outcome import Outcome
from vlm.eval.report import Page, Score, Section, Table

INTRO = "What the model does on this data beside what guessing gives, and where it goes right and wrong."


def as_text(outcomes: Mapping[str, Outcome]) -> str:
    """The first table and the counts of each task."""
    told = list[str]()
    for outcome in outcomes.values():
        first = [section for section in outcome.sections[:1] if isinstance(section, Table)]
        counts = [f"{count} {name}" for name, count in outcome.counts.items() if isinstance(count, int)]
        told += [*(line for table in first for line in lines(table)), ", ".join(counts)]
        told += [*warnings(outcome.counts, outcome.protocol), ""]
    return "\n".join(told)


def warnings(counts: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[str]:
    """What figures must not be read without: what is left out of them, and where they are not the benchmark's."""
    unusable: Mapping[str, int] = counts.get("unusable") or {}
    told = [f"LEFT OUT, not usable: {', '.join(f'{count} {reason}' for reason, count in unusable.items())}"]
    differs = [f"NOT {protocol['name']}: {', '.join(protocol['deviations'])}"] if protocol.get("deviations") else []
    return [*(told if unusable else []), *differs]


def lines(table: Table) -> list[str]:
    """A table as text, the first column to the left."""
    rows = [table.header, *([_plain(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]


def _plain(cell: str | Score) -> str:
    return cell if isinstance(cell, str) else f"{cell.value:.{cell.digits}f}{cell.unit}"


def page_of(record: Mapping[str, Any], sections: Sequence[Section]) -> Page:
    """The sections of the tasks between what was measured and how; `record`: as metrics.json holds it."""
    model, data, settings = record["model"], record["data"], record["settings"]
    beware = [line for told in record["tasks"].values() for line in warnings(told["counts"], told["protocol"])]
    return Page(
        title=f"{Path(model['name']).name} on {Path(data['shards'][0]).name}",
        intro=" ".join([INTRO, *(f"{line}." for line in beware)]),
        facts=[
            *([("samples", f"{data['samples']:,}")] if "samples" in data else []),
            ("tasks", ", ".join(settings["tasks"])),
            ("time", f"{record['seconds']['total']:.0f} s"),
            ("computed in", f"{settings['dtype']} on {record['device']}"),
        ],
        sections=[*sections, _how(record)],
    )


def _how(record: Mapping[str, Any]) -> Table:
    """All that is needed to do it again."""
    model, data = record["model"], record["data"]
    rows = [
        ("model", model["name"] + (f", step {model['step']:,}" if "step" in model else "")),
        ("its weights, SHA-256", model["weights"]),
        ("data", ", ".join(data["shards"])),
        ("its contents, SHA-256", data["fingerprint"]),
    ]
    for task, told in record["tasks"].items():
        rows += [(f"{task}, {name.replace('_', ' ')}", _said(value)) for name, value in told["counts"].items()]
        rows += [(f"{task}, {name.replace('_', ' ')}", _said(value)) for name, value in told["protocol"].items()]
    rows += [(name, _said(value)) for name, value in record["settings"].items() if value is not None]
    rows += [
        ("versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in record["seconds"].items())),
        ("command", record["command"]),
    ]
    return Table("How this was measured", ["", "value"], [list(row) for row in rows if row[1]])


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {one}" for name, one in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
