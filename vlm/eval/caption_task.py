"""Captions of a data set by a model that writes: scores, what chance gives, whether it looks at the pictures."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vlm import build_data
from vlm.captions import usual_decoding
from vlm.captions import written as write
from vlm.config import schema
from vlm.data.image import BadSample, decode
from vlm.data.pictures import Pictures
from vlm.eval.caption import same
from vlm.eval.caption_scores import BEST, COCO, TITLES, CaptionScores, score_captions
from vlm.eval.cider import Frequencies
from vlm.eval.data import EvaluationData
from vlm.eval.gallery import small
from vlm.eval.outcome import Outcome
from vlm.eval.report import Card, Gallery, Score, Section, Table
from vlm.model.generate import Decoding
from vlm.model.vlm import need
from vlm.nn.backend import fast_float32
from vlm.restore import Ready
from vlm.train.parallel import Passes
from vlm.train.task import Lm, Task
from vlm.train.validate import GAP, derangement, validate

SHOWN = 12  # pictures of each gallery


@dataclass(frozen=True)
class Written:
    """What the model wrote about each picture, what people wrote, and which sample shows it."""

    ids: list[str]
    captions: list[str]
    cut: list[bool]  # ended only because they were as long as they may be
    references: list[list[str]]
    places: list[int]
    bad: Mapping[str, int]

    def add(self, ready: Ready, images: Sequence[Tensor], decoding: Decoding, generator: torch.Generator) -> None:
        """What the model writes about the next pictures."""
        batch = torch.stack(list(images)).to(generator.device)
        best = [row[0] for row in write(ready, batch, decoding, generator)]
        self.captions.extend(one.text for one in best)
        self.cut.extend(one.finish == "length" for one in best)


def captions(
    ready: Ready,
    data: EvaluationData,
    decoding: Decoding | None = None,
    seed: int = 0,
    fixed: Frequencies | None = None,
    gap: bool = True,
    java: bool = True,
) -> Outcome:
    """Captions each picture of a data set once and compares with all its captions.

    `decoding`: `usual_decoding` unless given; `seed`:
    of its draws. `fixed`, `java`: as of `score_captions`. `gap`: the vision gap too, some passes over the data.
    ValueError: a model that does not write, data of classes, features in place of pictures, no usable sample, a loss
    that is not finite.
    """
    if not ready.writes:
        raise ValueError(f"{ready.name} was trained without lm, so it cannot write captions")
    if data.labels is not None:
        remedy = "name --task classification"
        raise ValueError(f"--task captions: {data.source.files[0]} has classes in place of captions: {remedy}")
    source = data.source
    decoding = usual_decoding(ready) if decoding is None else decoding
    written = _written(ready, source, decoding, seed)
    scores = score_captions(written.captions, written.references, fixed, written.cut, java=java)
    metrics = {**scores.metrics, "exact": sum(_exact(written)) / len(written.ids), **scores.statistics}
    chance = _chance(written, fixed)
    if gap:
        metrics |= _gap(ready, data)
    return Outcome(
        metrics=metrics,
        chance=chance,
        counts={
            "images": len(written.ids),
            "references": sum(map(len, written.references)),
            "unusable": dict(source.bad + Counter(written.bad)),
        },
        protocol={
            "decoding": repr(decoding),
            "seed": seed,
            "tokenizer": "PTB, as COCO's code",
            "cider_d": "of 10, document frequencies of " + ("these references" if fixed is None else "a fixed set"),
            "chance": "the same captions, each beside another picture's references",
            "notes": scores.notes,
        },
        values={
            f"captions/{name}": torch.tensor(values, dtype=torch.float64)
            for name, values in {**scores.each, "exact": _exact(written)}.items()
            if not name.startswith("bleu")
        },
        groups={f"captions/{name}": written.ids for name in [*scores.each, "exact"] if not name.startswith("bleu")},
        sections=_sections(source, written, scores, chance),
    )


def _written(ready: Ready, source: Pictures, decoding: Decoding, seed: int) -> Written:
    """One caption a picture; further records of a picture add their captions to its references."""
    transform = need(ready.model.vision, "image encoder").transform
    known: dict[str, int] = {}
    found = Written([], [], [], [], [], Counter())
    generator = torch.Generator(next(ready.model.parameters()).device).manual_seed(seed)
    waiting: list[Tensor] = []
    for place in _progress(len(source)):
        try:
            raw = source.raw(place)
            if raw.id in known:
                found.references[known[raw.id]].extend(raw.captions)
                continue
            waiting.append(transform(decode(raw.image)))
        except BadSample as bad:
            found.bad[bad.reason] += 1  # type: ignore[index]  # a Counter while it is filled
            continue
        known[raw.id] = len(found.ids)
        found.ids.append(raw.id)
        found.references.append(list(raw.captions))
        found.places.append(place)
        if len(waiting) == ready.batch_size:
            found.add(ready, waiting, decoding, generator)
            waiting.clear()
    if waiting:
        found.add(ready, waiting, decoding, generator)
    if not found.ids:
        raise ValueError(f"{source.files[0]}: no sample is usable: {dict(found.bad)}")
    return found


def _progress(total: int) -> Iterator[int]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(range(total), description="captions")


def _exact(written: Written) -> list[float]:
    """100 for each caption that is a reference word for word."""
    pairs = zip(written.captions, written.references, strict=True)
    return [100.0 * any(same(text, other) for other in group) for text, group in pairs]


def _chance(written: Written, fixed: Frequencies | None) -> dict[str, float | None]:
    """The scores of the captions beside the references of other pictures. Nothing for one picture."""
    if len(written.ids) < 2:
        return dict.fromkeys(COCO)
    order = derangement(len(written.ids), 0)
    found = score_captions([written.captions[i] for i in order], written.references, fixed, java=False)
    return dict(found.metrics)


def _gap(ready: Ready, data: EvaluationData) -> dict[str, float]:
    """The loss of the true captions, and how much more a token of them costs with another picture."""
    model, tokenizer = ready.model, ready.tokenizer
    talks = None
    if isinstance(ready.data, schema.ChatData):
        form, words, _ = ready.form(None)
        talks = replace(form, questions=(words,))
    loader = build_data.evaluation_loader(
        data.settings if talks is None else ready.data,
        data.source,
        need(model.vision, "image encoder").transform,
        tokenizer,
        ready.batch_size,
        model.image_tokens,
        model.reply_start,
        talks,
    )
    task = Task(model, [Lm(tokenizer.size, tokenizer.dec)])
    with fast_float32():
        found = validate(Passes(task, torch.float32), loader.once)
    for name, value in found.items():
        if not math.isfinite(value):
            raise ValueError(f"{ready.name} gives {name} = {value}, which is not finite: its captions mean nothing")
    return {"lm_loss": found["val/loss_lm"]} | ({"vision_gap": found[GAP]} if GAP in found else {})


def _sections(
    source: Pictures, written: Written, scores: CaptionScores, chance: Mapping[str, float | None]
) -> list[Section]:
    rows: list[list[str | Score]] = []
    for name, value in scores.metrics.items():
        if value is not None:
            best, low = BEST.get(name, 1.0), chance[name]
            bar = Score(value, low, best, unit="", digits=3)
            rows.append([TITLES[name], "–" if low is None else f"{low:.3f}", bar])
    note = "Chance: the same captions, each beside the references of another picture. " + " ".join(scores.notes)
    table = Table("Captions", ["", "Chance", "Captions"], rows, note)
    by = "cider_d" if any(scores.each["cider_d"]) else "rouge_l"
    order = sorted(range(len(written.ids)), key=lambda i: scores.each[by][i])
    every = max(1, len(order) // SHOWN)
    shown = {
        "Captions beside references": list(range(len(order)))[::every][:SHOWN],
        f"Best captions by {TITLES[by]}": order[::-1][:SHOWN],
        f"Worst captions by {TITLES[by]}": order[:SHOWN],
    }
    return [table, *(Gallery(title, _cards(source, written, numbers)) for title, numbers in shown.items())]


def _cards(source: Pictures, written: Written, numbers: Sequence[int]) -> list[Card]:
    return [
        Card(small(source.raw(written.places[i]).image), written.captions[i], " | ".join(written.references[i]))
        for i in numbers
    ]
