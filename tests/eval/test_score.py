"""`vlm score` as a process: what it prints, that it loads no torch, and every mistake in words."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import ROOT, Commands, commands
from tests.tiny import COLOURS, picture, tiny_run
from vlm.eval.coco import read_references, read_results, write_results
from vlm.train.run import train_run

REFERENCES = {
    "images": [
        {"id": 1, "file_name": "red.png"},
        {"id": 2, "file_name": "green.png"},
        {"id": 7, "file_name": "x/7.png"},
    ],
    "annotations": [
        {"image_id": 1, "id": 1, "caption": "A red square."},
        {"image_id": 1, "id": 2, "caption": "Something red"},
        {"image_id": 2, "id": 3, "caption": "a green square on white"},
    ],
}
RESULTS = [{"image_id": 2, "caption": "a green square"}, {"image_id": 1, "caption": "a red square"}]
PEOPLE = [{"answer": "red", "answer_id": number} for number in range(10)]
YES_OR_NO = [{"answer": "yes"}] * 2 + [{"answer": "no"}] * 8
VQA = {
    "annotations": [
        {"question_id": 10, "image_id": 1, "answers": PEOPLE, "answer_type": "other"},
        {"question_id": 20, "image_id": 1, "answers": YES_OR_NO, "answer_type": "yes/no"},
    ]
}
ANSWERS = [{"question_id": 20, "answer": "yes"}, {"question_id": 10, "answer": "red"}]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with commands(tmp_path_factory.mktemp("streams")) as run:
        yield run


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"refs.json": REFERENCES, "results.json": RESULTS, "vqa.json": VQA, "answers.json": ANSWERS}
    for name, content in files.items():
        write(tmp_path / name, content)
    return tmp_path


def test_json(vlm: Commands, folder: Path) -> None:
    done = vlm("score", "results.json", "refs.json", "--json", "--no-java", folder=folder)
    found = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert found["counts"] == {"images": 2, "references": 3, "of": 2}
    assert found["captions"]["bleu_1"] == found["coco"]["Bleu_1"]
    assert found["captions"]["meteor"] is None and "METEOR was not asked for" in found["notes"]
    assert found["statistics"]["captions"]["words"] == {"mean": 3, "min": 3, "max": 3}


def test_table_and_results_of_other_spellings(vlm: Commands, folder: Path) -> None:
    plain = vlm("score", "results.json", "refs.json", "--no-java", folder=folder).out
    assert plain.splitlines()[0].startswith("  BLEU-1  ")
    assert plain.splitlines()[-1] == "2 captions, 3 references"
    lines = [{"image": "/a/green.png", "caption": "a green square"}, {"image_id": "1", "caption": "a red square"}]
    write(folder / "lines.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert vlm("score", "lines.jsonl", "refs.json", "--no-java", folder=folder).out == plain


def test_one_image_takes_a_larger_corpus(vlm: Commands, folder: Path) -> None:
    write(folder / "one.json", RESULTS[:1])
    done = vlm("score", "one.json", "refs.json", "--partial", "--no-java", folder=folder)
    assert "CIDEr-D  0.0000" in done.out
    assert done.err.startswith("CIDEr-D weighs words by how few of the images' references hold them, so with one image")
    done = vlm("score", "one.json", "refs.json", "--partial", "--no-java", "--corpus", "refs.json", folder=folder)
    assert "CIDEr-D  0.0000" not in done.out and "one image" not in done.err


def test_answers(vlm: Commands, folder: Path) -> None:
    done = vlm("score", "answers.json", "vqa.json", "--task", "vqa", "--json", folder=folder)
    found = json.loads(done.out)
    assert found["answers"]["vqa"] == pytest.approx(100 * (1 + (2 / 3 + 8 * 2 / 3) / 10) / 2)
    assert found["by_kind"]["other"]["exact"] == 100 and found["counts"] == {"questions": 2, "of": 2}
    assert found["notes"] == []
    done = vlm("score", "answers.json", "vqa.json", "--task", "vqa", folder=folder)
    assert done.out.splitlines()[0] == "VQA accuracy   80.00 %   other 100.00   yes/no 60.00"
    rows = [{"question": "what?", "answers": ["red"]}, {"question": "which?", "choices": ["a", "b"], "answer": 1}]
    write(folder / "q.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "said.json", [{"question_id": "0", "answer": "Red."}, {"question_id": 1, "answer": "b"}])
    found = json.loads(vlm("score", "said.json", "q.jsonl", "--task", "vqa", "--json", folder=folder).out)
    assert found["answers"]["exact"] == 100


FEW = (
    "VQA accuracy leaves one person out and wants 3 others who agree, so it needs 4 answers of people a question: 1 of "
    "2 questions have fewer"
)


def test_fewer_people_than_vqa_accuracy_needs(vlm: Commands, folder: Path) -> None:
    rows = [{"question": "what?", "answer": "red"}, {"question": "which?", "answers": ["a"] * 4}]
    write(folder / "q.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "said.json", [{"question_id": 0, "answer": "red"}, {"question_id": 1, "answer": "a"}])
    done = vlm("score", "said.json", "q.jsonl", "--task", "vqa", "--json", folder=folder)
    found = json.loads(done.out)
    assert (found["answers"], found["notes"]) == ({"vqa": None, "exact": 100, "anls": 100}, [FEW])
    done = vlm("score", "said.json", "q.jsonl", "--task", "vqa", folder=folder)
    assert done.out.splitlines()[:2] == ["VQA accuracy       – %", " Exact match  100.00 %"]
    assert done.err == f"{FEW}\n"


def test_a_part_says_of_how_many(vlm: Commands, folder: Path) -> None:
    write(folder / "one.json", RESULTS[:1])
    arguments = ("score", "one.json", "refs.json", "--partial", "--no-java")
    assert vlm(*arguments, folder=folder).out.splitlines()[-1] == "1 of 2 captions, 1 references"
    assert json.loads(vlm(*arguments, "--json", folder=folder).out)["counts"] == {"images": 1, "references": 1, "of": 2}
    write(folder / "one.json", ANSWERS[:1])
    arguments = ("score", "one.json", "vqa.json", "--task", "vqa", "--partial")
    assert vlm(*arguments, folder=folder).out.splitlines()[-1] == "1 of 2 answers"
    assert json.loads(vlm(*arguments, "--json", folder=folder).out)["counts"] == {"questions": 1, "of": 2}


def test_clip_score_of_a_run(vlm: Commands, folder: Path) -> None:
    train_run(tiny_run(folder, "clip"), folder / "clip")
    for colour in COLOURS[:2]:
        (folder / f"{colour}.png").write_bytes(picture(colour))
    arguments = ("score", "results.json", "refs.json", "--no-java", "--json", "--model", "clip")
    found = json.loads(vlm(*arguments, "--images", ".", folder=folder).out)["captions"]
    assert 0 <= found["clipscore"] <= 2.5 and 0 <= found["refclipscore"] <= 1.5
    (folder / "red.png").unlink()
    done = vlm(*arguments, "--images", ".", folder=folder)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == "vlm: --images .: no such picture (red.png in .)"


def test_no_torch() -> None:
    code = (
        "import sys, vlm.eval.score, vlm.cli_score, vlm.eval.java; "
        "print(sorted({'torch', 'rich', 'PIL', 'pycocoevalcap'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_results_are_read_as_they_were_written(folder: Path) -> None:
    references = read_references(folder / "refs.json")
    captions = {1: "a “red” square", 2: "ein grünes Quadrat"}
    write_results(folder / "out.json", captions)
    assert read_results(folder / "out.json", references) == captions
    assert json.loads((folder / "out.json").read_text(encoding="utf-8"))[0] == {
        "image_id": 1,
        "caption": "a “red” square",
    }
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


LINES = "COCO's results: a list of {image_id, caption}, or one such object a line"
RESULT_FAULTS: dict[str, tuple[Any, str]] = {
    "no json": ("[{", f"results.json: neither JSON nor JSON lines ({LINES}): "),
    "empty list": ([], f"results.json: empty; {LINES} is expected"),
    "empty file": ("", f"results.json: empty; {LINES} is expected"),
    "no objects": ([1, 2], f"results.json: not {LINES}"),
    "no id": ([{"caption": "a"}], "results.json: an entry has no image_id: {'caption': 'a'}"),
    "no caption": ([{"image_id": 1}], "results.json: caption is missing in {'image_id': 1}"),
    "caption is a number": (
        [{"image_id": 1, "caption": 5}],
        "results.json: caption is no text in {'image_id': 1, 'caption': 5}",
    ),
    "unknown id": (
        [*RESULTS, {"image_id": 9, "caption": "a"}],
        "results.json: image 9 not among the images with captions of refs.json",
    ),
    "image without references": (
        [*RESULTS, {"image_id": 7, "caption": "a"}],
        "results.json: image 7 not among the images with captions of refs.json",
    ),
    "twice": ([*RESULTS, RESULTS[0]], "results.json: several captions of image 2; give one an image"),
    "missing": (
        RESULTS[:1],
        "results.json: no caption of image 1 of refs.json; figures of a part are those of another set: --partial "
        "scores those that are there",
    ),
    "endless caption": (
        [RESULTS[0], {"image_id": 1, "caption": "a" * 10_001}],
        "results.json: a caption of 10001 characters, at most 10000: '" + "a" * 39 + "…",
    ),
}
LAYOUT = (
    "refs.json: not COCO's annotations of captions: an object with images ([{id, file_name}]) and annotations "
    "([{image_id, caption}]) is expected"
)
REFERENCE_FAULTS: dict[str, tuple[Any, str]] = {
    "no json": ("{", "refs.json: not JSON: "),
    "a list": ([], LAYOUT),
    "no captions": ({"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}, LAYOUT),
    "unknown image": (
        {"images": [{"id": 1}], "annotations": [{"image_id": 5, "caption": "a"}]},
        "refs.json: a caption of image 5, which is not among its images",
    ),
    "image twice": (
        {"images": [{"id": 1}, {"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]},
        "refs.json: image 1 stands twice among the images",
    ),
    "image without id": (
        {"images": [{"file_name": "a"}], "annotations": [{"image_id": 1, "caption": "a"}]},
        "refs.json: an image has no id: {'file_name': 'a'}",
    ),
}
ANSWER_FAULTS: dict[str, tuple[Any, str]] = {
    "unknown": ([*ANSWERS, {"question_id": 5, "answer": "a"}], "answers.json: question 5 not among those with answers"),
    "twice": ([*ANSWERS, ANSWERS[0]], "answers.json: several answers to question 20; give one a question"),
    "missing": (
        ANSWERS[:1],
        "answers.json: no answer to question 10; figures of a part are those of another set: --partial scores those "
        "that are there",
    ),
}
QUESTION_FAULTS: dict[str, tuple[Any, str]] = {
    "questions alone": (
        {"questions": [{"question_id": 1, "question": "a"}]},
        "vqa.json: no annotations in it; VQA's ({annotations: [{question_id, image_id, answers}]}) are expected: name "
        "their file beside that of the questions",
    ),
    "no answers": ({"annotations": [{"question_id": 1, "answers": []}]}, "vqa.json: question 1 has no answers"),
    "no id": ([{"question_id": None, "question": "a", "answers": ["b"]}], "vqa.json: question_id is missing in "),
    "twice": (
        [{"question_id": 1, "question": "a", "answers": ["b"]}] * 2,
        "vqa.json: several times question 1; every question_id may stand once",
    ),
    "answer is no choice": (
        [{"question": "a", "choices": ["b", "c"], "answer": "d"}],
        "vqa.json: answer 'd' is none of the choices, nor the place of one (0 to 1): ",
    ),
    "right choice twice": (
        [{"question": "a", "choices": ["b", "b "], "answer": 0}],
        "vqa.json: 'b' is the right choice and a wrong one: {'question': 'a', 'choices': ['b', 'b '], 'answer': 0}",
    ),
    "choices are no texts": ([{"question": "a", "choices": "bc"}], "vqa.json: choices is no list of texts in "),
}
FAULTS = [
    *(("results.json", content, message, ()) for content, message in RESULT_FAULTS.values()),
    *(("refs.json", content, message, ()) for content, message in REFERENCE_FAULTS.values()),
    *(("answers.json", content, message, ("--task", "vqa")) for content, message in ANSWER_FAULTS.values()),
    *(("vqa.json", content, message, ("--task", "vqa")) for content, message in QUESTION_FAULTS.values()),
]
NAMES = [*RESULT_FAULTS, *REFERENCE_FAULTS, *ANSWER_FAULTS, *QUESTION_FAULTS]


@pytest.mark.parametrize(("name", "content", "message", "options"), FAULTS, ids=NAMES)
def test_files_that_cannot_be_scored(
    vlm: Commands, folder: Path, name: str, content: Any, message: str, options: tuple[str, ...]
) -> None:
    write(folder / name, content)
    files = ("answers.json", "vqa.json") if options else ("results.json", "refs.json")
    done = vlm("score", *files, *options, folder=folder)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"vlm: {message}") and len(done.err.splitlines()) == 1
    exact = message.endswith((": ", " in ", "…"))
    assert exact or done.err == f"vlm: {message}\n"


def test_wrong_options(vlm: Commands, folder: Path) -> None:
    done = vlm("score", "results.json", "refs.json", "--model", "clip", folder=folder)
    wanted = "vlm: --model and --images belong together: CLIPScore looks at the pictures with the model\n"
    assert (done.code, done.out, done.err) == (2, "", wanted)
    done = vlm("score", "answers.json", "vqa.json", "--task", "vqa", "--corpus", "refs.json", folder=folder)
    assert done.code == 2 and "--corpus, --model and --images are for captions, not for --task vqa" in done.err
    done = vlm("score", "none.json", "refs.json", folder=folder)
    assert (done.code, done.err) == (2, "vlm: none.json: No such file or directory\n")
    write(
        folder / "one.json",
        {**REFERENCES, "images": REFERENCES["images"][:1], "annotations": REFERENCES["annotations"][:1]},
    )
    done = vlm("score", "results.json", "refs.json", "--corpus", "one.json", folder=folder)
    assert (done.code, done.err) == (2, "vlm: document frequencies of 1 image: at least 2 are needed\n")


def test_every_command_of_the_page_is_one(vlm: Commands, folder: Path) -> None:
    page = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
    told = re.findall(r"^\$ vlm (score [^#\n]*)", page, re.MULTILINE)
    assert len(told) >= 3
    known = set(re.findall(r"--[a-z-]+", vlm("score", "--help", folder=folder).out))
    assert {option for line in told for option in re.findall(r"--[a-z-]+", line)} <= known
