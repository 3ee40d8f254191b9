"""Questions about pictures and what people answered: VQA v2's JSON, or JSON lines of image, question, answers.

VQA v2: {"questions": [{question_id, image_id, question}]} and {"annotations": [{question_id, answers: [{answer}]}]},
results [{question_id, answer}]. JSON lines: image, question and answers (people's), or choices with the right one in
answer (its text or its place from 0 on); question_id unless it is the line's number, from 0 on.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.eval.coco import Entry, Id, objects, read_entries, read_json, some, text_of, twice
from vlm.eval.vqa import LEAST, PEOPLE, anls, exact_answer, normal, vqa_accuracy

LINES = "a list of {image, question, answers or choices}, or one such object a line"
TITLES = {"vqa": "VQA accuracy", "exact": "Exact match", "anls": "ANLS"}
RESULTS = "VQA's results: a list of {question_id, answer}, or one such object a line"


@dataclass(frozen=True)
class Question:
    """A question about a picture. `answers`: of people. With `choices` it is one of these, `right` the place of it."""

    id: Id
    image: str  # path, or the image's id where the file names no path
    text: str
    answers: list[str]
    choices: list[str]
    right: int | None = None
    kind: str = ""


@dataclass(frozen=True)
class AnswerScores:
    """Means in percent, each answer's own 0 to 1, means by kind of answer where the file tells kinds.

    Means are None where one cannot be computed, and `each` has none of it then; `notes` say why.
    """

    metrics: Mapping[str, float | None]
    each: Mapping[str, list[float]]
    by_kind: Mapping[str, Mapping[str, float | None]]
    notes: list[str]


def read_questions(path: Path, annotations: Path | None = None) -> list[Question]:
    """Questions with their answers, in the order of the file; VQA's annotations alone have no words of questions.

    ValueError: another layout, a question without answers or choices, the right choice twice, a question_id twice.
    """
    if path.suffix.lower() == ".json" and isinstance(found := read_json(path), dict):
        questions = _vqa(path, found, annotations)
    elif annotations is not None:
        raise ValueError(f"{annotations}: annotations belong to VQA's questions, which {path} is not")
    else:
        questions = [_line(path, number, entry) for number, entry in enumerate(read_entries(path, LINES))]
    if again := twice(question.id for question in questions):
        raise ValueError(f"{path}: several times {some(again, 'question')}; every question_id may stand once")
    return questions


def _vqa(path: Path, found: Entry, annotations: Path | None) -> list[Question]:
    asked = {entry.get("question_id"): entry for entry in objects(found, "questions")}
    given = objects(found if annotations is None else read_json(annotations), "annotations")
    file = path if annotations is None else annotations
    if not given:
        raise ValueError(
            f"{file}: no annotations in it; VQA's ({{annotations: [{{question_id, image_id, answers}}]}}) are expected"
            + (": name their file beside that of the questions" if asked and annotations is None else "")
        )
    unknown = [entry.get("question_id") for entry in given if asked and entry.get("question_id") not in asked]
    if unknown:
        raise ValueError(f"{file}: answers to {some(unknown, 'question')} that {path} does not ask")
    return [_annotation(file, entry, asked.get(entry.get("question_id"), {})) for entry in given]


def _annotation(path: Path, entry: Entry, question: Entry) -> Question:
    listed = entry.get("answers")
    given = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    people = _needed(path, [text_of(one, "answer", path) for one in given], entry)
    image = str(entry.get("image_id", question.get("image_id", "")))
    text = str(question.get("question", ""))
    return Question(_id(path, entry), image, text, people, [], kind=str(entry.get("answer_type", "")))


def _line(path: Path, number: int, entry: Entry) -> Question:
    text, image = text_of(entry, "question", path), str(entry.get("image", ""))
    own = _id(path, {"question_id": number} | entry)
    kind = str(entry.get("answer_type", ""))
    if "choices" in entry:
        choices = _texts(path, entry, "choices")
        right = _right(path, entry, choices)
        if [choice.strip() for choice in choices].count(choices[right].strip()) > 1:
            raise ValueError(f"{path}: {choices[right]!r} is the right choice and a wrong one: {entry!r:.80}")
        return Question(own, image, text, [], choices, right, kind)
    given = "answers" if "answers" in entry else "answer"
    people = _texts(path, entry, given) if isinstance(entry.get(given), list) else [text_of(entry, given, path)]
    return Question(own, image, text, _needed(path, people, entry), [], kind=kind)


def _id(path: Path, entry: Entry) -> Id:
    found = entry.get("question_id")
    if not isinstance(found, Id):
        raise ValueError(f"{path}: question_id is missing in {entry!r:.80}")
    return found


def _texts(path: Path, entry: Entry, field: str) -> list[str]:
    found = entry.get(field)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found) or not found:
        raise ValueError(f"{path}: {field} is no list of texts in {entry!r:.80}")
    return list(found)


def _right(path: Path, entry: Entry, choices: list[str]) -> int:
    answer = entry.get("answer")
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise ValueError(
        f"{path}: answer {answer!r} is none of the choices, nor the place of one (0 to {len(choices) - 1}): "
        f"{entry!r:.80}"
    )


def _needed(path: Path, people: list[str], entry: Entry) -> list[str]:
    if not people:
        raise ValueError(f"{path}: question {entry.get('question_id')} has no answers")
    return people


def read_answers(path: Path, questions: Sequence[Question], partial: bool = False) -> dict[Id, str]:
    """An answer to each question, in their order; `partial`: to some.

    ValueError: another layout, an answer to an unknown question, two to one, one missing.
    """
    known = {str(question.id): question.id for question in questions}
    found: dict[Id, str] = {}
    unknown, again = list[Any](), list[Any]()
    for entry in read_entries(path, RESULTS):
        text = text_of(entry, "answer", path)
        if (number := known.get(str(entry.get("question_id")))) is None:
            unknown.append(entry.get("question_id"))
        elif number in found:
            again.append(number)
        else:
            found[number] = text
    if unknown:
        raise ValueError(f"{path}: {some(unknown, 'question')} not among those with answers")
    if again:
        raise ValueError(f"{path}: several answers to {some(again, 'question')}; give one a question")
    missing = [question.id for question in questions if question.id not in found]
    if missing and not partial:
        raise ValueError(
            f"{path}: no answer to {some(missing, 'question')}; figures of a part are those of another set: --partial "
            "scores those that are there"
        )
    return {question.id: found[question.id] for question in questions if question.id in found}


def score_answers(answers: Sequence[str], questions: Sequence[Question]) -> AnswerScores:
    """VQA accuracy, exact match and ANLS of answers to questions. ValueError: none, or not one answer a question.

    VQA accuracy only where all questions have LEAST people: with fewer the formula keeps below 1 who answers as all do.
    """
    if len(answers) != len(questions) or not answers:
        raise ValueError(f"{len(answers)} answers to {len(questions)} questions; give one each, at least one")
    people = [question.answers or [question.choices[question.right or 0]] for question in questions]
    pairs = list(zip(answers, people, strict=True))
    each = {} if (few := _few(people)) else {"vqa": [vqa_accuracy(*pair) for pair in pairs]}
    each |= {
        "exact": [float(exact_answer(*pair)) for pair in pairs],
        "anls": [anls(*pair) for pair in pairs],
    }
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        kinds[question.kind].append(number)
    by_kind = {
        kind: _means({name: [values[i] for i in numbers] for name, values in each.items()})
        for kind, numbers in kinds.items()
        if kind
    }
    return AnswerScores(_means(each), each, by_kind, few)


def _few(people: Sequence[Sequence[str]]) -> list[str]:
    """Why there is no VQA accuracy, or nothing."""
    count = sum(len(given) < LEAST for given in people)
    note = (
        f"VQA accuracy leaves one person out and wants {PEOPLE} others who agree, so it needs {LEAST} answers of "
        f"people a question: {count} of {len(people)} questions have fewer"
    )
    return [note] if count else []


def most_frequent(questions: Sequence[Question]) -> str:
    """The answer that people give most often: what a model that looks at nothing would say.

    Counted as it is scored, normalised, and given in its most frequent spelling.
    """
    spelled: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        for text in question.answers:
            spelled[normal(text)][text] += 1
    return max(spelled.values(), key=Counter.total).most_common(1)[0][0]


def _means(each: Mapping[str, list[float]]) -> dict[str, float | None]:
    return {name: 100 * sum(each[name]) / len(each[name]) if name in each else None for name in TITLES}
