"""Conversations from every form to the same batches, with any number of pictures."""

import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.shard_files import picture, write
from tests.data.source_files import needs_pyarrow
from tests.data.talk_files import COUNT, SHOWN, as_json, as_lines, as_parquet, chat, llava, names, said
from tests.data.vocabularies import words
from vlm.data.augment import Augment
from vlm.data.batch import Batch
from vlm.data.image import BadSample, ImageTransform
from vlm.data.loader import Loader
from vlm.data.pictures import Pictures
from vlm.data.shards import Shards
from vlm.data.sources import open_pictures
from vlm.data.talk import Talk, Turn, read_talk, shown
from vlm.data.talk_batch import Reader, TalkForm
from vlm.data.template import TEMPLATES
from vlm.data.write import Recipe
from vlm.data.write import write as write_verb
from vlm.nn.tokens import IGNORE, IMAGE_ID

TRANSFORM = ImageTransform((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def opened(spec: str, **options: Any) -> Pictures:
    return open_pictures(spec, talks=True, **options)


def _form(**options: Any) -> TalkForm:
    return TalkForm(
        **{"tokenizer": words(), "template": TEMPLATES["vicuna_v1"], "image_tokens": 2, "max_tokens": 400} | options
    )


def _loader(source: Pictures, batch_size: int = 3, talks: TalkForm | None = None, **options: Any) -> Loader:
    form = _form() if talks is None else talks
    return Loader(
        source, TRANSFORM, words(), batch_size, max_tokens=400, template=None, image_tokens=2, talks=form, **options
    )


def _check(source: Pictures) -> None:
    """The talks of `talk_files`, in their order, with their pictures."""
    seeds = itertools.count()
    assert len(source) == COUNT and not source.bad
    for number in range(COUNT):
        raw = source.raw(number)
        assert raw.images == [picture(next(seeds)) for _ in names(number)]
        assert raw.talk is not None and raw.talk.images == SHOWN[number % 3]
        assert [turn.text for turn in raw.talk.turns] == [text.replace("<image>", "").strip() for text in said(number)]
        assert raw.talk == read_talk(llava(number), raw.talk.images)
    assert list(source.captions()) == [
        text.replace("<image>", "").strip() for number in range(COUNT) for text in said(number)
    ]


@pytest.mark.parametrize(
    "make",
    [
        as_json,
        lambda place: as_json(place, chat),
        as_lines,
        lambda place: as_lines(place, llava),
        pytest.param(lambda place: as_parquet(place, inside=True), marks=needs_pyarrow),
        pytest.param(lambda place: as_parquet(place, inside=False), marks=needs_pyarrow),
    ],
    ids=["json", "json of messages", "jsonl of messages", "jsonl", "parquet with pictures", "parquet with paths"],
)
def test_every_form_and_its_shards(make: Callable[[Path], str], tmp_path: Path) -> None:
    spec = make(tmp_path / "data")
    _check(opened(spec))
    write_verb([spec], tmp_path / "shards", Recipe(samples=5))
    shards = opened(str(tmp_path / "shards"))
    _check(shards)
    again = tmp_path / "again"
    write_verb([str(tmp_path / "shards")], again, Recipe(samples=5), talks=True)
    _check(opened(str(again)))


def test_members_of_a_shard(tmp_path: Path) -> None:
    write_verb([as_json(tmp_path / "data")], tmp_path / "shards", Recipe())
    shards = Shards(str(tmp_path / "shards"), talks=True)
    assert not shards.others
    with tarfile.open(tmp_path / "shards/000000.tar") as tar:
        found = tar.getnames()
    assert found[:6] == [
        *("talk_0.0.png", "talk_0.1.png", "talk_0.json"),
        *("talk_1.json", "talk_1.png", "talk_1.txt"),
    ]
    assert found[6] == "talk_2.json"
    # One picture is a picture with a caption to who reads pairs; the others are counted.
    pairs = Shards(str(tmp_path / "shards"), max_bad_fraction=1.0)
    assert pairs.raw(0).captions == ["it is thing 1"] and pairs.raw(0).talk is None
    assert pairs.bad == {"dotted name": 4, "no image": 4}


def test_batches_have_pictures_in_the_order_of_the_text(tmp_path: Path) -> None:
    source = opened(as_json(tmp_path))
    (first, *_) = batches = list(_loader(source).once())
    assert len(batches) == COUNT // 3
    assert first.images is not None and first.shown is not None and first.prompts is not None
    assert first.keys == ["talk 0", "talk 1", "talk 2"] and first.image_ids == ["p00a.png", "p00a.png", "p01a.png"]
    assert torch.equal(first.images, torch.stack([TRANSFORM.read(picture(seed)) for seed in range(3)]))
    assert first.shown.tolist() == [0, 1, 2]
    assert (first.prompts.ids == IMAGE_ID).sum(1).tolist() == [4, 2, 0]
    learned = [words().decode([i for i in row if i != IGNORE]) for row in first.prompts.labels.tolist()]
    assert learned == [f"it is thing {number} because of {number}" for number in range(3)]


def test_a_batch_without_pictures_holds_a_blank_one(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(llava(number)) for number in (2, 5, 8)))
    batch = next(_loader(opened(str(tmp_path / "t.jsonl"))).once())
    assert batch.images is not None and batch.shown is not None and batch.prompts is not None
    assert batch.images.shape == (1, 3, 8, 8) and not batch.images.any() and len(batch.shown) == 0
    assert not (batch.prompts.ids == IMAGE_ID).any()


def _same(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys and one.image_ids == other.image_ids and one.strings == other.strings
    assert one.prompts is not None and other.prompts is not None
    assert torch.equal(one.pixels, other.pixels) and torch.equal(one.prompts.labels, other.prompts.labels)
    assert torch.equal(one.prompts.ids, other.prompts.ids)


@pytest.mark.parametrize("options", [{"workers": 2}, {"cache_mb": 1}], ids=["workers", "cache"])
def test_step_is_all_that_matters(tmp_path: Path, options: dict[str, int]) -> None:
    source = opened(as_json(tmp_path))
    augment = Augment(scale=(0.3, 1.0), flip=True, brightness=0.3)
    expected = list(itertools.islice(_loader(source, 5, augment=augment, seed=3).train(count()), 6))
    for start in (0, 4):
        got = itertools.islice(_loader(source, 5, augment=augment, seed=3, **options).train(count(start)), 6 - start)
        for one, other in zip(got, expected[start:], strict=True):
            _same(one, other)


def test_bad_ones_are_counted_and_replaced(tmp_path: Path) -> None:
    spec = as_json(tmp_path)
    (tmp_path / "p03b.png").write_bytes(b"nothing")
    records = [llava(number) for number in range(COUNT)]
    records[1]["conversations"][0]["value"] = "why? " * 500  # its mark is gone as well: the picture goes before it
    records[6]["image"] = ["p06a.png"]
    records[7]["conversations"] = records[7]["conversations"][:1]
    records[8]["conversations"][1]["from"] = "bard"
    records[9]["conversations"][1]["value"] = " "
    Path(spec).write_text(json.dumps(records))
    source = opened(spec, max_bad_fraction=1.0)
    assert source.bad == {"places and pictures differ": 1, "no answer": 1, "unknown speaker": 1, "empty answer": 1}
    loader = _loader(source)
    seen = Counter(key for batch in itertools.islice(loader.train(count()), 12) for key in batch.keys)
    assert not seen.keys() & {f"talk {number}" for number in (1, 3, 6, 7, 8, 9)} and seen.total() == 36
    assert set(loader.bad) == {"not an image", "no room for an answer"}


def test_captions_as_answers_to_drawn_questions(tmp_path: Path) -> None:
    samples = [{"__key__": f"{i}", "png": picture(i), "txt": f"thing {i}\nit is {i}"} for i in range(4)]
    source = opened(str(write(tmp_path / "s.tar", samples)))
    form = _form(template=TEMPLATES["minigpt4"], questions=("What is it?", "Say it."))
    batches = list(itertools.islice(_loader(source, 4, form).train(count()), 8))
    texts = {words().decode(row) for batch in batches if batch.prompts for row in batch.prompts.ids.tolist()}
    asked = {text.split("</Img>")[1].split("###")[0].strip() for text in texts}
    answers = {text.split("Assistant:")[1].strip(" #") for text in texts}
    assert asked == {"What is it?", "Say it."} and answers == {
        f"{it} {i}" for it in ("thing", "it is") for i in range(4)
    }
    with pytest.raises(ValueError, match=r"data.questions: 'Say it.': no room for an answer"):
        _form(questions=("Say it.",), max_tokens=20)
    with pytest.raises(BadSample, match=r"data\.questions says what they answer"):
        _form().sample(source.raw(0), TRANSFORM.read)


def test_system_turns_and_instructions(tmp_path: Path) -> None:
    source = opened(as_json(tmp_path))
    form = _form(turns=1, system="Be brief.", reader=Reader(words(), 5))
    batch = next(_loader(source, talks=form).once())
    assert batch.prompts is not None and batch.instructions is not None
    text = [words().decode(row) for row in batch.prompts.ids.tolist()]
    assert text[2] == "Be brief. USER: Who are you? ASSISTANT: it is thing 2"
    reads = [words().decode(row) for row in batch.instructions.ids.tolist()]
    assert reads == [words().decode(words().encode(t)[-3:]) for t in ("Is  as ?", "Is  as ?", "What is it?")]
    none = _form(system="Be brief.").prompt(Talk((Turn("user", ("a",)), Turn("assistant", ("b",))), "Own."))
    assert words().decode(none.text.ids).startswith("Own. USER")


def _asked(*content: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {**row, "messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "yes"}]}


@pytest.mark.parametrize(
    "row",
    [
        _asked({"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}, {"path": "b.png"}),
        _asked({"type": "image"}, {"type": "text", "text": "?"}, {"type": "image"}, images=["a.png", "b.png"]),
        _asked({"type": "image", "text": None}, {"type": "text", "text": "?", "image": None}, {"type": "image"})
        | {"images": ["a.png", "b.png"]},  # as columnar files have it: every field in every part
        _asked({"type": "text", "text": "<image>?<image>"}, image=["a.png", "b.png"]),
        _asked({"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}, {"type": "image", "url": "b.png"}),
    ],
)
def test_parts_that_show_pictures(row: dict[str, Any]) -> None:
    assert shown(row) == ["a.png", "b.png"]
    assert read_talk(row, 2).turns[0].parts == (None, "?", None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.png"}, "no conversation"),
        ({"messages": ["hi"]}, "no conversation"),
        ({"messages": [{"role": "user", "content": 3}]}, "turn is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "turn is not text"),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "no answer"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<image>"}]},
            "empty answer",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b <image>"}]},
            "picture in an answer",
        ),
    ],
)
def test_records_that_are_no_talk(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        read_talk(row)
    assert caught.value.reason == reason


def test_members_that_do_not_fit(tmp_path: Path) -> None:
    turns = json.dumps(llava(1))
    many = {f"{number}.png": picture(0) for number in range(33)}
    samples = [
        {"__key__": "a", "json": turns, "png": picture(0)},
        {"__key__": "gap", "json": turns, "0.png": picture(0), "2.png": picture(0)},
        {"__key__": "many", "json": turns, **many},
        {"__key__": "bare", "png": picture(0)},
    ]
    shards = Shards(str(write(tmp_path / "s.tar", samples)), talks=True)
    assert shards.bad == {"picture missing": 1, "too many pictures": 1, "no conversation": 1} and len(shards) == 1


@pytest.mark.parametrize("reply_start", [None, 5])
def test_a_cut_answer_is_told_of_decoders_and_encoder_decoders(reply_start: int | None) -> None:
    talk = Talk((Turn("user", (None, "a b")), Turn("assistant", ("c d e f",))))
    whole = _form(system="", reply_start=None).prompt(talk).text
    most = len(whole.ids) - 2 * whole.images
    form = _form(system="", reply_start=reply_start)
    assert not replace(form, max_tokens=most).cuts(talk)
    assert replace(form, max_tokens=most - 1).cuts(talk)
