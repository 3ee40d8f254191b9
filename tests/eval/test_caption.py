"""CIDEr-D against COCO's own output, a naive recomputation and hand-worked cases; exact names; signs of collapse."""

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vlm.eval.caption import exact, identical, mean_words
from vlm.eval.cider import cider_d
from vlm.eval.words import tokenize

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_cider.json").read_text(encoding="utf-8"))
WORDS = st.lists(st.sampled_from(["a", "red", "bus", "on", "the", "road"]), max_size=9).map(" ".join)
SAMPLES = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=6)


def naive(candidates: list[str], references: list[list[str]]) -> float:
    """The definition, written with dense vectors over all n-grams of the set and no shared helper."""

    def grams(text: str, n: int) -> list[str]:
        words = text.split()
        return ["_".join(words[at : at + n]) for at in range(len(words) - n + 1)]

    total = 0.0
    for candidate, group in zip(candidates, references, strict=True):
        for reference in group:
            for n in (1, 2, 3, 4):
                vocabulary = sorted(set(grams(candidate, n) + grams(reference, n)))
                holders = {g: sum(any(g in grams(r, n) for r in other) for other in references) for g in vocabulary}
                idf = {g: math.log(len(references) / max(1, holders[g])) for g in vocabulary}
                x = [grams(candidate, n).count(g) * idf[g] for g in vocabulary]
                y = [grams(reference, n).count(g) * idf[g] for g in vocabulary]
                size = math.hypot(*x) * math.hypot(*y)
                cosine = sum(min(a, b) * b for a, b in zip(x, y, strict=True)) / size if size else 0.0
                gap = max(len(candidate.split()) - 1, 0) - max(len(reference.split()) - 1, 0)
                total += 10 / 4 * cosine * math.exp(-(gap**2) / 72) / len(group)
    return total / len(candidates)


@pytest.mark.parametrize("case", GOLDEN["sets"], ids=lambda case: str(case["samples"]))
def test_cider_d_equals_coco(case: dict[str, Any]) -> None:
    samples = [GOLDEN["samples"][at] for at in case["samples"]]
    ours = cider_d([s["candidate"] for s in samples], [s["references"] for s in samples])
    assert ours == pytest.approx(case["cider_d"], abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN["tokens"], ids=lambda case: case["text"][:30])
def test_tokens_equal_coco(case: dict[str, str]) -> None:
    assert " ".join(tokenize(case["text"])) == case["words"]


@given(SAMPLES)
def test_cider_d_equals_the_definition(samples: list[tuple[str, list[str]]]) -> None:
    candidates, references = [s[0] for s in samples], [s[1] for s in samples]
    assert cider_d(candidates, references) == pytest.approx(naive(candidates, references), abs=1e-9)


def test_cider_d_by_hand() -> None:
    # Two samples that share nothing: every n-gram has idf ln 2, which cancels in the cosine.
    assert cider_d(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]]) == pytest.approx(10)
    # Cosines of n = 1..4 are 3/4, 2/3, 1/2 and 0; the other sample is wrong in every word.
    assert cider_d(["a b c x", "z"], [["a b c d"], ["e"]]) == pytest.approx(10 * (3 / 4 + 2 / 3 + 1 / 2) / 4 / 2)
    # A missing last word: 3 of sqrt(3 * 4), 2 of sqrt(2 * 3), 1 of sqrt(2), none of n = 4; one word shorter.
    cosines = 3 / math.sqrt(12) + 2 / math.sqrt(6) + 1 / math.sqrt(2)
    assert cider_d(["a b c", "z"], [["a b c d"], ["e"]]) == pytest.approx(10 * cosines / 4 * math.exp(-1 / 72) / 2)


def test_what_surprises_in_cider_d_stays_so() -> None:
    assert cider_d(["a b c d"], [["a b c d"]]) == 0  # one sample: log 1
    assert cider_d(["a", "b"], [["a"], ["b"]]) == pytest.approx(2.5)  # one word has no longer n-grams
    assert cider_d(["", "b"], [["a"], ["b"]]) == pytest.approx(1.25)  # an empty caption scores nothing


def test_cider_d_refuses_what_it_cannot_score() -> None:
    with pytest.raises(ValueError, match="2 captions, 1 of: list of references"):
        cider_d(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="at least one"):
        cider_d([], [])
    with pytest.raises(ValueError, match="caption 1 has no reference"):
        cider_d(["a", "b"], [["a"], []])


@given(st.text(alphabet=st.sampled_from("abnotsyAIT'\".,!?-:;… 019$#@/’“é"), max_size=24))
def test_no_letter_is_lost(text: str) -> None:
    words = tokenize(text)
    assert [letter for word in words for letter in word if letter.isalnum()] == list(filter(str.isalnum, text.lower()))
    assert not {"", ".", "?", ",", "!", "--", "..."} & set(words)


def test_brackets_that_were_tokenized_before() -> None:
    assert tokenize("a -lrb- b -RRB-") == ["a", "-lrb-", "b", "-rrb-"]


def test_exact_folds_case_and_space_only() -> None:
    assert exact(["Grinning  Face ", "cat", "a cat"], ["grinning face", "cat", "cat"]) == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="1 captions, 2 of: name"):
        exact(["a"], ["a", "b"])


def test_signs_of_collapse() -> None:
    assert identical(["a cat", "A  cat", "dog", "bird"]) == 50
    assert mean_words(["a cat.", "the dog's toy, red"]) == 3.5
    for score in (identical, mean_words):
        with pytest.raises(ValueError, match="no caption"):
            score([])
