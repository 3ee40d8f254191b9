"""Scores of short answers: VQA accuracy with the official normalisation, exact match, ANLS.

VQA: Antol et al. 2015 (arXiv 1505.00468) and the evaluation code published with it: an answer is right to min(1, n / 3)
for the n people who gave it, mean over all ways to leave one of them out. ANLS: Biten et al. 2019 (arXiv 1905.13648).
"""

import re
from collections.abc import Sequence

PEOPLE = 3  # so many who gave it make an answer right
LEAST = PEOPLE + 1  # people from whom on an answer can be right wholly, as one of them is left out
ANLS_LEAST = 0.5

_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate(["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 1)
}
_SHORT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've"""


def _contractions() -> dict[str, str]:
    """Each contraction by what is left when one of its apostrophes is forgotten."""
    found: dict[str, str] = {}
    for word in _SHORT.split():
        found |= {word[:at] + word[at + 1 :]: word for at, letter in enumerate(word) if letter == "'"}
    return found | {"somebody'd": "somebodyd"}  # the official table has this one the other way round


_CONTRACTIONS = _contractions()
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")


def normal(answer: str) -> str:
    """An answer as the official code compares it: without punctuation and articles, with digits and apostrophes."""
    text = found = tidy(answer)
    commas = _COMMA.search(text) is not None
    for sign in _PUNCTUATION:
        apart = f"{sign} " in text or f" {sign}" in text
        found = found.replace(sign, "" if apart or commas else " ")
    found = _PERIOD.sub("", found, count=32)  # the official code means a flag by 32 and gives a count
    words = (_NUMBERS.get(word, word) for word in found.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def tidy(answer: str) -> str:
    """On one line, as the official code reads answers."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """0 to 1. Where all people say the same, letter for letter, so must the answer. ValueError: nobody has answered."""
    if not people:
        raise ValueError("vqa_accuracy: there is no answer to compare with")
    given, wanted = tidy(answer), [tidy(other) for other in people]
    if len(set(wanted)) > 1:
        given, wanted = normal(answer), [normal(other) for other in people]
    agree = sum(other == given for other in wanted)
    # Leaving one of those who agree out leaves one less of them.
    left = agree * min(1, (agree - 1) / PEOPLE) + (len(people) - agree) * min(1, agree / PEOPLE)
    return left / len(people)


def exact_answer(answer: str, people: Sequence[str]) -> bool:
    """Whether the answer is one of those given, both normalised. ValueError: nobody has answered."""
    if not people:
        raise ValueError("exact_answer: there is no answer to compare with")
    return normal(answer) in {normal(other) for other in people}


def anls(answer: str, people: Sequence[str]) -> float:
    """Likeness by letters, 0 to 1, to the answer it is most like; 0 below one half. ValueError: nobody has answered."""
    if not people:
        raise ValueError("anls: there is no answer to compare with")
    best = max(_likeness(" ".join(answer.lower().split()), " ".join(other.lower().split())) for other in people)
    return best if best >= ANLS_LEAST else 0.0


def _likeness(text: str, other: str) -> float:
    longest = max(len(text), len(other))
    return 1 - _edits(text, other) / longest if longest else 1.0


def _edits(text: str, other: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(text, 1):
        diagonal, row[0] = row[0], number
        for at, second in enumerate(other, 1):
            diagonal, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, diagonal + (letter != second))
    return row[-1]
