"""All scores of captions against references that need no model, under one set of names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.eval.bleu import bleu
from vlm.eval.caption import statistics
from vlm.eval.cider import ONE_IMAGE, Frequencies, each_cider_d
from vlm.eval.grams import MAX_N, Words, count
from vlm.eval.java import NAMES, java_scores, missing
from vlm.eval.rouge import rouge_l
from vlm.eval.words import tokenize_all

COCO = {f"bleu_{n}": f"Bleu_{n}" for n in range(1, MAX_N + 1)} | {
    "meteor": "METEOR",
    "rouge_l": "ROUGE_L",
    "cider_d": "CIDEr",
    "spice": "SPICE",
}
BEST = {"cider_d": 10.0}  # of the others 1
TITLES = {f"bleu_{n}": f"BLEU-{n}" for n in range(1, MAX_N + 1)} | NAMES | {"rouge_l": "ROUGE-L", "cider_d": "CIDEr-D"}


@dataclass(frozen=True)
class CaptionScores:
    """Figures of a set, None where one cannot be computed; `each` caption's own; `notes`: what a reader must know."""

    metrics: Mapping[str, float | None]
    each: Mapping[str, list[float]]
    statistics: Mapping[str, Any]
    references: Mapping[str, Any]  # the same statistics of the references
    notes: list[str]

    @property
    def coco(self) -> dict[str, float | None]:
        """The figures under the names of COCO's code."""
        return {name: self.metrics[own] for own, name in COCO.items()}


def score_captions(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    fixed: Frequencies | None = None,
    cut: Sequence[bool] | None = None,
    java: bool = True,
) -> CaptionScores:
    """Scores of captions, each against its own references.

    `fixed`: document frequencies for CIDEr-D. `cut`: which captions ended at the limit of their length, where known.
    `java`: METEOR and SPICE too, where they can be run. ValueError: as of `vlm.eval.grams.count`.
    """
    words, groups = tokenize_all(captions), tokenize_groups(references)
    counted = count(words, groups)
    found = bleu(counted)
    each = {f"bleu_{n + 1}": found.each[:, n].tolist() for n in range(MAX_N)}
    each["rouge_l"] = [rouge_l(text, group) for text, group in zip(words, groups, strict=True)]
    each["cider_d"] = each_cider_d(counted, fixed).tolist()
    together = {f"bleu_{n + 1}": float(found.together[n]) for n in range(MAX_N)}
    notes = [ONE_IMAGE] if len(captions) == 1 and fixed is None else []
    for name in NAMES:
        reason = missing(name) if java else f"{NAMES[name]} was not asked for"
        if reason is None:
            together[name], each[name] = java_scores(name, words, groups)
        else:
            notes.append(reason)
    means = {name: sum(values) / len(values) for name, values in each.items()}
    metrics = {name: (means | together).get(name) for name in COCO}
    flat = [text for group in groups for text in group]
    return CaptionScores(metrics, each, statistics(words, cut), statistics(flat), notes)


def tokenize_groups(references: Sequence[Sequence[str]]) -> list[list[Words]]:
    """References as words, all on lines of one file as COCO's code has them."""
    tokens = iter(tokenize_all([text for group in references for text in group]))
    return [[next(tokens) for _ in group] for group in references]


def as_table(scores: CaptionScores) -> str:
    """For people: a figure a line, then what captions and references are like."""
    lines = [f"{TITLES[name]:>8}  {'–' if value is None else f'{value:.4f}'}" for name, value in scores.metrics.items()]
    lines += ["", f"{'':28}{'captions':>10}{'references':>12}"]
    for title, *path in _ROWS:
        lines.append(f"{title:<28}{_cell(scores.statistics, path):>10}{_cell(scores.references, path):>12}")
    return "\n".join(lines)


_ROWS = [
    ("words, mean", "words", "mean"),
    ("words, least", "words", "min"),
    ("words, most", "words", "max"),
    *((f"repeated {n}-grams, %", "repeated", str(n)) for n in (1, 2, 3, 4)),
    ("vocabulary", "vocabulary"),
    ("most frequent caption, %", "identical"),
    ("different captions, %", "distinct"),
    ("ended at the limit, %", "at_limit"),
]


def _cell(table: Mapping[str, Any], path: Sequence[str]) -> str:
    value: Any = table
    for name in path:
        value = value[name]
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
