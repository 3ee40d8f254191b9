"""METEOR and SPICE, which are Java programs: run where a Java runtime and pycocoevalcap are found, else explained."""

import contextlib
import importlib
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm.eval.grams import Words

NAMES = {"meteor": "METEOR", "spice": "SPICE"}
_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def missing(name: str) -> str | None:
    """Why a metric cannot be computed here; None: it can. Nothing is imported or started."""
    title = NAMES[name]
    if shutil.which("java") is None:
        return f"{title} is a Java program and no java was found on PATH"
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        return f"{title} comes with pycocoevalcap, which is not installed: pip install 'vlm[coco]'"
    library = Path(next(iter(spec.submodule_search_locations)), "spice", "lib")
    if name == "spice" and not all((library / file).is_file() for file in _MODELS):
        return f"SPICE needs {' and '.join(_MODELS)} (Stanford CoreNLP 2015-12-09) in {library}"
    return None


def java_scores(
    name: str, candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[float, list[float]]:
    """The metric of all candidates together and of each, 0 to 1; METEOR's of all is not the mean of each."""
    module = importlib.import_module(f"pycocoevalcap.{name}.{name}")
    given = {number: [" ".join(words)] for number, words in enumerate(candidates)}
    wanted = {number: [" ".join(words) for words in group] for number, group in enumerate(references)}
    with contextlib.redirect_stdout(sys.stderr):
        scorer = getattr(module, name.capitalize())()
        together, each = scorer.compute_score(wanted, given)
    return float(together), [_plain(score) for score in each]


def _plain(score: Any) -> float:
    return float(score["All"]["f"]) if isinstance(score, dict) else float(score)
