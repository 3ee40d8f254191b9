"""`vlm quickstart`: the whole job on the pictures inside the package, from random weights to an honest report.

Three runs, each an ordinary `vlm train` of a YAML file beside this one: a CLIP-style encoder (ITC), a Q-Former on the
frozen encoder (ITC + ITM + LM, BLIP-2's stage 1), and the Q-Former coupled to a small decoder (LM, stage 2).
"""

import json
import shutil
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from vlm import __version__
from vlm.captions import captions
from vlm.config import schema
from vlm.config.load import load
from vlm.data.image import decode
from vlm.data.shards import Shards
from vlm.eval.caption import exact, identical, mean_words
from vlm.eval.cider import cider_d
from vlm.eval.report import Card, Curves, Gallery, Page, Table, retrieval_tables, write_page
from vlm.eval.run import retrieval
from vlm.model.generate import Sampling
from vlm.model.vlm import need
from vlm.nn.backend import best_device
from vlm.restore import Ready, restore
from vlm.train.log import note, read_metrics
from vlm.train.run import train_run

HERE = Path(str(files("vlm.quickstart")))
TRAIN, TEST = HERE / "data" / "train-0000.tar", HERE / "data" / "test-0000.tar"
STAGES = {
    "1-clip": "train a small image encoder and a text encoder with ITC",
    "2-qformer": "freeze the encoder; train a Q-Former with ITC, ITM and LM (BLIP-2 stage 1)",
    "3-caption": "couple the Q-Former to a small decoder; train both with LM (BLIP-2 stage 2)",
}
LATER = {"1-clip": 1.0, "2-qformer": 0.9, "3-caption": 0.5}  # what follows a stage, as a multiple of it (measured)
SHOWN = 24  # pictures on the page, evenly spaced over the 503, right or wrong


def quickstart(out: Path, overwrite: bool = False, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains, evaluates, captions and reports into `out`; returns what metrics.json holds.

    `overrides` change all stages; those of `model.language` only the one that has it.
    Errors: `out` holds an earlier quickstart and `overwrite` is not set.
    """
    _clear(out, overwrite)
    began = time.perf_counter()
    runs = {name: _settings(name, out, overrides) for name in STAGES}
    seconds = {}
    for number, (name, purpose) in enumerate(STAGES.items(), 1):
        note(f"\n[{number}/5] {purpose}")
        start = time.perf_counter()
        train_run(runs[name], out / name, title=name, later=LATER[name])
        seconds[name] = time.perf_counter() - start
    note("\n[4/5] evaluate on pictures in a drawing style that no run has seen")
    metrics = _evaluate(out)
    note("[5/5] write the report")
    metrics["seconds"] = {"total": time.perf_counter() - began, **seconds}
    metrics["versions"] = {"vlm": __version__, "torch": torch.__version__}
    cards = metrics.pop("cards")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    write_page(out / "report.html", _page(out, metrics, cards))
    _summary(out, metrics)
    return metrics


def _clear(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise ValueError(f"--out: {out} is a file")
    names = [*STAGES, "metrics.json", "report.html"]
    held = [name for name in names if (out / name).exists()]
    if held and not overwrite:
        raise ValueError(
            f"{out} holds an earlier quickstart ({', '.join(held)}): choose another --out, or --overwrite it"
        )
    for name in held:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()


def _settings(name: str, out: Path, overrides: Sequence[str]) -> schema.Run:
    clip, qformer = out / "1-clip", out / "2-qformer"
    vocabulary = f"tokenizer={{kind: file, path: '{clip / 'tokenizer.json'}'}}"
    earlier = {
        "1-clip": [],
        "2-qformer": [vocabulary, f"model.init.vision={clip}"],
        "3-caption": [vocabulary, f"model.init.vision={clip}", f"model.init.connector={qformer}"],
    }
    meant = [text for text in overrides if name == "3-caption" or not text.startswith("model.language")]
    return load(schema.Run, HERE / f"{name}.yaml", [f"data.train={TRAIN}", *earlier[name], *meant])


def _evaluate(out: Path) -> dict[str, Any]:
    device = best_device()
    itc_itm = restore(out / "2-qformer", device)
    found = retrieval(itc_itm, [str(TEST)], caption="json:caption")
    clip = retrieval(restore(out / "1-clip", device), [str(TEST)], caption="json:caption")
    captioner = restore(out / "3-caption", device)
    written, cards = _captions(captioner)
    return {
        "retrieval": {**found["retrieval"], "clip": clip["retrieval"]["itc"]},
        "chance": found["chance"],
        "counts": found["counts"],
        "captions": written,
        "cards": cards,
    }


def _captions(trained: Ready) -> tuple[dict[str, float], list[Card]]:
    source = Shards([str(TEST)], caption="json:captions", id_field="hexcode")
    samples = [source.raw(i) for i in range(len(source))]
    transform = need(trained.model.vision, "image encoder").transform
    pixels = [transform(decode(sample.image)) for sample in samples]
    said = [text for part in torch.stack(pixels).split(128) for text in captions(trained, part, Sampling(max_new=24))]
    names = [str(sample.fields["caption"]) for sample in samples]
    every = max(1, len(samples) // SHOWN)
    cards = [
        Card(sample.image, text, name, exact([text], [name]) == 100)
        for sample, text, name in list(zip(samples, said, names, strict=True))[::every][:SHOWN]
    ]
    measured = {
        "exact_name": exact(said, names),
        "cider_d": cider_d(said, [sample.captions for sample in samples]),
        "identical": identical(said),
        "mean_words": mean_words(said),
        "count": len(said),
    }
    return measured, cards


def _page(out: Path, metrics: dict[str, Any], cards: list[Card]) -> Page:
    names = {"itc": "Q-Former, ITC", "itm": "re-ranked by ITM", "clip": "CLIP-style encoder"}
    measured = {names[key]: metrics["retrieval"][key] for key in ("clip", "itc", "itm")}
    seconds, counts, written = metrics["seconds"], metrics["counts"], metrics["captions"]
    credit = (HERE / "data" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    credits = [" · ".join(part.strip() for part in line.strip("|").split("|")) for line in credit.splitlines()[4:9]]
    return Page(
        title="vlm quickstart",
        intro="An image encoder, a Q-Former and a caption decoder, trained from random weights on 1,509 small pictures "
        "in three drawing styles, and tested on the same concepts in a style that none of them has seen.",
        facts=[
            ("time", f"{seconds['total'] / 60:.1f} min"),
            ("pictures tested", str(counts["images"])),
            ("exact names", f"{written['exact_name']:.1f} %"),
            ("CIDEr-D", f"{written['cider_d']:.2f}"),
        ],
        sections=[
            *retrieval_tables(
                measured, metrics["chance"], f"ITM re-orders the best {counts['rerank_k']} of each query."
            ),
            Gallery(
                "Captions in the unseen style", cards, f"Every {counts['images'] // SHOWN}th picture, as it comes."
            ),
            *(curves(out / name, name) for name in STAGES),
            Table("Time", ["stage", "seconds"], [[name, f"{seconds[name]:.0f}"] for name in STAGES]),
        ],
        credits=credits,
    )


def curves(run: Path, title: str) -> Curves:
    """The training losses of a run's folder, each beside what guessing gives."""
    series: dict[str, list[tuple[float, float]]] = {}
    chance: dict[str, float] = {}
    for record in read_metrics(run):
        for key, value in record.items():
            if key.startswith("train/loss_"):
                series.setdefault(key.removeprefix("train/loss_"), []).append((record["step"], value))
            if key.startswith("chance/loss_"):
                chance[key.removeprefix("chance/loss_")] = value
    return Curves(f"Training losses of {title}", series, chance)


def _summary(out: Path, metrics: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [("", "R@1", "R@5", "R@10")]
    for way, arrow in (("t2i", "text → image"), ("i2t", "image → text")):
        for key, name in (("itc", "ITC"), ("itm", "re-ranked by ITM")):
            values = metrics["retrieval"][key][way]
            rows.append((f"{arrow}, {name}", *(f"{values[k]:.1f}" for k in ("R@1", "R@5", "R@10"))))
        values = metrics["chance"][way]
        rows.append((f"{arrow}, chance", *(f"{values[k]:.1f}" for k in ("R@1", "R@5", "R@10"))))
    width = max(len(row[0]) for row in rows)
    print("\n".join(row[0].ljust(width) + "".join(cell.rjust(8) for cell in row[1:]) for row in rows))
    written = metrics["captions"]
    cider = f"CIDEr-D {written['cider_d']:.2f}"
    print(f"captions: {written['exact_name']:.1f} % exact names, {cider} ({written['count']} pictures)")
    print(f"{metrics['seconds']['total'] / 60:.1f} minutes; open {out / 'report.html'}")
