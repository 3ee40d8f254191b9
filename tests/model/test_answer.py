"""Answers in conversations: what is answered together is answered alone, token for token."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.data.vocabularies import words
from tests.model.small import WIDTH, Eye, finished, pictures
from vlm.data.batch import pad
from vlm.data.talk import Talk, Turn, ask
from vlm.data.talk_batch import Reader, TalkForm
from vlm.data.template import TEMPLATES, Template
from vlm.model.beam import Beams
from vlm.model.connector import MlpConnector
from vlm.model.describe import answer, answer_live, describe
from vlm.model.generate import Decoding, Sampling
from vlm.model.language import decoder, llama
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.ffn import GatedMlp
from vlm.nn.norm import RMSNorm
from vlm.nn.retention import Decay, Retention

TALKS = [
    ask("What is it?"),
    Talk(
        (
            Turn("user", ("Is ", None, " as ", None, " and ", None, "?")),
            Turn("assistant", ("no",)),
            *ask("Why?", 1).turns,
        )
    ),
    ask("Who are you, and what is the colour of the snow?", 0),
    ask("", 1),
    ask("Tell me about these two pictures of a fox.", 2),
]
COUNTS = [talk.images for talk in TALKS]


@cache
def model(kind: str) -> VisionLanguageModel:
    size = words().size
    if kind == "retnet":

        def ffn(_: int) -> nn.Module:
            return GatedMlp(WIDTH, 32)

        language = decoder(
            size, WIDTH, 2, lambda _: Retention(WIDTH, 2), ffn, lambda: RMSNorm(WIDTH), decay=Decay(2, WIDTH // 2)
        )
    else:
        language = llama(size, WIDTH, layers=2, heads=4, kv_heads=2)
    if kind != "qformer":
        return finished(VisionLanguageModel(Eye(), MlpConnector(10, WIDTH, 4), language=language))
    text = TextBranch(size, WIDTH, 8)
    bridge = QFormer(10, WIDTH, 2, 4, queries=3, hidden=32, text=text, out_dim=WIDTH)
    return finished(VisionLanguageModel(Eye(), bridge, language=language))


def form(kind: str, template: str | Template = "vicuna_v1") -> TalkForm:
    reader = Reader(words(), 8) if kind == "qformer" else None
    return TalkForm(words(), Template.of(template), model(kind).image_tokens, 500, system="", reader=reader)


def shown(index: int) -> Tensor | None:
    first = sum(COUNTS[:index])
    return pictures(sum(COUNTS))[first : first + COUNTS[index]] if COUNTS[index] else None


@pytest.mark.parametrize("kind", ["llama", "retnet", "qformer"])
@pytest.mark.parametrize("how", [Sampling(7), Beams(3, max_new=6)], ids=["greedy", "beams"])
@pytest.mark.parametrize("template", ["vicuna_v1", "chatml"])
def test_together_is_alone(kind: str, how: Decoding, template: str) -> None:
    """Prompts of 1 to 60 tokens with no, one, two and four pictures."""
    together = answer(model(kind), form(kind, template), TALKS, pictures(sum(COUNTS)), how)
    alone = [answer(model(kind), form(kind, template), [talk], shown(i), how)[0] for i, talk in enumerate(TALKS)]
    assert together == alone and len(set(alone)) > 2
    backwards = torch.cat([part for i in reversed(range(len(TALKS))) if (part := shown(i)) is not None])
    assert answer(model(kind), form(kind, template), TALKS[::-1], backwards, how) == alone[::-1]


@pytest.mark.parametrize("kind", ["llama", "retnet"])
def test_every_picture_counts(kind: str) -> None:
    """Exchanging two pictures of a conversation, or showing another in its history, is another prompt."""

    def told(*order: int) -> str:
        images = (3 * pictures(sum(COUNTS)))[1:5]
        return answer(model(kind), form(kind), TALKS[1:2], images[list(order)], Sampling(12))[0]

    assert told(0, 1, 2, 3) not in (told(1, 0, 2, 3), told(3, 1, 2, 0))


def test_pieces_join_and_stops_end() -> None:
    how = Sampling(20, temperature=1.5)

    def drawn(live: bool, stop: tuple[str, ...] = ()) -> list[str]:
        generator = torch.Generator().manual_seed(2)
        given = (model("llama"), form("llama"), TALKS, pictures(sum(COUNTS)), how, generator, stop)
        if not live:
            return answer(*given)
        steps = list(answer_live(*given))
        return ["".join(pieces).strip() for pieces in zip(*steps, strict=True)]

    free = drawn(live=False)
    assert drawn(live=True) == free
    stop = free[0][3:5]
    cut = drawn(live=False, stop=(stop,))
    assert cut[0] == free[0][: free[0].index(stop)].strip() and drawn(live=True, stop=(stop,)) == cut


def test_a_template_says_where_answers_end() -> None:
    talk, image = [ask("What?")], pictures(1)

    def told(**more: Any) -> str:
        template = Template(user="{image}{text}", answer="{text}", system="", **more)
        return answer(model("llama"), form("llama", template), talk, image, Sampling(20))[0]

    whole = told()
    part = whole[4:6]
    # An end that the vocabulary has no token for is a string that ends the text, as those of `stop` are.
    assert told(stop=(part,)) == told(end=part) == whole[: whole.index(part)].strip()


def test_a_caption_is_an_answer_to_nothing() -> None:
    template = TEMPLATES["plain"]
    captions = describe(model("llama"), words(), pictures(3), template, 50, Sampling(9))
    answers = answer(model("llama"), form("llama", template), [ask("", 1)] * 3, pictures(3), Sampling(9))
    assert captions == [" ".join(text.split()) for text in answers]


def test_the_instruction_is_read() -> None:
    talks = [ask("What is it?"), ask("What colour?")]
    images = pictures(1).repeat(2, 1, 1, 1)
    reads = form("qformer")
    assert reads.reader is not None
    beside = [one for talk in talks for one in reads.start(talk).instructions]
    soft = model("qformer").see(images, pad(beside, words().pad)).soft
    assert (soft[0] - soft[1]).abs().max() > 1e-3


def test_wrong_numbers_of_pictures() -> None:
    with pytest.raises(ValueError, match="1 images for conversations that show 2"):
        answer(model("llama"), form("llama"), [ask("a", 2)], pictures(1), Sampling(3))
    with pytest.raises(ValueError, match="ends with 'b', and no question"):
        answer(model("llama"), form("llama"), [ask("a", 0, "b")], None, Sampling(3))
