"""Zero-shot classification: equal to brute force and to CLIP_benchmark, ties against the model, faults in words."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.eval.extracting import BPE
from tests.eval.noisy import noisy
from tests.tiny import COLOURS, pack, picture
from vlm.eval.data import open_evaluation_data
from vlm.eval.names import clip_benchmark_classification
from vlm.eval.outcome import Outcome
from vlm.eval.prompts import Classes, describe, read_names, read_templates
from vlm.eval.report import Page, render
from vlm.eval.zeroshot import chance, classifier, classify, classify_images, summarize
from vlm.restore import Ready

NAMES = list(COLOURS)
TEMPLATES = ["a photo of a {c} square.", "{c}", "something {c}, seen from near"]
GOLDEN = json.loads(Path(__file__).with_name("golden_zeroshot.json").read_text(encoding="utf-8"))


def measured(ready: Ready, data: Path, labels: str | None = None, **settings: Any) -> Outcome:
    return classify(ready, open_evaluation_data([str(data)], ready.data, labels=labels), **settings)


def labelled() -> list[tuple[bytes, int]]:
    """Squares of all colours, of some more than of others, and the numbers of the colours."""
    return [(picture(COLOURS[i % 8], size=40 + i, shift=i // 8), i % 8) for i in range(37)]


def benchmark(folder: Path, **files: str) -> Path:
    """The squares in CLIP_benchmark's layout, in two shards."""
    members: list[tuple[str, bytes]] = []
    for i, (png, label) in enumerate(labelled()):
        members += [(f"s{i:07d}.cls", str(label).encode()), (f"s{i:07d}.png", png)]
    (folder / "test").mkdir(parents=True)
    pack(folder / "test" / "0.tar", members[:40])
    pack(folder / "test" / "1.tar", members[40:])
    texts = {"classnames.txt": "\n".join(NAMES) + "\n", "zeroshot_classification_templates.txt": "\n".join(TEMPLATES)}
    for name, text in (texts | {"test/nshards.txt": "2\n"} | files).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return noisy(tmp_path_factory.mktemp("noisy"))


def by_group(folder: Path, **fields: Any) -> Path:
    members: list[tuple[str, bytes]] = []
    for i, (png, label) in enumerate(labelled()[:8]):
        members += [(f"{i}.png", png), (f"{i}.json", json.dumps({"group": NAMES[label], **fields}).encode())]
    return pack(folder / "groups.tar", members)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_equal_to_clip_benchmark(ready: Ready, tmp_path: Path) -> None:
    found = measured(ready, benchmark(tmp_path / "set"))
    theirs = clip_benchmark_classification(dict(found.metrics))
    assert theirs == pytest.approx({name: GOLDEN[name] for name in theirs}, abs=1e-9)
    assert found.counts == {"images": 37, "classes": 8, "prompts": 24, "unusable": {}}
    assert found.protocol["templates"] == TEMPLATES


def test_class_vectors_equal_clip_benchmarks(ready: Ready) -> None:
    vectors = classifier(ready.model, ready.tokenizer, describe(NAMES, TEMPLATES), ready.data.max_tokens)
    torch.testing.assert_close(vectors, torch.tensor(GOLDEN["classifier"]), atol=2e-6, rtol=0)


def test_prompts_in_groups_change_nothing(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = Classes(("a", "b", "c"), (("a cat",), ("a dog", "two dogs", "dogs"), ("a horse", "horses")))
    whole = classifier(ready.model, ready.tokenizer, classes, 12)
    monkeypatch.setattr("vlm.eval.zeroshot.PROMPTS", 2)
    torch.testing.assert_close(classifier(ready.model, ready.tokenizer, classes, 12), whole)


@given(st.integers(2, 9), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99), st.integers(1, 5))
def test_equal_to_brute_force(classes: int, images: int, vectors: int, seed: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(-2, 3, (images, vectors, 4), generator=generator).float()  # whole numbers: many ties
    text = torch.randint(-2, 3, (classes, 4), generator=generator).float()
    label = torch.randint(0, classes, (images,), generator=generator)
    found = classify_images(image, text, label, chunk)
    for row in range(images):
        scores = [max(float(v @ t) for v in image[row]) for t in text]
        own = scores.pop(int(label[row]))
        assert int(found.rank[row]) == 1 + sum(score >= own for score in scores)
        assert float(found.margin[row]) == own - max(scores)
        assert (int(found.taken_for[row]) == int(label[row])) == (own > max(scores))


def test_a_model_that_says_nothing_is_never_right() -> None:
    image, text, label = torch.ones(6, 1, 4), torch.ones(5, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    figures = summarize(classify_images(image, text, label), label, list("abcde"))
    assert (figures["top1"], figures["mean_per_class_recall"]) == (0, 0)
    assert figures["top5"] == 100  # of five classes


def test_figures_by_hand() -> None:
    text = torch.eye(3)
    image = torch.tensor([[1, 0, 0], [1, 0.5, 0], [0, 1, 0], [1, 0, 0.5]]).float()[:, None]
    label = torch.tensor([0, 0, 1, 1])  # the last one is wrong; nothing is of class c
    figures = summarize(classify_images(image, text, label), label, ["a", "b", "c"])
    assert (figures["top1"], figures["top5"], figures["mean_per_class_recall"]) == (75, None, 75)
    assert figures["per_class"] == [
        {"class": "a", "images": 2, "top1": 100, "often_taken_for": None},
        {"class": "b", "images": 2, "top1": 50, "often_taken_for": "a"},
        {"class": "c", "images": 0, "top1": None, "often_taken_for": None},
    ]
    assert chance(label, 3) == {
        "top1": pytest.approx(100 / 3),
        "top5": None,
        "mean_per_class_recall": pytest.approx(100 / 3),
        "most_frequent_class": 50,
    }
    assert math.isnan(clip_benchmark_classification(figures)["acc5"])


# --- a whole evaluation ----------------------------------------------------------------------------------------------


def test_classes_are_the_values_of_a_field(ready: Ready, tmp_path: Path) -> None:
    found = measured(ready, by_group(tmp_path), labels="json:group")
    assert [one["class"] for one in found.metrics["per_class"]] == sorted(COLOURS)
    assert found.protocol["templates"] == ["a photo of a {c}."]
    assert found.counts["images"] == 8
    assert list(found.groups["zeroshot/rank"]) == [str(i) for i in range(8)]
    assert (found.values["zeroshot/rank"] == 1).double().mean() * 100 == found.metrics["top1"]


def test_names_and_templates_of_files_go_first(ready: Ready, tmp_path: Path) -> None:
    data = benchmark(tmp_path / "set")
    (tmp_path / "names.json").write_text(json.dumps({"eight": [f"{name} thing" for name in NAMES]}))
    (tmp_path / "templates.json").write_text(json.dumps(["one {}"]))
    found = measured(ready, data, classes=f"{tmp_path}/names.json#eight", templates=str(tmp_path / "templates.json"))
    assert found.metrics["per_class"][0]["class"] == "red thing"
    assert found.protocol["templates"] == ["one {}"]


def test_features_are_kept_apart_from_prompts(ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = benchmark(tmp_path / "set"), tmp_path / "features"
    before = measured(ready, data, folder=folder)

    def never(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the pictures are encoded again")

    monkeypatch.setattr(ready.model, "encode", never)
    (tmp_path / "other.txt").write_text("{c}")
    assert measured(ready, data, folder=folder).metrics == before.metrics
    assert measured(ready, data, folder=folder, templates=str(tmp_path / "other.txt")).counts["prompts"] == 8


def test_the_page_shows_it(ready: Ready, tmp_path: Path) -> None:
    found = measured(ready, benchmark(tmp_path / "set"))
    table, bars, best, worst = found.sections
    assert [row[0] for row in table.rows] == ["Top-1", "Top-5", "Mean per class"]  # type: ignore[union-attr]
    assert len(bars.rows) == 8  # type: ignore[union-attr]
    assert len(best.cards) == len(worst.cards) == 8  # type: ignore[union-attr]
    html = render(Page("Zero-shot", "", [], found.sections))
    assert html.count("data:image/webp;base64,") == 16
    assert "purple" in html


def test_unusable_pictures_are_counted(ready: Ready, tmp_path: Path) -> None:
    members = [("a.png", picture("red")), ("a.cls", b"0"), ("b.png", b"no picture"), ("b.cls", b"1")]
    shard = pack(tmp_path / "holes.tar", members)
    (tmp_path / "names.txt").write_text("red\nblue\n")
    found = measured(ready, shard, labels="cls", classes=str(tmp_path / "names.txt"))
    assert found.counts["unusable"] == {"not an image": 1}
    assert found.counts["images"] == 1


# --- faults ----------------------------------------------------------------------------------------------------------


def refused(match: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(match)}")


def test_no_labels(ready: Ready, tmp_path: Path) -> None:
    shard = by_group(tmp_path, caption="a square")
    with refused(f"{shard}: which class a picture has is not known: say where it stands (--labels json:FIELD)"):
        measured(ready, shard)


def test_numbers_without_names(ready: Ready, tmp_path: Path) -> None:
    data = benchmark(tmp_path / "set")
    (data / "classnames.txt").unlink()
    with refused(f"{data}: the classes are numbers: give their names, a line each (--classes FILE)"):
        measured(ready, data)


def test_a_number_beyond_the_names(ready: Ready, tmp_path: Path) -> None:
    data = benchmark(tmp_path / "set", **{"classnames.txt": "red\ngreen\nblue\nyellow\nblack\norange\npurple\n"})
    with refused(
        "picture 's0000007' has class '7', which is not a number from 0 to 6 (4 of 37 pictures): compare labels and "
        "--classes"
    ):
        measured(ready, data)


def test_a_label_that_is_no_class(ready: Ready, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    with refused("picture '2' has class 'blue', which is not one of the class names (6 of 8 pictures)"):
        measured(ready, by_group(tmp_path), labels="json:group", classes=str(tmp_path / "names.txt"))


def test_several_classes_a_picture(ready: Ready, tmp_path: Path) -> None:
    shard = by_group(tmp_path, tags=["a", "b"])
    with refused("picture '0' has 2 classes (8 pictures have several): zero-shot classification takes one a picture"):
        measured(ready, shard, labels="json:tags")


def test_one_class(ready: Ready, tmp_path: Path) -> None:
    with refused("zero-shot classification needs two classes at least, not 1: square"):
        measured(ready, by_group(tmp_path, kind="square"), labels="json:kind")


def test_a_model_without_itc(tmp_path: Path) -> None:
    with refused("noisy was trained without itc, so it cannot compare images and texts"):
        measured(noisy(tmp_path, "decoder"), by_group(tmp_path), labels="json:group")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("red\n\nblue\n", "--classes {}: entry 2 is ''; should be text"),
        ("", "--classes {}: entry 1 is ''; should be text"),
    ],
)
def test_holes_in_names(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(content)
    with refused(message.format(path)):
        read_names(str(path))


@pytest.mark.parametrize(
    ("content", "entry", "message"),
    [
        ("[", "", "--classes {}: not JSON: "),
        ("[]", "", "--classes {}: an empty list; should be a list of texts"),
        ('["a", 3]', "", "--classes {}: entry 2 is 3; should be text"),
        (
            '{"x": ["a"], "y": ["b"]}',
            "",
            "--classes {0}: an object; should be a list of names; name one of its entries, such as {0}#x (x, y)",
        ),
        ('{"x": ["a"]}', "#z", "--classes {0}#z: no 'z' in it; name one of its entries, such as {0}#x (x)"),
    ],
)
def test_json_that_is_no_list_of_names(tmp_path: Path, content: str, entry: str, message: str) -> None:
    path = tmp_path / "names.json"
    path.write_text(content)
    with refused(message.format(path)):
        read_names(f"{path}{entry}")


def test_templates_without_a_place(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a photo of {c}\na photo\n")
    with refused(f"--templates {path}: template 2, 'a photo', has no {{c}} where the name belongs"):
        read_templates(str(path))


def test_texts_of_each_class(tmp_path: Path) -> None:
    path = tmp_path / "cupl.json"
    path.write_text(json.dumps({"cat": ["A cat purrs.", "{c} is left alone"], "dog": ["A dog barks."]}))
    texts = read_templates(str(path))
    assert describe(["dog", "cat"], texts).prompts == (("A dog barks.",), ("A cat purrs.", "{c} is left alone"))
    with refused("--templates: no text for 'cow' (1 of 3 classes)"):
        describe(["dog", "cow", "cat"], texts)


def test_names_are_text_and_nothing_else() -> None:
    made = describe(["{c}", "{0.__class__}"], ["a {c}", "{}!"])
    assert made.prompts[1] == ("a {0.__class__}", "{0.__class__}!")


def test_repeated_names_and_long_prompts_are_told(
    ready: Ready, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["red", *NAMES[1:7], "red"]
    data = benchmark(tmp_path / "set", **{"classnames.txt": "\n".join(names)})
    (tmp_path / "long.txt").write_text("{c} and " + "very " * 20)
    found = measured(ready, data, templates=str(tmp_path / "long.txt"))
    assert found.protocol["repeated_names"] == ["red"]
    assert found.protocol["prompts_cut"] == 8
    assert found.metrics["per_class"][0]["top1"] == found.metrics["per_class"][7]["top1"] == 0
    assert "several classes have one name, so none of them is ever right: red" in caplog.text
    assert "8 of 8 prompts are longer than the model reads (10 tokens): cut" in caplog.text
    assert found.protocol["alike_names"] == []


def test_names_of_the_same_tokens_are_told(ready: Ready, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = benchmark(tmp_path / "set", **{"classnames.txt": "\n".join(["crane", *NAMES[1:7], "Crane"])})
    assert measured(noisy(tmp_path, tokenizer=BPE), data).protocol["alike_names"] == []
    found = measured(ready, data)  # CLIP's tokenizer has no capitals
    assert (found.protocol["alike_names"], found.protocol["repeated_names"]) == ([["crane", "Crane"]], [])
    assert found.metrics["per_class"][0]["top1"] == found.metrics["per_class"][7]["top1"] == 0
    wanted = "several classes are the same tokens to the model, so none of them is ever right: 'crane', 'Crane'"
    assert wanted in caplog.text
    (tmp_path / "long.txt").write_text("very " * 20 + "{c}")
    (alike,) = measured(ready, data, templates=str(tmp_path / "long.txt")).protocol["alike_names"]
    assert alike == ["crane", *NAMES[1:7], "Crane"]
