"""Zero-shot classification: each class is the mean of its prompts' vectors, and a picture belongs to the nearest.

As in CLIP (Radford et al. 2021, section 3.1.4) and CLIP_benchmark: the unit vectors of a class's prompts are averaged
and made a unit vector again. Ties count against the model: see `vlm.eval.retrieval`.

Letters: N images, Q vectors per image, E their width, C classes.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vlm.data.batch import pad
from vlm.data.text import Tokenizer, encode_caption
from vlm.eval.benchmark import CLASSES, LABEL, TEMPLATES
from vlm.eval.data import EvaluationData
from vlm.eval.features import Features, extract
from vlm.eval.outcome import Outcome
from vlm.eval.prompts import TEMPLATE, Classes, describe, read_names, read_templates
from vlm.eval.zeroshot_sections import Classified, cards, sections
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.backend import fast_float32
from vlm.restore import Ready

PROMPTS = 256  # encoded together
TASK = "zeroshot"

log = logging.getLogger(__name__)


@torch.no_grad()
def classifier(
    model: VisionLanguageModel, tokenizer: Tokenizer, classes: Classes, max_tokens: int
) -> Float[Tensor, "C E"]:
    """A unit vector for each class. ValueError: one that is not finite."""
    device = next(model.parameters()).device
    flat = ((number, text) for number, texts in enumerate(classes.prompts) for text in texts)
    sums: Tensor | None = None
    while part := list(islice(flat, PROMPTS)):
        text = pad([encode_caption(tokenizer, text, max_tokens) for _, text in part], tokenizer.pad).to(device)
        with fast_float32():
            vectors = normalize(model.embed_text(text).float(), dim=-1)
        counts = torch.tensor([1 / len(classes.prompts[number]) for number, _ in part], device=device)
        sums = vectors.new_zeros(len(classes.names), vectors.shape[1]) if sums is None else sums
        sums.index_add_(0, torch.tensor([number for number, _ in part], device=device), vectors * counts[:, None])
    assert sums is not None, "classes have prompts"
    if bad := (~sums.isfinite().all(1)).nonzero().flatten().tolist():
        raise ValueError(f"the model gives a text vector that is not finite for class {classes.names[bad[0]]!r}")
    return normalize(sums, dim=-1)


def classify_images(
    image: Float[Tensor, "N Q E"], classes: Float[Tensor, "C E"], label: Int[Tensor, "N"], chunk: int = 1024
) -> Classified:
    """Ranks of the true classes, by the best of an image's vectors; `chunk` bounds the vectors scored at once."""
    norms = float(image.norm(dim=-1).max()) * float(classes.norm(dim=-1).max())
    slack = norms * torch.finfo(classes.dtype).eps / 2 * max(16.0, math.sqrt(classes.shape[1]))
    rows, found = max(1, chunk // image.shape[1]), []
    for vectors, true in zip(image.split(rows), label.split(rows), strict=True):
        scores = (vectors.flatten(0, 1) @ classes.T).unflatten(0, vectors.shape[:2]).amax(1)
        own = scores.gather(1, true[:, None])
        others = scores.scatter(1, true[:, None], -torch.inf)
        best, other = others.max(1)
        rank = 1 + (others >= own - slack).sum(1)
        found.append((rank, torch.where(rank == 1, true, other), own[:, 0] - best))
    return Classified(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def summarize(found: Classified, label: Int[Tensor, "N"], names: Sequence[str]) -> dict[str, Any]:
    """Top-1, top-5 (None below five classes), mean recall of the classes that occur, all in percent; and each class."""
    first = found.rank == 1
    count = torch.bincount(label, minlength=len(names))
    right = torch.bincount(label[first], minlength=len(names))
    there = count.nonzero().flatten()
    return {
        "top1": _percent(first),
        "top5": _percent(found.rank <= 5) if len(names) >= 5 else None,
        "mean_per_class_recall": float(100 * (right[there].double() / count[there]).mean()),
        "per_class": [
            {
                "class": name,
                "images": int(count[number]),
                "top1": 100 * int(right[number]) / int(count[number]) if count[number] else None,
                "often_taken_for": _mistake(found.taken_for[(label == number) & ~first], names),
            }
            for number, name in enumerate(names)
        ],
    }


def chance(label: Int[Tensor, "N"], classes: int) -> dict[str, float | None]:
    """What guessing gives, and what always naming the most frequent class does."""
    uniform = 100 / classes
    return {
        "top1": uniform,
        "top5": 5 * uniform if classes >= 5 else None,
        "mean_per_class_recall": uniform,
        "most_frequent_class": 100 * int(torch.bincount(label).max()) / len(label),
    }


def classify(
    ready: Ready,
    data: EvaluationData,
    classes: str | None = None,
    templates: str | None = None,
    folder: Path | None = None,
) -> Outcome:
    """Zero-shot classification of a folder of CLIP_benchmark's, or of any source opened with labels (json:group, cls).

    `classes`, `templates`: files, see `read_names` and `read_templates`; else those of the benchmark; else the classes
    are the labels that occur, and the template is TEMPLATE. `folder`: as of `extract`, whose errors it raises.
    ValueError: no contrastive head, unknown classes, labels that name none of them.
    """
    if ready.model.contrast is None:
        raise ValueError(f"{ready.name} was trained without itc, so it cannot compare images and texts")
    place = data.source.files[0] if data.benchmark is None else data.benchmark.folder
    if data.labels is None:
        raise ValueError(f"{place}: which class a picture has is not known: say where it stands (--labels json:FIELD)")
    known = _names(data, classes)
    if data.labels == LABEL and known is None:
        raise ValueError(f"{place}: the classes are numbers: give their names, a line each (--classes FILE)")
    texts = _templates(data, templates)
    if known is not None:
        describe(known, texts)  # told before the work, not after it
    loader = data.loader(ready)
    features = extract(ready.model, loader, keep_tokens=False, folder=folder, texts=False)
    found = _labels(features)
    described = describe(known or sorted(set(found)), texts)
    label = _numbers(found, features.names, described, data.labels == LABEL).to(features.image.device)
    vectors = classifier(ready.model, ready.tokenizer, described, ready.data.max_tokens)
    ranked = classify_images(features.image, vectors, label)
    metrics, floor = summarize(ranked, label, described.names), chance(label, len(described.names))
    return Outcome(
        metrics=metrics,
        chance=floor,
        counts={
            "images": len(label),
            "classes": len(described.names),
            "prompts": sum(map(len, described.prompts)),
            "unusable": dict(data.source.bad + loader.bad),
        },
        protocol=_protocol(ready, data, described, texts),
        values={f"{TASK}/rank": ranked.rank.cpu(), f"{TASK}/margin": ranked.margin.cpu()},
        groups={f"{TASK}/{name}": list(features.names) for name in ("rank", "margin")},
        sections=sections(metrics, floor, cards(data.source, features.places, ranked, label, described.names)),
    )


def _names(data: EvaluationData, given: str | None) -> list[str] | None:
    beside = None if data.benchmark is None else data.benchmark.folder / CLASSES
    if given is None and beside is not None and beside.is_file():
        given = str(beside)
    return None if given is None else read_names(given)


def _templates(data: EvaluationData, given: str | None) -> list[str] | dict[str, list[str]]:
    beside = None if data.benchmark is None else data.benchmark.folder / TEMPLATES
    if given is None and beside is not None and beside.is_file():
        given = str(beside)
    return [TEMPLATE] if given is None else read_templates(given)


def _labels(features: Features) -> Sequence[str]:
    """One of each image. ValueError: several."""
    count = torch.bincount(features.owner, minlength=len(features.names))
    if several := (count != 1).nonzero().flatten().tolist():
        raise ValueError(
            f"picture {features.names[several[0]]!r} has {int(count[several[0]])} classes ({len(several)} pictures "
            "have several): zero-shot classification takes one a picture"
        )
    return features.strings


def _numbers(labels: Sequence[str], images: Sequence[str], classes: Classes, by_number: bool) -> Int[Tensor, "N"]:
    """Of the classes that labels name or count. ValueError: one that is none of them."""
    keys = map(str, range(len(classes.names))) if by_number else classes.names
    number = {key: place for place, key in enumerate(keys)}
    if strange := [place for place, label in enumerate(labels) if label not in number]:
        what = f"a number from 0 to {len(classes.names) - 1}" if by_number else "one of the class names"
        raise ValueError(
            f"picture {images[strange[0]]!r} has class {labels[strange[0]]!r}, which is not {what} "
            f"({len(strange)} of {len(labels)} pictures): compare labels and --classes"
        )
    return torch.tensor([number[label] for label in labels])


def _protocol(
    ready: Ready, data: EvaluationData, classes: Classes, templates: list[str] | dict[str, list[str]]
) -> dict[str, Any]:
    """What decides the figures; warns of what lowers them without being the model's fault."""
    room = ready.data.max_tokens - len(ready.tokenizer.start) - 1
    alike = _alike(ready, classes)
    cut = sum(len(ready.tokenizer.encode(text)) > room for texts in classes.prompts for text in texts)
    if cut:
        total = sum(map(len, classes.prompts))
        log.warning("%d of %d prompts are longer than the model reads (%d tokens): cut", cut, total, room)
    if classes.repeated:
        shown = ", ".join(classes.repeated[:5])
        log.warning("several classes have one name, so none of them is ever right: %s", shown)
    if alike:
        shown = "; ".join(", ".join(map(repr, names)) for names in alike[:5])
        log.warning("several classes are the same tokens to the model, so none of them is ever right: %s", shown)
    return {
        "ties": "count against the model",
        "labels": data.labels,
        "templates": templates if isinstance(templates, list) else "of each class",
        "prompts_cut": cut,
        "repeated_names": classes.repeated,
        "alike_names": alike,
    }


def _alike(ready: Ready, classes: Classes) -> list[list[str]]:
    """Different names whose prompts are the same tokens: to a tokenizer without capitals, or where the name is cut."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, texts in dict(zip(classes.names, classes.prompts, strict=True)).items():
        ids = sorted(encode_caption(ready.tokenizer, text, ready.data.max_tokens).ids for text in texts)
        names[hash(tuple(map(tuple, ids)))].append(name)
    return [group for group in names.values() if len(group) > 1]


def _percent(right: Tensor) -> float:
    return float(100 * right.double().mean())


def _mistake(taken_for: Tensor, names: Sequence[str]) -> str | None:
    return names[int(torch.bincount(taken_for).argmax())] if len(taken_for) else None
