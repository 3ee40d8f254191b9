"""Questions and answers about the quickstart's pictures, made of their metadata alone."""

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from vlm.data.encode import encode_prompt
from vlm.data.text import Encoded, Tokenizer

NAME, CATEGORY = "What is shown in this picture?", "Which category does this belong to?"
# A language model repeats what follows the same words. A picture is to say its name and its category as two lines
# would; with these words in its place SmolLM2 gives 94 % of names and 79 % of categories back, without any training.
FORMS = {NAME: "\n{question}\nPicture: {{text}}", CATEGORY: "\n{question}\nCategory: {{text}}"}
NAMED, FILED = 4, 3  # tokens of a picture that say its name and its category
BETWEEN = "\nCategory:"
LONGEST = 128  # tokens of a text, without the picture's


class Turn(NamedTuple):
    """One question and its answer."""

    question: str
    answer: str


def category(fields: Mapping[str, Any]) -> str:
    """A picture's group in words: "food-drink" is "food and drink"."""
    words = str(fields["group"]).split("-")
    return " and ".join(words) if len(words) == 2 else " ".join(words)


def turns(fields: Mapping[str, Any], chooser: random.Random) -> list[Turn]:
    """Name and category, in random order, so that neither answer can always be read off the other."""
    found = [Turn(NAME, str(fields["caption"])), Turn(CATEGORY, category(fields))]
    chooser.shuffle(found)
    return found


def picture_tokens(tokenizer: Tokenizer) -> int:
    """How many tokens `spelled` gives."""
    return NAMED + len(tokenizer.encode(BETWEEN)) + FILED


def spelled(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> list[int]:
    """What the tokens of a picture should say: its name and its category on two lines, cut or filled up."""
    line = tokenizer.encode("\n")
    name, kind = tokenizer.encode(f" {fields['caption']}"), tokenizer.encode(f" {category(fields)}")
    return [*(name + line * NAMED)[:NAMED], *tokenizer.encode(BETWEEN), *(kind + line * FILED)[:FILED]]


def template(question: str) -> str:
    """What `describe` takes to ask one question about a picture."""
    return "Picture:{image}" + FORMS[question].format(question=question)


def conversation(tokenizer: Tokenizer, asked: list[Turn], image_tokens: int) -> Encoded:
    """The picture once, then all questions; only answers and their ends are supervised."""
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in asked:
        form = FORMS[question].format(question=question) if ids else template(question)
        turn = encode_prompt(tokenizer, form, answer, image_tokens, LONGEST)
        start = 1 if ids else 0  # a conversation begins once
        ids, labels = ids + turn.ids[start:], labels + turn.labels[start:]
    return Encoded(ids, labels)
