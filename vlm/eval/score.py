"""`vlm score`: captions or answers that any tool wrote, against what people wrote. No torch but for CLIPScore."""

import sys
from collections.abc import Iterator, Mapping
from json import dumps
from pathlib import Path
from typing import Any

from vlm.eval.answers import TITLES, read_answers, read_questions, score_answers
from vlm.eval.caption_scores import as_table, score_captions, tokenize_groups
from vlm.eval.cider import Frequencies, frequencies
from vlm.eval.coco import Id, References, read_references, read_results


def score_results(
    results: Path,
    references: Path,
    json: bool = False,
    partial: bool = False,
    corpus: Path | None = None,
    java: bool = True,
    model: str | None = None,
    images: Path | None = None,
    parts: Mapping[str, str] | None = None,
) -> None:
    """Prints the scores of captions. `corpus`: references whose document frequencies CIDEr-D takes.

    `model`, `images`, `parts`: for CLIPScore, an encoder as of `vlm.ready.open_model`, the folder of the pictures.
    """
    if (model is None) != (images is None):
        raise ValueError("--model and --images belong together: CLIPScore looks at the pictures with the model")
    given = read_references(references)
    said = read_results(results, given, partial)
    wanted = [given.captions[number] for number in said]
    scores = score_captions(list(said.values()), wanted, None if corpus is None else _fixed(corpus), java=java)
    found: dict[str, Any] = {"captions": dict(scores.metrics)}
    if model is not None and images is not None:
        found["captions"] |= _clip(model, images, parts, given, said)
    found |= {
        "coco": scores.coco,
        "statistics": {"captions": scores.statistics, "references": scores.references},
        "counts": {"images": len(said), "references": sum(map(len, wanted)), "of": len(given.captions)},
        "notes": scores.notes,
    }
    if json:
        print(dumps(found, indent=1))
        return
    print(as_table(scores))
    for name in ("clipscore", "refclipscore"):
        if name in found["captions"]:
            print(f"{name}  {found['captions'][name]:.4f}")
    counts = found["counts"]
    print(f"{_part(counts['images'], counts['of'])} captions, {counts['references']} references")
    for note in scores.notes:
        print(note, file=sys.stderr)


def score_vqa(results: Path, references: Path, json: bool = False, partial: bool = False) -> None:
    """Prints the scores of answers."""
    questions = read_questions(references)
    said = read_answers(results, questions, partial)
    asked = [question for question in questions if question.id in said]
    scores = score_answers(list(said.values()), asked)
    if json:
        counts = {"questions": len(asked), "of": len(questions)}
        found = {"answers": scores.metrics, "by_kind": scores.by_kind, "counts": counts, "notes": scores.notes}
        print(dumps(found, indent=1))
        return
    for name, title in TITLES.items():
        kinds = "".join(f"   {kind} {_percent(means[name])}" for kind, means in scores.by_kind.items())
        print(f"{title:>12}  {_percent(scores.metrics[name]):>6} %{kinds}")
    print(f"{_part(len(asked), len(questions))} answers")
    for note in scores.notes:
        print(note, file=sys.stderr)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _part(count: int, of: int) -> str:
    return str(count) if count == of else f"{count} of {of}"


def _fixed(corpus: Path) -> Frequencies:
    return frequencies(tokenize_groups(list(read_references(corpus).captions.values())))


def _clip(
    model: str, images: Path, parts: Mapping[str, str] | None, references: References, said: Mapping[Id, str]
) -> dict[str, float]:
    from vlm.data.image import BadSample
    from vlm.data.pictures import Folder
    from vlm.eval.clipscore import clip_scores
    from vlm.nn.backend import best_device
    from vlm.ready import open_model

    unnamed = [number for number in said if number not in references.files]
    if unnamed:
        raise ValueError(f"{references.name}: image {unnamed[0]} has no file_name, which CLIPScore needs")
    folder = Folder(images)

    def pictures() -> Iterator[tuple[str, bytes]]:
        for name in (references.files[number] for number in said):
            try:
                yield name, folder.read(name)
            except BadSample as bad:
                raise ValueError(f"--images {images}: {bad}") from None

    ready = open_model(model, best_device(), parts)
    found = clip_scores(ready, pictures(), list(said.values()), [references.captions[number] for number in said])
    return {"clipscore": found.clip.mean().item(), "refclipscore": found.reference.mean().item()}
