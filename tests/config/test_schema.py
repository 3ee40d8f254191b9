"""The settings of a run: which parts the losses need, all that does not fit at once, each on its own line."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import LANGUAGE, QFORMER, TEXT, settings, write_config
from vlm.config.load import ConfigError, dump, load
from vlm.config.pictures import MixedSource
from vlm.config.schema import Run

SILENT = {**QFORMER, "text": False}


def config(folder: Path, kind: str = "qformer", **sections: Any) -> Path:
    given = settings(kind, Path("squares.tar"))
    for name, values in sections.items():
        given[name] = values if isinstance(values, list) else given[name] | values
    return write_config(folder / "run.yaml", given)


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Run, path, overrides)
    assert str(caught.value).splitlines() == caught.value.problems
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


NEEDS_TEXT = "losses: itc needs model.text, or model.connector.kind=qformer with text=true"
ITM_QFORMER = "losses: itm needs model.connector.kind=qformer with text=true"
ITM_ITC = "losses: itm draws its hard negatives by itc, which is not among the losses"
LM_READS = "losses: lm needs model.language, or model.connector.kind=qformer with text=true"


@pytest.mark.parametrize(
    ("model", "losses", "expected"),
    [
        ({"connector": {"kind": "mean"}}, ["itc"], [NEEDS_TEXT]),
        ({"connector": SILENT}, ["itc", "itm", "lm"], [NEEDS_TEXT, ITM_QFORMER, LM_READS]),
        ({"connector": {"kind": "mlp"}, "text": TEXT}, ["itm"], [ITM_QFORMER, ITM_ITC]),
        ({"connector": QFORMER}, ["itm"], [ITM_ITC]),
        (
            {"connector": QFORMER},
            ["itc", "lm", "itc", "lm"],
            [f"losses: {k} stands there twice" for k in ("itc", "lm")],
        ),
        (
            {"connector": {"kind": "first"}, "text": TEXT, "language": LANGUAGE},
            ["itc"],
            ["model.connector: a pooled image is for itc; a language model reads linear, mlp or qformer"],
        ),
    ],
)
def test_losses_need_their_parts(tmp_path: Path, model: Any, losses: list[str], expected: list[str]) -> None:
    path = config(tmp_path, model=model, losses=[{"kind": kind} for kind in losses])
    assert mistakes(path) == expected


@pytest.mark.parametrize(
    ("model", "losses"),
    [
        ({"connector": {"kind": "mean"}, "text": TEXT}, ["itc"]),
        ({"connector": QFORMER}, ["itc", "itm", "lm"]),
        ({"connector": SILENT, "language": LANGUAGE, "text": TEXT}, ["itc", "lm"]),
    ],
)
def test_what_fits_passes(tmp_path: Path, model: Any, losses: list[str]) -> None:
    run = load(Run, config(tmp_path, model=model, losses=[{"kind": kind} for kind in losses]))
    assert [loss.kind for loss in run.losses] == losses


def test_all_misfits_at_once(tmp_path: Path) -> None:
    path = config(tmp_path, "clip", losses=[{"kind": "itm"}, {"kind": "lm"}])
    assert mistakes(path, "train.warmup=9", "train.steps=9", "model.vision.dtype=bfloat16") == [
        ITM_QFORMER,
        ITM_ITC,
        LM_READS,
        "train.warmup: 9 is not below train.steps=9",
        "model.vision.dtype: only for a frozen encoder; a trained one follows train.precision",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.params.0.lr=-1", "train.params.0.lr: must be more than 0, got -1"),
        ("train.params.0.lr=.inf", "train.params.0.lr: expected a finite number, got inf"),
        ("train.params=[]", "train.params: must have at least 1 items, got 0"),
        ("train.betas=[0.9, 1.0]", "train.betas.1: must be less than 1, got 1.0"),
        ("train.ema=1", "train.ema: must be less than 1, got 1"),
        ("train.clip=0", "train.clip: must be more than 0, got 0"),
        ("train.steps=0", "train.steps: must be more than 0, got 0"),
        ("train.batch_size=4.5", "train.batch_size: expected a whole number, got 4.5"),
        ("train.final_lr=1.5", "train.final_lr: must be at most 1, got 1.5"),
        ("train.precision=fp16", "train.precision: expected 'auto', 'float32' or 'bfloat16', got 'fp16'"),
        ("train.report_to=[wandb]", "train.report_to.0: expected 'tensorboard', got 'wandb'"),
        ("model.connector.dropout=1", "model.connector.dropout: must be less than 1, got 1"),
        ("model.temperature=0", "model.temperature: must be more than 0, got 0"),
        ("data.workers=-1", "data.workers: must be at least 0, got -1"),
        ("data.max_bad_fraction=2", "data.max_bad_fraction: must be at most 1, got 2"),
        ("data.augment.hue=0.7", "data.augment.hue: must be at most 0.5, got 0.7"),
        ("data.shuffle_window=0", "data.shuffle_window: must be more than 0, got 0"),
        ("losses.0.weight=0", "losses.0.weight: must be more than 0, got 0"),
        ("losses=[]", "losses: must have at least 1 items, got 0"),
        ("model.vision.kind=clip", "model.vision.kind: no kind 'clip' (did you mean 'open_clip'?); there are"),
        ("model.init.visoin=runs/a", "model.init.visoin: expected 'vision', 'connector', 'text', "),
    ],
)  # fmt: skip
def test_ranges_and_choices(tmp_path: Path, override: str, expected: str) -> None:
    (found,) = mistakes(config(tmp_path), override)
    assert found.startswith(expected)


def test_mistakes_of_every_section_at_once(tmp_path: Path) -> None:
    overrides = ("model.connector.quries=8", "train.stps=5", "data.workers=many", "tokenizer.kind=word")
    assert mistakes(config(tmp_path), *overrides) == [
        "model.connector.quries: no such setting (did you mean 'queries'?)",
        "tokenizer.kind: no kind 'word'; there are: file, published, clip, bpe",
        "data.workers: expected a whole number, got 'many'",
        "train.stps: no such setting (did you mean 'steps'?)",
    ]


def test_models_of_transformers(tmp_path: Path) -> None:
    language = "model.language={kind: huggingface, name: gpt2}"
    found = mistakes(config(tmp_path), language, "train.activation_checkpointing=true")
    assert found == ["train.activation_checkpointing: model.language.kind=huggingface has no means for it"]
    (missing,) = mistakes(config(tmp_path), "model.language={kind: huggingface}")
    assert missing.startswith("model.language.name: ")


def test_dump_reads_back(tmp_path: Path) -> None:
    run = load(Run, config(tmp_path), ["data.augment.scale=[0.5, 1]", "train.params=[{match: '.*', lr: 1e-4}]"])
    (tmp_path / "again.yaml").write_text(dump(run), encoding="utf-8")
    assert load(Run, tmp_path / "again.yaml") == run


def test_mixture(tmp_path: Path) -> None:
    sources = "data.train=[{source: a}, {source: [b.tar, c.tar], weight: 2, caption: json:said, id: picture}]"
    run = load(Run, config(tmp_path), [sources, "data.train.0.weight=0.5"])
    first, second = run.pairs.train
    assert isinstance(first, MixedSource) and isinstance(second, MixedSource)
    assert (first.source, first.weight, first.caption) == ("a", 0.5, None)
    assert (second.source, second.weight, second.caption, second.id) == (["b.tar", "c.tar"], 2, "json:said", "picture")
    (tmp_path / "again.yaml").write_text(dump(run), encoding="utf-8")
    assert load(Run, tmp_path / "again.yaml") == run


def test_mistakes_in_a_mixture_at_once(tmp_path: Path) -> None:
    sources = "[{source: a, weight: 0}, {weight: 2, captoin: txt}, b, {source: 7, zzz: 1}]"
    assert mistakes(config(tmp_path), f"data.train={sources}", "train.steps=0") == [
        "data.train.0.weight: must be more than 0, got 0",
        "data.train.1.source: not set, and it has no default",
        "data.train.1.captoin: no such setting (did you mean 'caption'?)",
        "data.train.2: expected a mapping, got 'b'",
        "data.train.3.source: expected text, got 7; or expected a list, got 7",
        "data.train.3.zzz: no such setting; there are: source, weight, images, image, caption, id",
        "train.steps: must be more than 0, got 0",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=7", ["data.train: expected text, got 7; or expected a list, got 7"]),
        (
            "data.train={source: a}",
            ["data.train: expected text, got a mapping; or expected a list, got a mapping"],
        ),
        (
            "data.val=[{source: a}]",
            ["data.val: expected text, got a list", "data.val.0: expected text, got a mapping"],
        ),
    ],
)
def test_what_is_no_mixture(tmp_path: Path, override: str, expected: list[str]) -> None:
    assert mistakes(config(tmp_path), override) == expected
