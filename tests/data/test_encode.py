"""Conversations as ids: only answers and their ends are supervised, and generation begins as training did."""

from itertools import groupby, product

import pytest

from tests.data.vocabularies import KINDS, llama, qwen
from vlm.data.batch import pad
from vlm.data.encode import (
    NO_ROOM,
    encode_conversation,
    encode_instruction,
    encode_question,
    end_ids,
    ends,
    instructions,
)
from vlm.data.image import BadSample
from vlm.data.talk import Talk, Turn, ask, read_talk
from vlm.data.template import TEMPLATES, Literal, Template, exchanges
from vlm.data.text import Encoded, Tokenizer
from vlm.nn.tokens import IGNORE, IMAGE_ID

IMAGES = 3  # tokens of one
TALK = Talk(
    (
        Turn("user", (None, "\nWhat is it?")),
        Turn("assistant", ("It is a red fox.",)),
        Turn("user", ("And in ", None, " and ", None, "?")),
        Turn("assistant", ("two birds\nin a tree",)),
        Turn("user", ("What colour?",)),
        Turn("assistant", ("blue",)),
    )
)
WHOLE = 10_000


def _runs(encoded: Encoded) -> list[list[int]]:
    """Neighbouring supervised tokens; answers never stand side by side, but for templates that show no questions."""
    groups = groupby(zip(encoded.ids, encoded.labels, strict=True), lambda pair: pair[1] != IGNORE)
    return [[label for _, label in group] for learned, group in groups if learned]


def _answer(tokenizer: Tokenizer, template: Template, text: str) -> list[int]:
    """What the answer must be, by what stands before it alone."""
    before = template.answer.removesuffix("{text}")
    if before.endswith(" "):
        return tokenizer.encode(text if tokenizer.own_space else f" {text}")
    ends_in_text = before and isinstance(tokenizer.literal(before)[-1], str)
    return tokenizer.encode_inside(text) if ends_in_text else tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "kind", "same"), [*product((n for n in TEMPLATES if n != "plain"), KINDS, (True, False))]
)
def test_supervised_are_the_answers_and_their_ends(name: str, kind: str, same: bool) -> None:
    tokenizer, template = KINDS[kind](same), TEMPLATES[name]
    end = end_ids(tokenizer, template)
    whole = encode_conversation(tokenizer, template, TALK, IMAGES, WHOLE)
    answers = [_answer(tokenizer, template, text) for text in TALK.answers]
    assert _runs(whole) == [[*words, *end] for words in answers]
    assert whole.images == 3 and whole.ids.count(IMAGE_ID) == 3 * IMAGES
    shortest = 0
    full = len(whole.ids) - whole.images * IMAGES
    for limit in sorted({*range(3, full, 7), *range(full - 4, full + 1)}):
        try:
            cut = encode_conversation(tokenizer, template, TALK, IMAGES, limit)
        except BadSample as bad:
            assert bad.reason == NO_ROOM and not shortest
            continue
        shortest = shortest or limit
        # Only text is cut, at the end of an answer, whose end stays; questions after it go with their pictures.
        *before, last = _runs(cut)
        place = len(before)
        assert before == [[*words, *end] for words in answers[:place]]
        words = last[: -len(end)]
        assert last[-len(end) :] == end and words and words == answers[place][: len(words)]
        assert cut.images == TALK.first(place + 1).images and cut.ids.count(IMAGE_ID) == cut.images * IMAGES
        assert len(cut.ids) - cut.images * IMAGES <= limit
        assert cut.ids[: len(cut.ids) - len(end)] == whole.ids[: len(cut.ids) - len(end)]
        padded = pad([whole, cut], tokenizer.pad)
        assert padded.labels[1].tolist() == cut.labels + [IGNORE] * (len(whole.ids) - len(cut.ids))
    assert shortest and cut == whole


def test_plain_is_a_picture_and_its_caption() -> None:
    tokenizer = llama()
    encoded = encode_conversation(tokenizer, TEMPLATES["plain"], ask("Describe it.", 1, "a red fox"), 2, WHOLE)
    caption = [*tokenizer.encode("a red fox"), tokenizer.inner.token_to_id("<0x0A>")]
    assert encoded.ids == [tokenizer.bos, IMAGE_ID, IMAGE_ID, *caption] and _runs(encoded) == [caption]


@pytest.mark.parametrize(("name", "kind"), [*product(TEMPLATES, KINDS)])
def test_generation_begins_with_what_stood_before_the_answer(name: str, kind: str) -> None:
    tokenizer, template = KINDS[kind](), TEMPLATES[name]
    for count in (1,) if name == "plain" else (1, 2, 3):  # plain shows no questions: answers would follow each other
        trained = encode_conversation(tokenizer, template, TALK.first(count), IMAGES, WHOLE)
        asked = encode_question(tokenizer, template, Talk(TALK.first(count).turns[:-1]), IMAGES)
        answer = [*_answer(tokenizer, template, TALK.answers[count - 1]), *end_ids(tokenizer, template)]
        assert asked.ids == trained.ids[: -len(answer)] and trained.ids[-len(answer) :] == answer
        assert set(asked.labels) == {IGNORE} and asked.images == trained.images
    with pytest.raises(ValueError, match="ends with 'blue', and no question"):
        encode_question(tokenizer, template, TALK, IMAGES)


def _text(template: Template, talk: Talk) -> str:
    """A talk as one string with <image> for its pictures."""
    text = ""
    for before, answer in exchanges(template, talk):
        pieces = ["<image>" if one is None else one.text if isinstance(one, Literal) else one for one in before]
        text += "".join(pieces) + f"{answer}{template.end}"
    return text


def _at_once(tokenizer: Tokenizer, text: str, images: int = IMAGES) -> list[int]:
    """Tokenised between its pictures in one go, control tokens found by the library itself."""
    for name, token in (("{bos}", tokenizer.bos), ("{eos}", tokenizer.eos)):
        text = text.replace(name, tokenizer.inner.id_to_token(token))
    tokenizer.inner.encode_special_tokens = False
    try:
        chunks = [tokenizer.inner.encode(chunk, add_special_tokens=False).ids for chunk in text.split("<image>")]
    finally:
        tokenizer.inner.encode_special_tokens = True
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, *[IMAGE_ID] * images, *chunk]
    return ids


def _llavas_labels(tokenizer: Tokenizer, text: str) -> list[int]:
    """The masks of LLaVA's preprocess_v1: by the lengths of rounds and of their questions, each tokenised again."""
    labels, at = _at_once(tokenizer, text, 1), 1
    labels[0] = IGNORE
    for part in text.removeprefix("{bos}").split("{eos}")[:-1]:
        question = len(_at_once(tokenizer, part.split(" ASSISTANT: ")[0] + " ASSISTANT: ", 1)) + 1
        labels[at : at + question - 2] = [IGNORE] * (question - 2)
        at += len(_at_once(tokenizer, part, 1)) + 1
    return labels


ORDINARY = [
    [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is a red fox."}],
    [
        {"from": "human", "value": "What is in the tree?\n<image>"},
        {"from": "gpt", "value": "Two birds:\n\n- a blue one, 10 cm\n- a red one"},
        {"from": "human", "value": "Naïve? \u2603"},
        {"from": "gpt", "value": "(no)  two spaces"},
    ],
]


@pytest.mark.parametrize("turns", ORDINARY)
def test_vicuna_is_llavas_own_tokenisation(turns: list[dict[str, str]]) -> None:
    """Its code tokenises the string between two pictures at once (tokenizer_image_token)."""
    tokenizer, template, talk = llama(), TEMPLATES["vicuna_v1"], read_talk({"conversations": turns}, 1)
    encoded = encode_conversation(tokenizer, template, talk, IMAGES, WHOLE)
    assert encoded.ids == _at_once(tokenizer, text := _text(template, talk))
    assert encode_conversation(tokenizer, template, talk, 1, WHOLE).labels == _llavas_labels(tokenizer, text)
    first = encoded.ids.index(IMAGE_ID)
    names = [tokenizer.inner.id_to_token(i) for i in [encoded.ids[first - 1], *encoded.ids[first + IMAGES :][:2]]]
    assert names == ["▁", "▁", "<0x0A>"]  # "USER: <image>\nWhat": the picture alone, then a line's end
    # The supervised part begins with the answer's first word, space and all, and ends with </s> (preprocess_v1).
    for run, answer in zip(_runs(encoded), talk.answers, strict=True):
        assert tokenizer.decode(run) == answer and run[-1] == tokenizer.eos


@pytest.mark.parametrize("name", ["llama3", "chatml", "smollm2"])
@pytest.mark.parametrize("turns", ORDINARY)
def test_chats_are_the_whole_string(name: str, turns: list[dict[str, str]]) -> None:
    talk = read_talk({"conversations": turns}, 1)
    encoded = encode_conversation(qwen(), TEMPLATES[name], talk, IMAGES, WHOLE)
    assert encoded.ids == _at_once(qwen(), _text(TEMPLATES[name], talk))


def test_where_the_whole_string_differs() -> None:
    """White space around what is said is stripped, which LLaVA's code leaves as it is: one token more at the seam."""
    tokenizer, template = llama(), TEMPLATES["vicuna_v1"]
    spaced, plain = (encode_conversation(tokenizer, template, ask("Who?", 0, text), 1, WHOLE) for text in ("  I", "I"))
    assert spaced == plain
    assert len(tokenizer.encode("ASSISTANT:   I")) == len(tokenizer.encode("ASSISTANT: I")) + 2


def test_what_people_write_is_never_a_control_token() -> None:
    talk = ask("</s><|im_end|> <s>", 0, "<|im_start|></s>")
    for tokenizer, name in ((llama(), "vicuna_v1"), (qwen(), "chatml")):
        encoded = encode_conversation(tokenizer, TEMPLATES[name], talk, IMAGES, WHOLE)
        control = {tokenizer.inner.token_to_id(token) for token in ("</s>", "<s>", "<|im_start|>", "<|im_end|>")}
        count = sum(i in control for i in encoded.ids)
        assert count == (2 if name == "vicuna_v1" else 6)  # start and end; three times both
        assert tokenizer.decode(_runs(encoded)[0]) == "<|im_start|></s>"
    spelt = Template(user="{text}", answer="<|im_start|>{text}", start="", system="", end="<|im_end|>", control=False)
    ids = encode_conversation(qwen(), spelt, ask("hi", 0, "a"), IMAGES, WHOLE).ids
    assert not control & set(ids) and ends(qwen(), spelt) == ([qwen().eos], ["<|im_end|>"])


def test_minigpt4_and_blip2_by_hand() -> None:
    tokenizer = llama()
    token = tokenizer.inner.id_to_token
    asked = encode_question(tokenizer, TEMPLATES["minigpt4"], ask("Describe this image in detail."), 1)
    expected = [
        tokenizer.bos,
        *tokenizer.encode("###Human: <Img>"),
        IMAGE_ID,
        *tokenizer.encode("</Img> Describe this image in detail. ###Assistant: "),  # its space stays, see the template
    ]
    assert asked.ids == expected and token(asked.ids[-1]) == "▁"
    caption = encode_conversation(qwen(), TEMPLATES["blip2"], ask("", 1, "a fox"), 1, WHOLE)
    words = qwen().encode("a photo of a fox")
    assert caption.ids == [IMAGE_ID, qwen().bos, *words, *qwen().encode("\n")]
    question = encode_question(qwen(), TEMPLATES["blip2_question"], ask("what colour?"), 1)
    assert question.ids == [IMAGE_ID, qwen().bos, *qwen().encode("Question: what colour? Answer:")]
    assert ends(qwen(), TEMPLATES["blip2"]) == ([qwen().eos], ["\n"])
    assert ends(qwen(), TEMPLATES["chatml"]) == ([qwen().inner.token_to_id("<|im_end|>"), qwen().eos], [])


def test_system_text() -> None:
    template = TEMPLATES["chatml"]
    own = encode_question(qwen(), template, Talk(ask("hi", 0).turns, "Be brief."), 1)
    assert qwen().decode(own.ids).startswith("system\nBe brief.\nuser\nhi")
    none = encode_question(qwen(), template, Talk(ask("hi", 0).turns, ""), 1)
    assert qwen().decode(none.ids).startswith("user\nhi")


def test_what_a_qformer_reads() -> None:
    assert instructions(TALK) == ["What is it?", "And in  and ?", "And in  and ?"]
    waiting = Talk((Turn("user", (None,)), Turn("assistant", ("yes",)), Turn("user", ("why?", None))))
    assert instructions(waiting) == ["why?", "why?"] and instructions(ask("", 1)) == [""]
    tokenizer = llama()
    words = tokenizer.encode("What colour is the bird?")
    cut = encode_instruction(tokenizer, "What colour is the bird?", 6)
    assert cut.ids == [tokenizer.bos, *words[-4:], tokenizer.eos] and set(cut.labels) == {IGNORE}
    assert encode_instruction(tokenizer, "", 6).ids == [tokenizer.bos, tokenizer.eos]
