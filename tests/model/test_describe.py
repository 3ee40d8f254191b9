"""Captions in pieces, with stop strings and by beams: all agree with each other."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.model.small import WIDTH, Eye, blip2, finished, pictures
from vlm.data.text import Tokenizer, train_bpe
from vlm.model.beam import Beams
from vlm.model.connector import MlpConnector
from vlm.model.describe import Caption, describe, describe_live, describe_several
from vlm.model.generate import Decoding, Sampling
from vlm.model.language import llama
from vlm.model.vlm import VisionLanguageModel

TEMPLATE = "{image} a photo of {text}"
WAYS = [Sampling(16), Sampling(12, temperature=2.0), Beams(3, max_new=9)]


@cache
def made() -> tuple[VisionLanguageModel, Tokenizer]:
    tokenizer = train_bpe(["a red square", "a blue square 🙂 naïve"] * 3, 300)
    language = llama(tokenizer.size, WIDTH, layers=2, heads=4)
    return finished(VisionLanguageModel(Eye(), MlpConnector(10, WIDTH, 4), language=language)), tokenizer


def told(decoding: Decoding, stop: tuple[str, ...] = ()) -> list[str]:
    model, tokenizer = made()
    return describe(model, tokenizer, pictures(4), TEMPLATE, 32, decoding, torch.Generator().manual_seed(1), stop)


@pytest.mark.parametrize("decoding", WAYS)
def test_a_caption_ends_before_a_stop_string(decoding: Decoding) -> None:
    free = told(decoding)
    assert len(set(free)) == 4
    # Over the space between two words too, but not over the end of a character that was cut by the last token.
    stop = free[1][len(free[1]) // 2 :][:2]
    found = told(decoding, (stop, "never"))
    assert found[1] != free[1]
    assert not any(stop in text for text in found)
    if isinstance(decoding, Sampling) and decoding.temperature == 0:
        assert found == [text[: text.index(stop)].rstrip() if stop in text else text for text in free]


@pytest.mark.parametrize("decoding", WAYS[:2])
@pytest.mark.parametrize("cut", [False, True])
def test_pieces_join_to_the_caption(decoding: Sampling, cut: bool) -> None:
    model, tokenizer = made()
    stop = (told(decoding)[1][3:5],) if cut else ()
    generator = torch.Generator().manual_seed(1)
    steps = list(describe_live(model, tokenizer, pictures(4), TEMPLATE, 32, decoding, generator, stop))
    assert ["".join(pieces) for pieces in zip(*steps, strict=True)] == told(decoding, stop)
    assert 5 < len(steps) <= decoding.max_new + 1
    assert sum(any(pieces) for pieces in steps) > 3


def test_several_captions_with_scores() -> None:
    model, tokenizer = made()
    beams = Beams(4, max_new=9, returned=3)
    found = describe_several(model, tokenizer, pictures(4), TEMPLATE, 32, beams)
    assert [row[0].text for row in found] == told(beams)
    for row in found:
        assert all(isinstance(caption, Caption) for caption in row)
        assert [caption.score for caption in row] == sorted((caption.score for caption in row), reverse=True)
        assert len(row) == 3


def test_captions_that_are_begun_go_on_and_hold_their_beginning() -> None:
    model, tokenizer = made()
    free = describe_several(model, tokenizer, pictures(4), TEMPLATE, 32, Sampling(16))
    for begun in ("a blue", "🙂"):
        found = describe_several(model, tokenizer, pictures(4), TEMPLATE, 32, Sampling(9), begun=f" {begun} ")
        assert all(row[0].text.startswith(begun) for row in found) and found != free
        assert all(row[0].tokens <= 9 for row in found)


@pytest.mark.parametrize("decoding", [Sampling(16), Beams(3, max_new=9, returned=2), Sampling(5, temperature=2.0)])
def test_it_is_said_why_a_caption_ended(decoding: Decoding) -> None:
    model, tokenizer = made()
    text = told(Sampling(16))[1]
    several = replace(tokenizer, ends=(tokenizer.eos, tokenizer.encode(text)[3]))
    found = describe_several(model, several, pictures(4), TEMPLATE, 32, decoding, torch.Generator().manual_seed(1))
    captions = [caption for row in found for caption in row]
    assert all((caption.finish == "length") == (caption.tokens == decoding.max_new) for caption in captions)
    if isinstance(decoding, Beams) or not decoding.temperature:
        assert {caption.finish for caption in captions} == {"stop", "length"}


def test_a_stop_string_in_the_last_token_is_a_stop() -> None:
    model, tokenizer = made()
    text = told(Sampling(6))[1]
    free, cut = (
        describe_several(model, tokenizer, pictures(4), TEMPLATE, 32, Sampling(6), stop=stop)[1][0]
        for stop in ((), (text[-1],))
    )
    assert (free.finish, free.tokens) == ("length", 6)
    assert cut.finish == "stop" and cut.tokens <= 6


def test_several_draws_of_each_picture() -> None:
    model, tokenizer = made()
    dice = [torch.Generator().manual_seed(seed) for seed in range(8)]
    way = Sampling(9, temperature=2.0)
    found = describe_several(model, tokenizer, pictures(4), TEMPLATE, 32, way, dice, draws=2)
    assert [len(row) for row in found] == [2] * 4 and found[0][0] != found[0][1]
    for draw in range(2):
        own = [torch.Generator().manual_seed(2 * i + draw) for i in range(4)]
        assert describe(model, tokenizer, pictures(4), TEMPLATE, 32, way, own) == [row[draw].text for row in found]


@pytest.mark.parametrize("decoding", [Sampling(16), Beams(3, max_new=9)])
def test_a_caption_ends_at_any_end_token(decoding: Decoding) -> None:
    model, tokenizer = made()
    early = tokenizer.encode(told(Sampling(16))[1])[3]
    several = replace(tokenizer, ends=(tokenizer.eos, early))
    found = describe(model, several, pictures(4), TEMPLATE, 32, decoding)
    assert found != told(decoding)
    assert not any(early in tokenizer.encode(text) for text in found)


@pytest.mark.parametrize("decoding", [Sampling(17), Beams(2, max_new=17)])
def test_longer_than_a_qformer_writes(decoding: Decoding) -> None:
    _, tokenizer = made()
    with pytest.raises(ValueError, match="max_new=17: this Q-Former was built for texts of 16 tokens"):
        describe(blip2(), tokenizer, pictures(1), "", 16, decoding)


def test_a_beginning_that_leaves_a_qformer_no_room() -> None:
    _, tokenizer = made()
    size = len(tokenizer.encode("a red"))
    with pytest.raises(ValueError, match=f"max_new=15 after the {size} that it begins with: this Q-Former was built"):
        describe_several(blip2(), tokenizer, pictures(1), "", 16, Sampling(15), begun="a red")
