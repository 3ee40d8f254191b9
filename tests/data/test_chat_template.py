"""The Jinja of a template renders, in transformers, what our templates put together."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from vlm.data.chat_template import chat_template
from vlm.data.talk import Talk, read_talk
from vlm.data.template import TEMPLATES, Literal, Piece, Template, exchanges
from vlm.data.text import train_bpe

IMAGE, PART = "<image>", {"type": "image"}
OWN = Template(user="Q {text}\n", answer="A: {text}", system="[{system}] ", image="<i>{image}</i>", after="\n")
CASES = {
    **TEMPLATES,
    "own": OWN,
    "own system": replace(OWN, default_system='Say "no" {% set x %}\\'),
    "gathered": replace(OWN, user="{image}Q {text}", gap="|"),
}


def said(*parts: str | dict[str, str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


TALKS: dict[str, list[dict[str, Any]]] = {
    "one picture": [{"role": "user", "content": said(PART, "What is it?")}],
    "picture last": [{"role": "user", "content": said(" What is it? ", PART)}],
    "two pictures": [{"role": "user", "content": said("First ", PART, " then ", PART, " which? ")}],
    "no words": [{"role": "user", "content": said(PART, PART)}],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": said(PART, "What is it?")},
        {"role": "assistant", "content": said("a {{ drum }}")},
        {"role": "user", "content": "Sure?"},
    ],
}


def ours(template: Template, messages: list[dict[str, Any]], bos: str, eos: str) -> str:
    """What our encoder is given, control tokens by their names."""
    # A talk is read from records, which have answers.
    whole = read_talk({"messages": [*messages, {"role": "assistant", "content": "x"}]})
    talk, text = Talk(whole.turns[:-1], whole.system), ""

    def spelt(piece: Piece) -> str:
        if isinstance(piece, Literal):
            return piece.text.replace("{bos}", bos).replace("{eos}", eos)
        return IMAGE if piece is None else piece

    for pieces, answer in exchanges(template, talk):
        text += "".join(map(spelt, pieces))
        text = text.rstrip(" ") if answer is None else text + answer + spelt(Literal(template.end))
    return text


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", CASES)
def test_renders_our_texts(name: str, talk: str) -> None:
    template, messages = CASES[name], TALKS[talk]
    inner = train_bpe(["a drum"], 270).inner
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    given = chat_template(template, IMAGE)
    options: dict[str, Any] = {"chat_template": given, "tokenize": False, "add_generation_prompt": True}
    found = tokenizer.apply_chat_template(messages, **options)
    assert found == ours(template, messages, "<bos>", "<eos>")
