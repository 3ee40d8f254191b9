"""Templates: what may be written, and where pictures and words of a turn stand."""

from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from vlm import build_data
from vlm.config.pictures import Published
from vlm.config.pictures import Template as Setting
from vlm.data.talk import Talk, Turn, ask
from vlm.data.template import TEMPLATES, Literal, Template, exchanges


def _text(template: Template, talk: Talk) -> str:
    found = ""
    for before, answer in exchanges(template, talk):
        found += "".join("<image>" if one is None else one.text if isinstance(one, Literal) else one for one in before)
        found += "" if answer is None else answer + template.end
    return found


TWO = Talk(
    (Turn("user", ("Is ", None, " as ", None, "?\n")), Turn("assistant", (" no ",)), Turn("user", (None, "\nhow?")))
)
EXPECTED = {
    "plain": "{bos}<image><image>no\n<image>",
    "vicuna_v1": "{bos}" + TEMPLATES["vicuna_v1"].default_system + " USER: Is <image> as <image>? ASSISTANT: no{eos}"
    "USER: <image>\nhow? ASSISTANT: ",
    "llama3": "{bos}<|start_header_id|>user<|end_header_id|>\n\nIs <image> as <image>?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nno<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nhow?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nIs <image> as <image>?"
    "<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\n<image>\nhow?<|im_end|>\n<|im_start|>assistant\n",
    "blip2_question": "<image><image>{bos}Question: Is  as ? Answer: no\n<image>{bos}Question: how? Answer: ",
    "minigpt4": "{bos}###Human: <Img><image></Img> <Img><image></Img> Is  as ? ###Assistant:  no###"
    "Human: <Img><image></Img> how? ###Assistant:  ",
    "instructblip": "<image><image>{bos}Is  as ? no{eos}<image>{bos}how? ",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_published_templates(name: str) -> None:
    assert _text(TEMPLATES[name], TWO) == EXPECTED[name]


def test_a_picture_without_words() -> None:
    shown = _text(TEMPLATES["vicuna_v1"], ask("", 1))
    assert shown.endswith("USER: <image> ASSISTANT: ")  # LLaVA strips the line's end after it


def test_lines_and_names() -> None:
    assert _text(Template.of("see {image} a photo of {text}"), ask("", 1, "x")) == "{bos}see<image> a photo of x{eos}"
    assert Template.of("{text}").shows_images is False
    assert Template.of("chatml") is TEMPLATES["chatml"] and Template.of(TEMPLATES["plain"]) is TEMPLATES["plain"]
    with pytest.raises(ValueError, match="template 'vicuna': neither one of plain, vicuna_v1"):
        Template.of("vicuna")


def test_every_mistake_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        Template(user="{txt}{image}{image}", answer="a {text}.", image="img", system="x", end="", stop=("",))
    text = str(caught.value)
    for part in (
        "user: {txt} is unknown; use {image}, {text}, {bos}, {eos}",
        "user: it holds {image} 2 times, at most once",
        "answer: {text} must be its end",
        "image: it holds no {image}",
        "system: it holds no {system}",
        "end: empty",
        "stop: one of the strings is empty",
    ):
        assert part in text


def test_settings_are_the_same() -> None:
    assert set(get_args(Published)) == set(TEMPLATES)
    read = TypeAdapter(Setting)
    own: dict[str, Any] = {"user": "Q: {image}{text}\n", "answer": "A: {text}", "end": "\n", "stop": ["Q:"]}
    made = build_data.template(read.validate_python(own))
    assert made == Template(user="Q: {image}{text}\n", answer="A: {text}", end="\n", stop=("Q:",))
    assert build_data.template(read.validate_python("plain")) is TEMPLATES["plain"]
    with pytest.raises(ValidationError, match="did you mean 'vicuna_v1'"):
        read.validate_python("vicuna_v2")
    with pytest.raises(ValidationError, match="extra_forbidden"):
        read.validate_python(own | {"sytem": ""})
