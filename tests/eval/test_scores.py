"""Caption scores against COCO's own output and plain recomputations; statistics; METEOR's and SPICE's conditions."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from vlm.eval import java
from vlm.eval.bleu import bleu
from vlm.eval.caption import repetition, statistics
from vlm.eval.caption_scores import as_table, score_captions, tokenize_groups
from vlm.eval.cider import ONE_IMAGE, each_cider_d, frequencies
from vlm.eval.grams import count
from vlm.eval.rouge import rouge_l
from vlm.eval.words import tokenize, tokenize_all

HERE = Path(__file__).parent
GOLDEN: dict[str, Any] = json.loads((HERE / "golden_captions.json").read_text(encoding="utf-8"))
SAMPLES = GOLDEN["samples"]
WORDS = st.lists(st.sampled_from(["a", "red", "bus", "on", "the", "road"]), max_size=9)
SETS = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=6)


def test_words_equal_coco() -> None:
    texts, wanted = zip(*GOLDEN["lines"], strict=True)
    found = [" ".join(words) for words in tokenize_all(texts)]
    assert len(texts) > 3000
    assert [pair for pair in zip(texts, wanted, found, strict=True) if pair[1] != pair[2]] == []


def test_words_of_samples_equal_coco() -> None:
    assert [" ".join(words) for words in tokenize_all([s["candidate"] for s in SAMPLES])] == [
        s["words"] for s in SAMPLES
    ]
    groups = tokenize_groups([s["references"] for s in SAMPLES])
    assert [[" ".join(words) for words in group] for group in groups] == [s["reference_words"] for s in SAMPLES]


@pytest.mark.parametrize("case", GOLDEN["sets"], ids=lambda case: f"{case['samples'][0]}-{len(case['samples'])}")
def test_scores_equal_coco(case: dict[str, Any]) -> None:
    words = [SAMPLES[i]["words"].split() for i in case["samples"]]
    references = [[text.split() for text in SAMPLES[i]["reference_words"]] for i in case["samples"]]
    counted, each = count(words, references), case["each"]
    found = bleu(counted)
    np.testing.assert_allclose(found.together, case["bleu"], atol=1e-6)
    np.testing.assert_allclose(found.each.T, each["bleu"], atol=1e-6)
    np.testing.assert_allclose(each_cider_d(counted), each["cider_d"], atol=1e-6)
    own = [rouge_l(*pair) for pair in zip(words, references, strict=True)]
    np.testing.assert_allclose(own, each["rouge_l"], atol=1e-6)
    assert np.mean(own) == pytest.approx(case["rouge_l"], abs=1e-6)
    assert each_cider_d(counted).mean() == pytest.approx(case["cider_d"], abs=1e-6)


def longest(text: list[str], other: list[str]) -> int:
    """The longest common subsequence by the textbook."""
    if not text or not other:
        return 0
    if text[-1] == other[-1]:
        return longest(text[:-1], other[:-1]) + 1
    return max(longest(text[:-1], other), longest(text, other[:-1]))


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=7), st.lists(st.sampled_from("abc"), min_size=1, max_size=7)
)
def test_rouge_is_the_definition(text: list[str], other: list[str]) -> None:
    common = longest(text, other)
    precision, recall = common / len(text), common / len(other)
    wanted = 2.44 * precision * recall / (recall + 1.44 * precision) if common else 0.0
    assert rouge_l(text, [other]) == pytest.approx(wanted)


@given(SETS)
def test_bleu_is_the_definition(samples: list[tuple[list[str], list[list[str]]]]) -> None:
    matches, guessed, length, closest = [0] * 4, [0] * 4, 0, 0

    def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))

    for candidate, references in samples:
        length += len(candidate)
        closest += min((abs(len(r) - len(candidate)), len(r)) for r in references)[1]
        for n in range(1, 5):
            most = {gram: max(grams(r, n)[gram] for r in references) for gram in grams(candidate, n)}
            matches[n - 1] += sum(min(many, most[gram]) for gram, many in grams(candidate, n).items())
            guessed[n - 1] += max(0, len(candidate) - n + 1)
    found = bleu(count([s[0] for s in samples], [s[1] for s in samples])).together
    product = 1.0
    for n in range(4):
        product *= (matches[n] + 1e-15) / (guessed[n] + 1e-9)
        ratio = (length + 1e-15) / (closest + 1e-9)
        assert found[n] == pytest.approx(
            product ** (1 / (n + 1)) * (np.exp(1 - 1 / ratio) if ratio < 1 else 1), abs=1e-9
        )


@given(SETS, st.randoms())
def test_scores_do_not_depend_on_the_order(samples: list[tuple[list[str], list[list[str]]]], random: Any) -> None:
    order = list(range(len(samples)))
    random.shuffle(order)
    plain, mixed = (
        count([s[0] for s in some], [s[1] for s in some]) for some in (samples, [samples[i] for i in order])
    )
    np.testing.assert_allclose(bleu(mixed).together, bleu(plain).together, atol=1e-9)
    np.testing.assert_allclose(each_cider_d(mixed), each_cider_d(plain)[order], atol=1e-9)


def test_the_line_after_decides_whether_a_sentence_ends() -> None:
    assert tokenize("the letter x.") == ["the", "letter", "x."]
    assert tokenize("the letter x.", "A dog") == ["the", "letter", "x"]
    assert tokenize("the letter x.", "a dog") == ["the", "letter", "x."]
    assert tokenize_all(["letter x.", "The dog"]) == [["letter", "x"], ["the", "dog"]]


def test_emoji_beyond_the_basic_plane_are_no_words() -> None:
    assert tokenize("a 😀 smile") == ["a", "smile"]


@pytest.mark.parametrize("text", ["@" * 10_000, ";" * 10_000, "a." * 5_000, "<a " * 3_000, "a'" * 5_000, "(1" * 5_000])
def test_endless_captions_take_no_endless_time(text: str) -> None:
    assert len(tokenize(text)) <= len(text)


def test_fixed_document_frequencies() -> None:
    references = [[s.split() for s in SAMPLES[i]["reference_words"]] for i in range(30)]
    words = [SAMPLES[i]["words"].split() for i in range(30)]
    whole, fixed = each_cider_d(count(words, references)), frequencies(references)
    np.testing.assert_allclose(each_cider_d(count(words, references), fixed), whole, atol=1e-12)
    for i in range(30):  # one image by itself scores what it does among all
        assert each_cider_d(count([words[i]], [references[i]]), fixed)[0] == pytest.approx(whole[i], abs=1e-12)
    with pytest.raises(ValueError, match="document frequencies of 1 image: at least 2 are needed"):
        frequencies(references[:1])


def test_one_image_is_explained() -> None:
    found = score_captions(["a red bus"], [["a red bus"]], java=False)
    assert found.metrics["cider_d"] == 0 and found.metrics["bleu_3"] == pytest.approx(1)
    assert found.notes[0] == ONE_IMAGE
    assert ONE_IMAGE not in score_captions(["a"] * 2, [["a"], ["b"]], java=False).notes
    two = frequencies([[["a", "red", "bus"]], [["a", "dog"]]])
    fixed = score_captions(["a red bus"], [["a red bus"]], two, java=False)
    assert fixed.metrics["cider_d"] == pytest.approx(7.5) and ONE_IMAGE not in fixed.notes


def test_scores_under_coco_names_and_as_a_table() -> None:
    found = score_captions(["a red bus", "a dog"], [["a red bus"], ["a cat"]], cut=[True, False], java=False)
    assert found.coco["CIDEr"] == found.metrics["cider_d"] and found.coco["METEOR"] is None
    assert list(found.coco) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE"]
    lines = as_table(found).splitlines()
    assert lines[0] == f"  BLEU-1  {found.metrics['bleu_1']:.4f}" and "  METEOR  –" in lines
    assert lines[-1].split() == ["ended", "at", "the", "limit,", "%", "50.0", "–"]


def test_statistics_by_hand() -> None:
    assert repetition(["a", "b", "a", "b"], 2) == pytest.approx(1 / 3)
    assert repetition(["a"], 2) == 0
    found = statistics([["a", "b", "a", "b"], ["a"], ["a"], []], cut=[True, False, False, False])
    assert found["words"] == {"mean": 1.5, "min": 0, "max": 4}
    assert found["lengths"] == [1, 2, 0, 0, 1]
    assert found["repeated"]["1"] == pytest.approx(12.5) and found["repeated"]["4"] == 0
    assert (found["vocabulary"], found["identical"], found["distinct"]) == (2, 50, 75)
    assert (found["empty"], found["at_limit"]) == (1, 25)
    assert statistics([["a"]])["at_limit"] is None
    with pytest.raises(ValueError, match="no caption to count"):
        statistics([])


def test_why_meteor_and_spice_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert java.missing("meteor") == "METEOR is a Java program and no java was found on PATH"
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    assert java.missing("spice") == ("SPICE comes with pycocoevalcap, which is not installed: pip install 'vlm[coco]'")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    (tmp_path / "pycocoevalcap" / "meteor").mkdir(parents=True)
    for name in ("__init__.py", "meteor/__init__.py"):
        (tmp_path / "pycocoevalcap" / name).touch()
    (tmp_path / "pycocoevalcap" / "meteor" / "meteor.py").write_text(
        "class Meteor:\n    def compute_score(self, gts, res):\n"
        "        print('noise')\n        return 0.25, [0.5, 0.5]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    assert java.missing("meteor") is None
    assert "stanford-corenlp-3.6.0-models.jar" in str(java.missing("spice"))
    found = score_captions(["a", "b"], [["a"], ["b"]])
    assert (found.metrics["meteor"], found.each["meteor"], found.metrics["spice"]) == (0.25, [0.5, 0.5], None)
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)


def test_what_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match="2 captions, 1 of: list of references; give one list of references"):
        count([["a"], ["b"]], [[["a"]]])
    with pytest.raises(ValueError, match="caption 1 has no reference"):
        count([["a"], ["b"]], [[["a"]], []])
