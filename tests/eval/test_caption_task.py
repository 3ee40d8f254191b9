"""Captions and answers of tiny trained models as tasks of `vlm evaluate`, and CLIPScore with a tiny encoder."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.normalizers import Lowercase

from tests.tiny import COLOURS, LANGUAGE, LM, VISION, picture, read, squares, tiny_run, write_config
from vlm.data.batch import pad
from vlm.data.image import decode
from vlm.data.talk import ask
from vlm.data.text import encode_caption
from vlm.eval.answer_task import answers
from vlm.eval.caption_task import captions
from vlm.eval.choices import likeliest
from vlm.eval.clipscore import PREFIX, clip_scores, harmonic_mean
from vlm.eval.data import open_evaluation_data
from vlm.eval.report import Page, render
from vlm.model.generate import Sampling
from vlm.model.likelihood import likelihood
from vlm.restore import Ready, restore
from vlm.train.run import train_run


def rate(value: float) -> str:
    return f"train.params=[{{match: '.*', lr: {value}}}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A contrastive encoder, a captioner and one that answers, all of eight colours."""
    folder = tmp_path_factory.mktemp("tasks")
    common = ("train.batch_size=16", "train.warmup=10", "data.cache_mb=8")
    train_run(tiny_run(folder, "clip", *common, "train.steps=60", rate(5e-3)), folder / "clip")
    frozen = ("model.vision.frozen=true", f"model.init.vision={folder / 'clip'}", rate(2e-2))
    train_run(tiny_run(folder, "decoder", *common, *frozen, "train.steps=60"), folder / "decoder")
    pictures = folder / "pictures"
    pictures.mkdir()
    talks = []
    for number, colour in enumerate(COLOURS):
        (pictures / f"{number}.png").write_bytes(picture(colour))
        turns = [{"from": "human", "value": "<image>\nwhat colour?"}, {"from": "gpt", "value": colour}]
        talks.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (pictures / "talks.json").write_text(json.dumps(talks))
    settings: dict[str, Any] = {
        "model": {"vision": VISION, "connector": {"kind": "mlp"}, "language": LANGUAGE},
        "tokenizer": {"kind": "bpe", "vocab": 280},
        "data": {"kind": "chats", "train": str(pictures / "talks.json"), "template": "vicuna_v1", "system": ""},
        "losses": [LM],
        "train": {"steps": 80, "batch_size": 8, "precision": "float32", "params": [{"match": ".*", "lr": 1e-2}]},
    }
    run = read(write_config(folder / "chat.yaml", settings), *frozen[:2], rate(2e-2), "train.warmup=10")
    train_run(run, folder / "chat")
    squares(folder / "test.tar", 8, "t")
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Ready:
    return restore(folder / "clip")


@pytest.fixture(scope="module")
def chat(folder: Path) -> Ready:
    return restore(folder / "chat")


def test_captions_of_a_captioner(folder: Path) -> None:
    decoder = restore(folder / "decoder")
    data = open_evaluation_data([str(folder / "test.tar")], decoder.data)
    found = captions(decoder, data, java=False)
    assert found.counts == {"images": 8, "references": 8, "unusable": {}}
    assert found.metrics["exact"] >= 75
    assert found.metrics["meteor"] is None
    assert found.metrics["cider_d"] > 2 * found.chance["cider_d"]
    assert found.metrics["vision_gap"] > 0.1
    assert found.metrics["words"] == {"mean": 3, "min": 3, "max": 3}
    assert found.values["captions/cider_d"].mean().item() == pytest.approx(found.metrics["cider_d"])
    assert set(found.values) == set(found.groups) == {f"captions/{name}" for name in ("rouge_l", "cider_d", "exact")}
    assert found.groups["captions/exact"] == [f"t{number:04d}" for number in range(8)]
    assert json.loads(json.dumps(found.metrics)) == dict(found.metrics)
    page = render(Page("captions", "", [], found.sections))
    assert all(title in page for title in ("CIDEr-D", "Best captions by CIDEr-D", "Worst captions by CIDEr-D"))
    assert "a red square" in page
    assert found.metrics["at_limit"] == 0
    short = captions(decoder, data, decoding=Sampling(2), gap=False, java=False)
    assert short.metrics["at_limit"] == 100


def test_several_records_of_a_picture_are_one_caption(folder: Path) -> None:
    rows = [{"image": f"{number}.png", "caption": f"a {colour} square"} for number, colour in enumerate(COLOURS[:3])]
    table = folder / "pictures" / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "caption": "red, square"}]))
    decoder = restore(folder / "decoder")
    data = open_evaluation_data([str(table)], decoder.data, caption="json:caption")
    found = captions(decoder, data, gap=False, java=False)
    assert (found.counts["images"], found.counts["references"]) == (3, 4)
    assert "vision_gap" not in found.metrics


def test_captions_of_a_model_that_answers(chat: Ready, folder: Path) -> None:
    found = captions(
        chat, open_evaluation_data([str(folder / "test.tar")], chat.data), decoding=Sampling(3), java=False
    )
    assert found.counts["images"] == 8
    assert isinstance(found.metrics["vision_gap"], float)


def test_an_encoder_writes_no_captions(encoder: Ready, folder: Path) -> None:
    with pytest.raises(ValueError, match="was trained without lm, so it cannot write captions"):
        captions(encoder, open_evaluation_data([str(folder / "test.tar")], encoder.data))


def lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pictures" / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_and_choices(chat: Ready, folder: Path) -> None:
    asked = [{"image": f"{i}.png", "question": "what colour?", "answers": [c] * 4} for i, c in enumerate(COLOURS)]
    choices = [
        {"image": f"{i}.png", "question": "what colour?", "choices": list(COLOURS), "answer": c}
        for i, c in enumerate(COLOURS)
    ]
    found = answers(chat, lines(folder, asked + choices), folder / "pictures")
    assert found.counts == {"questions": 16, "open": 8, "choices": 8, "unusable": {}}
    assert found.chance["vqa"] == pytest.approx(100 / 8)
    assert found.metrics["exact"] >= 62.5
    assert found.metrics["choice_sum"] >= 62.5 and found.metrics["choice_mean"] >= 62.5
    assert found.chance["choice_sum"] == 12.5
    assert found.groups["answers/choice_sum"] == [f"{i}.png" for i in range(8)]
    assert found.values["answers/exact"].mean().item() == pytest.approx(found.metrics["exact"])
    assert "what colour? red" in render(Page("answers", "", [], found.sections))


def test_likelihoods_are_those_of_one_answer_at_a_time(chat: Ready) -> None:
    image = chat.model.vision.transform(decode(picture("red")))[None]
    form, words, _ = chat.form("what colour?")
    talks = [ask(words, 1, answer) for answer in ("red", "blue or green", "a")]
    together = likelihood(chat.model, form, talks, image, torch.zeros(3, dtype=torch.long))
    for number, talk in enumerate(talks):
        text = pad([form.prompt(talk).text], form.tokenizer.pad)
        logits = chat.model.logits(chat.model.write(chat.model.see(image), text).hidden).log_softmax(-1)
        labels = text.labels[0, 1:]
        own = [logits[0, at, label] for at, label in enumerate(labels.tolist()) if label >= 0]
        assert together.total[number].item() == pytest.approx(sum(own).item(), abs=1e-4)
        assert together.tokens[number] == len(own)
    assert together.total.argmax() == 0


def test_pictures_of_vqa_are_found_by_number(chat: Ready, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "COCO_val2014_000000000042.jpg").write_bytes(picture("red"))
    given = {"question_id": 420, "image_id": 42}
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps({"questions": [{**given, "question": "what colour?"}]}))
    people = [{"answer": "red", "answer_id": i} for i in range(10)]
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps({"annotations": [{**given, "answers": people, "answer_type": "other"}]}))
    found = answers(chat, questions, tmp_path, annotations)
    assert found.metrics["by_kind"] == {"other": {name: found.metrics[name] for name in ("vqa", "exact", "anls")}}
    assert found.chance["vqa"] == 100


def asking(folder: Path, choices: list[str], answer: int, count: int = 1) -> Path:
    row = {"image": "0.png", "question": "what colour?", "choices": choices, "answer": answer}
    return lines(folder, [row] * count)


def spoilt(ready: Ready, value: float, part: str = "") -> Ready:
    """With all weights of a part, but biases and norms, of this value."""
    model = deepcopy(ready.model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and name.startswith(part):
                weight.fill_(value)
    return replace(ready, model=model)


def test_the_likeliest_is_ahead_of_all_others() -> None:
    assert [likeliest(torch.tensor([-3.0, -1.0, -2.0]), right) for right in range(3)] == [1, 1, 1]
    assert [likeliest(torch.full((3,), -7.0), right) for right in range(3)] == [1, 0, 0]
    near = torch.tensor([-7.0, -7.0]).nextafter(torch.tensor([0.0, -9.0]))  # sums in another order
    assert [likeliest(near, right) for right in range(2)] == [1, 0]
    assert likeliest(torch.tensor([-7.0, -7.001]), 0) == 0
    assert likeliest(torch.tensor([-7.0]), 0) == 0


@pytest.mark.parametrize("right", [0, 3])
def test_a_model_that_finds_all_choices_equal_is_never_right(chat: Ready, folder: Path, right: int) -> None:
    choices = ["a", "b", "c", "d"]
    found = answers(spoilt(chat, 0), asking(folder, choices, right), folder / "pictures")
    assert (found.metrics, found.chance["choice_sum"]) == ({"choice_sum": 0, "choice_mean": 0}, 25)


def test_choices_of_the_same_tokens_are_wrong_and_told(
    chat: Ready, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = type(chat.tokenizer.inner).from_str(chat.tokenizer.inner.to_str())
    inner.normalizer = Lowercase()
    alike = replace(chat, tokenizer=replace(chat.tokenizer, inner=inner))
    found = answers(alike, asking(folder, ["red", "RED", "blue"], 0), folder / "pictures")
    assert (found.metrics["choice_sum"], found.protocol["choices_alike"]) == (0, 1)
    assert "1 questions have a wrong choice of the same tokens as the right one: they count as wrong" in caplog.text
    assert answers(chat, asking(folder, ["red", "RED"], 0), folder / "pictures").protocol["choices_alike"] == 0


def test_choices_that_would_be_cut_are_refused(chat: Ready, folder: Path) -> None:
    short = replace(chat, settings=chat.data.model_copy(update={"max_tokens": 60}))
    asked = asking(folder, ["red " * 60 + "yes", "red " * 60 + "no"], 0)
    wanted = r"question 0: choice 'red red .* has no room in the 60 tokens that .*chat reads \(data.max_tokens\)"
    with pytest.raises(ValueError, match=wanted):
        answers(short, asked, folder / "pictures")
    assert answers(chat, asked, folder / "pictures").counts["choices"] == 1
    with pytest.raises(ValueError, match=r"question 0: no room for an answer"):
        answers(replace(chat, settings=chat.data.model_copy(update={"max_tokens": 6})), asked, folder / "pictures")


def test_likelihoods_that_are_not_finite_are_refused(chat: Ready, folder: Path) -> None:
    wanted = (
        r"question 0: the model gives a likelihood that is not finite \(NaN or infinite\), of 'red' first: no answer"
    )
    with pytest.raises(ValueError, match=wanted):
        answers(spoilt(chat, torch.nan), asking(folder, ["red", "blue"], 0), folder / "pictures")


def test_captions_of_a_model_that_is_not_finite_are_refused(folder: Path) -> None:
    decoder = spoilt(restore(folder / "decoder"), torch.nan)
    data = open_evaluation_data([str(folder / "test.tar")], decoder.data)
    with pytest.raises(ValueError, match="the model gives no numbers"):
        captions(decoder, data, java=False)


@pytest.mark.parametrize(("good", "bad"), [(1, 1), (1, 119)])
def test_few_questions_may_be_unusable(chat: Ready, folder: Path, good: int, bad: int) -> None:
    (folder / "pictures" / "bad.png").write_bytes(b"no picture")
    row = {"question": "what colour?", "choices": ["red", "blue"], "answer": 0}
    asked = lines(folder, [{**row, "image": "0.png"}] * good + [{**row, "image": "bad.png"}] * bad)
    wanted = r"questions.jsonl: {} of {} questions are unusable \(not an image: {}\), more than max_bad_fraction=0.05"
    seen = min(good + bad, 104)  # thirteen batches: told as soon as a hundred were seen
    with pytest.raises(ValueError, match=wanted.format(seen - good, seen, seen - good)):
        answers(chat, asked, folder / "pictures")


def test_unusable_questions_below_the_limit_are_counted(chat: Ready, folder: Path) -> None:
    (folder / "pictures" / "bad.png").write_bytes(b"no picture")
    row = {"question": "what colour?", "choices": ["red", "blue"], "answer": 0}
    asked = lines(folder, [{**row, "image": "0.png"}] * 19 + [{**row, "image": "bad.png"}])
    counts = answers(chat, asked, folder / "pictures").counts
    assert counts == {"questions": 20, "open": 0, "choices": 19, "unusable": {"not an image": 1}}


def test_one_picture_has_a_number(chat: Ready, tmp_path: Path) -> None:
    for name in ("x-7.png", "y-007.PNG"):
        (tmp_path / name).write_bytes(picture("red"))
    (tmp_path / "x-8.png").write_bytes(picture("red"))
    (tmp_path / "q-8.jsonl").write_text("")  # no picture
    asked = tmp_path / "q.jsonl"
    asked.write_text(json.dumps({"image": "8", "question": "what?", "answer": "red"}))
    assert answers(chat, asked, tmp_path).counts["open"] == 1
    asked.write_text(json.dumps({"image": "7", "question": "what?", "answer": "red"}))
    with pytest.raises(ValueError, match=r"question 0: picture 7 may be x-7\.png or y-007\.PNG in .*: leave one of"):
        answers(chat, asked, tmp_path)


def test_answers_of_few_people_have_no_vqa_accuracy(chat: Ready, folder: Path) -> None:
    found = answers(
        chat, lines(folder, [{"image": "0.png", "question": "what?", "answer": "red"}]), folder / "pictures"
    )
    assert found.metrics["vqa"] is None and found.chance["vqa"] is None and found.chance["exact"] == 100
    assert set(found.values) == {"answers/exact", "answers/anls"}
    (note,) = found.protocol["notes"]
    assert note in render(Page("answers", "", [], found.sections))


def test_what_cannot_be_asked(chat: Ready, encoder: Ready, folder: Path) -> None:
    row = {"image": "none.png", "question": "what?", "answers": ["a"]}
    with pytest.raises(ValueError, match=r"question 0: no picture 'none.png' in .*pictures \(--images\)"):
        answers(chat, lines(folder, [row]), folder / "pictures")
    with pytest.raises(ValueError, match=r"was trained on captions \(data.kind=pairs\), not to answer questions"):
        answers(encoder, lines(folder, [row]), folder / "pictures")
    (folder / "pictures" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no question can be asked: \{'not an image': 1\}"):
        answers(chat, lines(folder, [{**row, "image": "bad.png"}]), folder / "pictures")


def vectors(encoder: Ready, texts: list[str]) -> torch.Tensor:
    ids = [encode_caption(encoder.tokenizer, PREFIX + text, encoder.data.max_tokens) for text in texts]
    return encoder.model.embed_text(pad(ids, encoder.tokenizer.pad))


def test_clip_score_is_the_definition(encoder: Ready) -> None:
    encoder = replace(encoder, batch_size=2)
    said = ["a red square", "a blue square", "a green square"]
    references = [["a red square", "red"], ["a red square"], ["black", "blue", "a cyan square"]]
    pictures = [(colour, picture(colour)) for colour in ("red", "green", "blue")]
    found = clip_scores(encoder, pictures, said, references)
    with torch.no_grad():
        texts = vectors(encoder, said)
        for number, (_, data) in enumerate(pictures):
            image = encoder.model.embed_image(encoder.model.see(encoder.model.vision.transform(decode(data))[None]))
            score = 2.5 * max(0.0, (image[0] @ texts[number]).max().item())
            nearest = max(0.0, (vectors(encoder, references[number]) @ texts[number]).max().item())
            assert found.clip[number].item() == pytest.approx(score, abs=1e-5)
            wanted = 2 * score * nearest / (score + nearest) if score and nearest else 0.0
            assert found.reference[number].item() == pytest.approx(wanted, abs=1e-5)


def test_clip_score_by_hand() -> None:
    assert harmonic_mean(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, 6.0])).tolist() == [1, 0, 4]


def test_clip_score_refuses(encoder: Ready, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has no contrastive head \(itc\), which CLIPScore needs"):
        clip_scores(restore(folder / "decoder"), [("a", picture("red"))], ["a"], [["a"]])
    with pytest.raises(ValueError, match=r"x\.png: not an image"):
        clip_scores(encoder, [("x.png", b"no")], ["a"], [["a"]])
    with pytest.raises(ValueError, match="1 pictures for 2 captions"):
        clip_scores(encoder, [("x.png", picture("red"))], ["a", "b"], [["a"], ["b"]])
    with pytest.raises(
        ValueError, match=r"clip gives image vectors that are not finite .*, of 'x\.png' first: nothing"
    ):
        clip_scores(spoilt(encoder, torch.nan), [("x.png", picture("red"))], ["a"], [["b"]])
    with pytest.raises(ValueError, match=r"clip gives text vectors that are not finite .*, of 'a' first: nothing"):
        clip_scores(spoilt(encoder, torch.nan, "text"), [("x.png", picture("red"))], ["a"], [["b"]])
