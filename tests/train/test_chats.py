"""Runs on conversations: they learn from both pictures, go on where they stopped, and say what is wrong beforehand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import COLOURS, ITC, LANGUAGE, LM, QFORMER, VISION, Made, picture, read, records, write_config
from vlm import build_data
from vlm.captioning.run import caption
from vlm.captioning.wishes import Words, Work
from vlm.config.load import ConfigError
from vlm.config.schema import Run
from vlm.data.batch import Batch
from vlm.data.image import decode
from vlm.data.talk import Talk, ask
from vlm.data.talk_batch import collate_talks
from vlm.data.write import Recipe, write
from vlm.eval.doctor import check
from vlm.eval.preview import preview
from vlm.model.describe import answer
from vlm.model.generate import Sampling
from vlm.restore import READER, restore
from vlm.train.overfit import overfit
from vlm.train.run import train, train_run


def talks(folder: Path, count: int = 16) -> Path:
    """Two coloured squares each; every fourth shows none. The second answer is the colour of the second picture."""
    folder.mkdir()
    found = []
    for i in range(count):
        first, second = COLOURS[i % 8], COLOURS[(i * 5 + 3) % 8]
        if i % 4 == 3:
            said = ["who?", "me", "why?", "so"]
            shown: list[str] = []
        else:
            said = ["<image>\nwhat?", first, "and <image>?", second]
            shown = [f"{i}a.png", f"{i}b.png"]
            for name, colour in zip(shown, (first, second), strict=True):
                (folder / name).write_bytes(picture(colour))
        turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, said, strict=True)]
        found.append({"id": str(i), "image": shown, "conversations": turns})
    (folder / "talks.json").write_text(json.dumps(found))
    return folder / "talks.json"


def settings(source: Path, connector: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    return {
        "model": {"vision": VISION, "connector": connector or {"kind": "mlp"}, "language": LANGUAGE},
        "tokenizer": {"kind": "bpe", "vocab": 280},
        "data": {"kind": "chats", "train": str(source), "template": "vicuna_v1", "system": "", **data},
        "losses": [LM],
        "train": {
            "steps": 4,
            "batch_size": 4,
            "log_every": 1,
            "precision": "float32",
            "params": [{"match": ".*", "lr": 3e-3}],
        },
    }


def run(folder: Path, *overrides: str, connector: dict[str, Any] | None = None, **data: Any) -> Run:
    source = folder / "data/talks.json"
    if not source.exists():
        talks(folder / "data")
    return read(write_config(folder / "run.yaml", settings(source, connector, **data)), *overrides)


SHORT = "{start: '', system: '', user: '{image}{text}', answer: ' {text}', interleaved: true}"


@pytest.mark.slow
def test_it_learns_from_both_pictures(tmp_path: Path) -> None:
    more = {"steps": 300, "eval_every": 300, "log_every": 100, "batch_size": 8, "params.0.lr": 5e-3}
    overrides = [f"train.{name}={value}" for name, value in more.items()]
    data = [f"data.template={SHORT}", f"data.val={tmp_path / 'data/talks.json'}", "data.cache_mb=10"]
    train_run(run(tmp_path, *overrides, *data, "tokenizer.vocab=400"), tmp_path / "out")
    (found,) = (line for line in records(tmp_path / "out") if "val/loss_lm" in line)
    assert found["val/loss_lm"] < 0.3 and found["val/vision_gap"] > 0.3
    trained = restore(tmp_path / "out")
    form = build_data.talk_form(trained.run, trained.tokenizer, trained.model.image_tokens)
    assert form is not None
    source = build_data.shards(trained.run.pictures, trained.run.pictures.train)
    asked, images = [], []
    for index in (0, 1, 3, 4):
        raw = source.raw(index)
        assert raw.talk is not None
        asked.append(Talk(raw.talk.turns[:-1]))
        images += [trained.model.vision.transform(decode(image)) for image in raw.images]
    said = answer(trained.model, form, asked, torch.stack(images), Sampling(8))
    assert said == ["yellow", "red", "so", "cyan"]  # colours of the second pictures


@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_and_resumed_is_the_same(tmp_path: Path, workers: int) -> None:
    whole = run(tmp_path, "train.save_every=2")
    train_run(whole, tmp_path / "whole")
    train_run(whole.model_copy(update={"train": whole.train.model_copy(update={"steps": 4})}), tmp_path / "part")
    for kept in (tmp_path / "part").glob("step-*4"):
        for file in kept.iterdir():
            file.unlink()
        kept.rmdir()
    data = whole.data.model_copy(update={"workers": workers})
    train_run(whole.model_copy(update={"data": data}), tmp_path / "part", resume=True)
    one, other = (restore(tmp_path / name).model.state_dict() for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_instruction_goes_to_the_qformer(tmp_path: Path) -> None:
    """As InstructBLIP: its tokenizer is kept with the run, and what it reads changes what is answered."""
    given = run(tmp_path, "train.steps=3", connector=QFORMER, template="instructblip", instruction={"max_tokens": 4})
    train_run(given, tmp_path / "out")
    assert (tmp_path / "out" / READER).is_file()
    trained = restore(tmp_path / "out")
    assert trained.reads is not None and trained.model.connector.text.max_tokens == 4
    form = build_data.talk_form(trained.run, trained.tokenizer, trained.model.image_tokens, reads=trained.reads)
    assert form is not None
    loader = build_data.training_loader(
        trained.run,
        build_data.shards(trained.run.pictures, trained.run.pictures.train),
        trained.model.vision.transform,
        trained.tokenizer,
        trained.model.image_tokens,
    )
    batch = next(loader.train(range(1)))
    assert batch.instructions is not None and batch.shown is not None
    assert batch.instructions.ids.shape[1] <= 4 and len(batch.instructions.ids) == len(batch.shown)
    looked = [trained.model.see(batch.to("cpu").pixels, text).soft for text in (None, batch.instructions)]
    assert (looked[0] - looked[1]).abs().max() > 1e-4
    written = [trained.model.see(batch.to("cpu").pixels, text).soft for text in [batch.instructions] * 2]
    assert torch.equal(*written)


def test_a_question_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_run(run(tmp_path, "train.steps=2"), tmp_path / "out")
    photo = str(tmp_path / "data/0a.png")
    capsys.readouterr()
    said = []
    for question in ("what?", "who is in this picture?", None):
        caption(str(tmp_path / "out"), [photo], Words(ask=question, max_new=6), Work(format="jsonl"))
        said.append(json.loads(capsys.readouterr().out)["caption"])
    trained = restore(tmp_path / "out")
    form = build_data.talk_form(trained.run, trained.tokenizer, trained.model.image_tokens)
    image = trained.model.vision.transform(decode(Path(photo).read_bytes()))[None]
    questions = [ask("what?"), ask("who is in this picture?"), ask("")]
    assert form is not None
    assert said == [answer(trained.model, form, [talk], image, Sampling(6))[0] for talk in questions]


@pytest.mark.parametrize("kind", ["mlp", "qformer"])
def test_no_picture_leaves_no_part_out(tmp_path: Path, kind: str) -> None:
    """A batch of text alone: its loss is that of the text, and the parts that look have gradients of zero."""
    reads: dict[str, Any] = {} if kind == "mlp" else {"connector": QFORMER, "instruction": {"max_tokens": 6}}
    made = Made(run(tmp_path, **reads))
    form = build_data.talk_form(made.run, made.tokenizer, made.model.image_tokens)
    assert form is not None
    raws = [made.shards.raw(index) for index in (3, 7)]
    batch = collate_talks([form.sample(raw, made.model.vision.transform.read) for raw in raws], form, (32, 32))
    batch = replace(batch, images=made.model.vision.transform.normalize(batch.images))
    assert batch.prompts is not None
    loss = made.task(batch).total
    assert torch.equal(loss, made.task(Batch.of_text(batch.prompts)).total)
    loss.backward()
    others = ("position", "head") if kind == "qformer" else ()  # what a Q-Former that writes has
    for name, weight in [*made.model.vision.named_parameters(), *made.model.connector.named_parameters()]:
        if not name.startswith(tuple(f"text.{other}" for other in others)):
            assert weight.grad is not None and not weight.grad.any(), name


def test_verbs_look_at_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    run(tmp_path, connector=QFORMER, template="instructblip", instruction={"max_tokens": 6})
    write([str(tmp_path / "data/talks.json")], tmp_path / "shards", Recipe())
    preview([str(tmp_path / "shards")], config, tmp_path / "sheet.png", count=4, texts=2)
    shown = capsys.readouterr().out
    assert shown.count("<image> x 2") == 4 and "  beside picture 2: <bos> " in shown
    assert sum(line.endswith("  yes") for line in shown.splitlines()) >= 4
    assert check([str(tmp_path / "shards")], config, json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 16 and report["unusable"] == 0 and "caption cut" not in report["notes"]
    assert not check([str(tmp_path / "shards")], config, max_tokens=4)
    assert "no room for an answer" in capsys.readouterr().out
    assert check([str(tmp_path / "shards")], talks=True, json=True)


def test_overfit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    assert overfit(tmp_path / "run.yaml", ["train.steps=60"], tmp_path / "out", 4)
    assert "below half of chance" in capsys.readouterr().out


def test_every_mistake_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError) as caught:
        train(
            tmp_path / "run.yaml",
            ["model.language=null", "data.instruction={}", f"losses=[{json.dumps(ITC)}]"],
            tmp_path / "out",
        )
    for part in (
        "losses: itc is for data.kind=pairs",
        "model.language: not set, and it is what learns from data.kind=chats",
        "data.instruction: only model.connector.kind=qformer with text=true reads one",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'vicuna_v1'"):
        train(tmp_path / "run.yaml", ["data.template=vicuna"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"answer: \{text\} must be its end"):
        train(tmp_path / "run.yaml", ["data.template={user: '{text}', answer: 'x'}"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"data\.kind=chats: this run has conversations"):
        _ = read(tmp_path / "run.yaml").pairs
