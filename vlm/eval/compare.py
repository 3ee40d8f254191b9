"""`vlm compare`: two evaluations over the same queries, query by query."""

import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, Shaped
from pydantic import TypeAdapter
from torch import Tensor

from vlm import build_data
from vlm.config import schema
from vlm.data.fetch import is_address
from vlm.data.image import BadSample
from vlm.data.pictures import Pictures
from vlm.eval.interval import Comparison
from vlm.eval.interval import compare as paired
from vlm.eval.measure import RANK, bounds, measures, recalls
from vlm.eval.page import lines
from vlm.eval.record import FORMAT, METRICS, REPORT, Evaluation, read, refuse_other, write_files
from vlm.eval.report import Card, Gallery, Page, Table, render
from vlm.eval.thumbs import thumbnail

QUERIES = 8  # shown of those that gained, and of those that lost
SURE = 0.05
FOLLOWS = (
    "tasks",
    "labels",
    "deviations",
    "prompts_cut",
    "repeated_names",
    "notes",
    "choices_alike",
)  # told elsewhere, or follow


@dataclass(frozen=True)
class Difference:
    """One figure of both evaluations."""

    name: str
    first: float
    second: float
    found: Comparison

    @property
    def better(self) -> str:
        """Which of the two; nothing where chance may have decided. Of ranks the lower is better."""
        if self.found.p >= SURE:
            return ""
        rises = self.found.difference > 0
        return "second" if rises != self.name.endswith("mean_rank") else "first"

    @property
    def row(self) -> list[str]:
        """For a table."""
        change, low, high = self.found.difference, self.found.low, self.found.high
        p = f"{self.found.p:.3f}" if self.found.p >= 0.001 else "< 0.001"
        figures = [f"{self.first:.2f}", f"{self.second:.2f}", f"{change:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        return [_words(self.name), *figures, p, self.better]


def _words(name: str) -> str:
    """retrieval/itc/t2i/R@1 as itc t2i R@1, which may be broken over lines."""
    return name.partition("/")[2].replace("/", " ").replace("_", " ")


def compare(
    first: Path, second: Path, out: Path | None = None, overwrite: bool = False, seed: int = 0, json: bool = False
) -> Path:
    """Prints the differences second - first and writes metrics.json and report.html; returns their folder.

    ValueError: no evaluations; other queries, protocols or classes; nothing in common; `out` holds something else.
    """
    one, two = read(first), read(second)
    names = shared(one, two)
    folder = out or Path("runs", "compare", f"{first.resolve().name}-{second.resolve().name}")
    pair = {"first": one, "second": two}
    identity = {
        f"{which} {name}": value for which, each in pair.items() for name, value in each.record["identity"].items()
    }
    identity |= {"draws of seed": seed}
    refuse_other(folder, identity, overwrite)
    refuse_unlike(one, two, names)
    found, apart = differences(one, two, names, seed), deviations(one, two, names)
    for line in apart:
        print(f"vlm: {line}", file=sys.stderr)
    record = {
        "format": FORMAT,
        "identity": identity,
        "first": {"folder": str(first), "model": one.record["model"]},
        "second": {"folder": str(second), "model": two.record["model"]},
        "differs": apart,
        "differences": {each.name: {"first": each.first, "second": each.second} | asdict(each.found) for each in found},
    }
    table = _table(found)
    page = render(_page(one, two, apart, [table, *changed(one, two, names)]))
    told = (jsonlib.dumps(record, indent=1) + "\n").encode()
    write_files(folder, {REPORT: page.encode("utf-8"), METRICS: told})
    text = "\n".join([*lines(table), "", f"open {folder / REPORT}"])
    print(jsonlib.dumps({"folder": str(folder), **record}, indent=1) if json else text)
    return folder


def shared(one: Evaluation, two: Evaluation) -> list[str]:
    """Values that both have. ValueError: none, or of other queries."""
    names = sorted(name for name in one.values if name in two.values)
    where = f"{one.folder} and {two.folder}"
    if not names:
        tasks = " and ".join(", ".join(each.record["tasks"]) for each in (one, two))
        raise ValueError(f"{where} have nothing in common ({tasks}): evaluate both with the same --task")
    remedy = "evaluate both on the same data"
    for name in names:
        mine, other = (list(zip(each.queries[name], each.groups[name], strict=True)) for each in (one, two))
        if len(mine) != len(other):
            raise ValueError(f"{where} differ in {name}: {len(mine)} queries and {len(other)}; {remedy}")
        differing = [place for place, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]]
        if differing:
            at = differing[0]
            what = f"query {at + 1} is {mine[at][0]!r} in the first, {other[at][0]!r} in the second"
            raise ValueError(f"{where} differ in {name}: {what}; {remedy}")
    return names


def _task(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """What an evaluation tells of the task that values are of."""
    found: dict[str, Any] = evaluation.record["tasks"][name.partition("/")[0]]
    return found


def refuse_unlike(one: Evaluation, two: Evaluation, names: Sequence[str]) -> None:
    """ValueError: candidates of another number make other figures of the same ranks."""
    for name in names:
        mine, other = _task(one, name), _task(two, name)
        for what, of in (("protocol", "protocol"), ("folds", "protocol"), ("classes", "counts")):
            key = "name" if what == "protocol" else what
            before, after = (each[of].get(key) for each in (mine, other))
            if before != after:
                raise ValueError(
                    f"{one.folder} and {two.folder} differ in {what}, {before or 'none'} and {after or 'none'}: their "
                    f"figures are not of the same task; evaluate both alike"
                )
        classes = [[each["class"] for each in task["metrics"].get("per_class", [])] for task in (mine, other)]
        if classes[0] != classes[1]:
            raise ValueError(
                f"{one.folder} and {two.folder} differ in the names of their classes: evaluate both with the same "
                "--classes"
            )


def deviations(one: Evaluation, two: Evaluation, names: Sequence[str]) -> list[str]:
    """In words, what else than the model may make a difference."""
    told = list[str]()
    if one.record["data"]["fingerprint"] != two.record["data"]["fingerprint"]:
        told.append("the data differs in more than its queries: pictures, or what was left out")
    settings = [
        ("", one.record["settings"], two.record["settings"]),
        *((f"{task}: ", *(each.record["tasks"][task]["protocol"] for each in (one, two))) for task in _tasks(names)),
    ]
    for where, mine, other in settings:
        for key in [key for key in mine if key in other and key not in FOLLOWS and mine[key] != other[key]]:
            told.append(f"{where}{key.replace('_', ' ')} is {mine[key]} in the first, {other[key]} in the second")
    return told


def _tasks(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition("/")[0] for name in names))


def differences(one: Evaluation, two: Evaluation, names: Sequence[str], seed: int) -> list[Difference]:
    """Of every figure that the values give."""
    found = []
    for name in names:
        ks = recalls(_task(one, name)["counts"])
        before, after = measures(name, one.values[name], ks), measures(name, two.values[name], ks)
        for figure in before:
            pair = before[figure], after[figure]
            result = paired(*pair, one.groups[name], seed, bounds=bounds(figure))
            found.append(Difference(figure, float(pair[0].mean()), float(pair[1].mean()), result))
    return found


def _table(found: Sequence[Difference]) -> Table:
    note = (
        "Second - first. Queries about one picture are drawn together. p: how often chance alone gives as large a "
        f"difference; better: where p is below {SURE}, which one in twenty figures is by chance."
    )
    header = ["", "first", "second", "difference", "95 % interval", "p", "better"]
    return Table("Differences", header, [each.row for each in found], note)


def _page(one: Evaluation, two: Evaluation, apart: Sequence[str], sections: Sequence[Table | Gallery]) -> Page:
    names = [each.record["model"]["name"] for each in (one, two)]
    intro = f"First: {names[0]} ({one.folder}). Second: {names[1]} ({two.folder})."
    if apart:
        intro += "\n\n" + " ".join(f"{line[0].upper()}{line[1:]}." for line in apart)
    facts = [("first", Path(names[0]).name), ("second", Path(names[1]).name)]
    return Page(f"{Path(names[1]).name} against {Path(names[0]).name}", intro, facts, sections)


# The queries that changed most.


def changed(one: Evaluation, two: Evaluation, names: Sequence[str]) -> list[Gallery]:
    """Those that gained and those that lost most, of the last value of each kind."""
    kinds = {(name.split("/")[0], *name.split("/")[2:]): name for name in names}
    source, sections = _source(one), list[Gallery]()
    for name in kinds.values():
        better = gain(name, one.values[name], two.values[name])
        for title, change in (("Gained most", better), ("Lost most", -better)):
            queries = [q for q in change.argsort(descending=True, stable=True)[:QUERIES].tolist() if change[q] > 0]
            cards = [_card(one, two, name, query, source) for query in queries]
            if cards:
                sections.append(Gallery(f"{title}, {_words(name)}", cards))
    return sections


def gain(name: str, before: Shaped[Tensor, "n"], after: Shaped[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Positive where the second is better; of ranks the change of 1 / rank, so that places in front count most."""
    return 1 / after.double() - 1 / before.double() if name.endswith(RANK) else after.double() - before.double()


def _card(one: Evaluation, two: Evaluation, name: str, query: int, source: Pictures | None) -> Card:
    before, after = (f"{each.values[name][query].item():.4g}" for each in (one, two))
    change = f"{name.rpartition('/')[2]} {before} → {after}"
    return Card(_picture(one, name, query, source), one.queries[name][query], note=change)


def _source(evaluation: Evaluation) -> Pictures | None:
    """The data, if it is still where it was; nothing is fetched."""
    data = evaluation.record["data"]
    if "settings" not in data or any(map(is_address, data["shards"])):
        return None
    settings: Any = TypeAdapter(schema.Data).validate_python(data["settings"])
    try:
        return build_data.shards(settings, list(data["shards"]))
    except (ValueError, OSError):
        return None


def _picture(evaluation: Evaluation, name: str, query: int, source: Pictures | None) -> bytes | None:
    """A small picture of the sample that a query is about; None where it is not the one that was evaluated."""
    if source is None or name not in evaluation.samples:
        return None
    place = int(evaluation.samples[name][query])
    try:
        sample = source.raw(place) if place < len(source) else None
        known = set() if sample is None else {sample.key, sample.id, *sample.captions}
        if sample is None or not known & {evaluation.queries[name][query], evaluation.groups[name][query]}:
            return None
        return thumbnail(sample.image)
    except BadSample:
        return None
