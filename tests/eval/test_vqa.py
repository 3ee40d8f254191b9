"""Scores of answers against VQA's evaluation code, and by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.eval.answers import Question, most_frequent, score_answers
from vlm.eval.vqa import anls, exact_answer, normal, vqa_accuracy

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_vqa.json").read_text(encoding="utf-8"))


def question(*people: str, kind: str = "") -> Question:
    return Question(0, "", "", list(people), [], kind=kind)


def test_accuracy_equals_the_official_code() -> None:
    found = [100 * vqa_accuracy(answer, people) for answer, people, _ in GOLDEN["answers"]]
    assert found == pytest.approx([accuracy for _, _, accuracy in GOLDEN["answers"]], abs=1e-6)
    assert len(found) == 700 and 0 < sum(found) / len(found) < 100
    assert sum(found) / len(found) == pytest.approx(GOLDEN["overall"], abs=1e-6)
    many = [(answer, question(*people), accuracy) for answer, people, accuracy in GOLDEN["answers"] if len(people) > 3]
    answers, questions, wanted = zip(*many, strict=True)
    scores = score_answers(answers, questions)
    assert scores.metrics["vqa"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert scores.each["vqa"] == pytest.approx([accuracy / 100 for accuracy in wanted], abs=1e-8)


def test_normalisation_equals_the_official_code() -> None:
    assert [(text, normal(text)) for text, _ in GOLDEN["normal"]] == [tuple(pair) for pair in GOLDEN["normal"]]


def test_accuracy_by_hand() -> None:
    # One of ten said it: 9 times of 10 it is among the others, once for a third.
    assert vqa_accuracy("red", ["red", *["blue"] * 9]) == pytest.approx(0.9 / 3)
    assert vqa_accuracy("red", [*["red"] * 3, *["blue"] * 7]) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("red", ["red"] * 4 + ["blue"] * 6) == 1
    assert vqa_accuracy("The Red.", ["red"] * 10) == 0  # all say the same, so nothing is normalised
    assert vqa_accuracy("The Red.", ["red"] * 9 + ["blue"]) == 1
    assert vqa_accuracy("green", ["red", "blue"]) == 0


def test_exact_and_anls_by_hand() -> None:
    assert exact_answer("The two dogs!", ["2 dogs"]) and not exact_answer("dog", ["dogs"])
    assert anls("HELLO  world", ["hello world"]) == 1
    assert anls("hallo", ["hello"]) == pytest.approx(0.8)
    assert anls("ab", ["xy", "abcd"]) == 0.5 and anls("ab", ["abcde"]) == 0
    assert anls("", [""]) == 1 and anls("", ["a"]) == 0


def test_means_by_kind_of_answer() -> None:
    asked = [question("yes", kind="yes/no"), question("no", kind="yes/no"), question("two", kind="number")]
    found = score_answers(["yes", "yes", "2"], asked)
    assert found.metrics["exact"] == pytest.approx(200 / 3)
    assert found.by_kind["yes/no"]["exact"] == 50 and found.by_kind["number"]["exact"] == 100
    assert found.each["exact"] == [1, 0, 1]


def test_vqa_accuracy_needs_four_people() -> None:
    found = score_answers(["a", "b"], [question(*"aaa", kind="x"), question(*"bbbb", kind="y")])
    assert found.metrics == {"vqa": None, "exact": 100, "anls": 100} and "vqa" not in found.each
    assert [found.by_kind[kind]["vqa"] for kind in "xy"] == [None, None]
    (note,) = found.notes
    assert note.endswith("it needs 4 answers of people a question: 1 of 2 questions have fewer")
    whole = score_answers(["a"], [question(*"aaaa")])
    assert (whole.metrics["vqa"], whole.notes) == (100, [])


def test_the_most_frequent_answer_is_counted_as_it_is_scored() -> None:
    assert most_frequent([question("a", "b"), question("b")]) == "b"
    asked = [question(*[text] * 9, "x") for text in ("Yes.", "yes", "YES", "yes", "no", "no", "no")]
    assert most_frequent(asked) == "yes"
    always = score_answers(["yes"] * 7, asked).metrics["vqa"]
    assert score_answers([most_frequent(asked)] * 7, asked).metrics["vqa"] == always == pytest.approx(400 / 7)


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="0 answers to 0 questions; give one each, at least one"):
        score_answers([], [])
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        score_answers(["a"], [question("a")] * 2)
    for score in (vqa_accuracy, exact_answer, anls):
        with pytest.raises(ValueError, match="no answer to compare with"):
            score("a", [])
