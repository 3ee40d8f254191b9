"""What an encoder-decoder reads and what it writes, taken apart: by hand, and through batches to the loader."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.shard_files import numbered, write
from vlm.data.batch import collate, pad
from vlm.data.encode import encode_prompt
from vlm.data.image import ImageTransform
from vlm.data.loader import Loader
from vlm.data.reply import apart
from vlm.data.shards import Sample, Shards
from vlm.data.text import Encoded, Tokenizer, train_bpe
from vlm.nn.tokens import IGNORE, IMAGE_ID

START, EOS = 90, 91


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["a photo of a fox", "a bird"] * 3, 270)


def test_by_hand() -> None:
    whole = Encoded([IMAGE_ID, 5, 6, 7, 8, EOS], [IGNORE, IGNORE, IGNORE, 7, 8, EOS])
    assert apart(whole, START, EOS) == Encoded(
        [IMAGE_ID, 5, 6, EOS], [IGNORE] * 4, Encoded([START, 7, 8, EOS], [IGNORE, 7, 8, EOS])
    )
    assert apart(Encoded([5], [IGNORE]), START, EOS) == Encoded([5, EOS], [IGNORE] * 2, Encoded([START], [IGNORE]))
    assert apart(Encoded([7, EOS], [7, EOS]), START, EOS) == Encoded(
        [EOS], [IGNORE], Encoded([START, 7, EOS], [IGNORE, 7, EOS])
    )


def test_earlier_answers_are_read() -> None:
    whole = Encoded([5, 7, 6, 8, 9], [IGNORE, 7, IGNORE, 8, 9])
    made = apart(whole, START, EOS)
    assert (made.ids, made.labels) == ([5, 7, 6, EOS], [IGNORE] * 4)
    assert made.reply == Encoded([START, 8, 9], [IGNORE, 8, 9])


def test_text_after_the_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="text after the last answer: an encoder-decoder never reads it"):
        apart(Encoded([5, 7, 6], [IGNORE, 7, IGNORE]), START, EOS)


@given(st.lists(st.integers(0, 80), max_size=5), st.lists(st.integers(0, 80), min_size=1, max_size=5))
def test_nothing_is_lost_and_only_the_answer_is_learned(prompt: list[int], answer: list[int]) -> None:
    made = apart(Encoded(prompt + answer, [IGNORE] * len(prompt) + answer), START, EOS)
    assert made.reply is not None
    assert made.ids[:-1] + made.reply.ids[1:] == prompt + answer
    assert set(made.labels) == {IGNORE} and made.reply.labels == [IGNORE, *answer]


def test_what_is_read_is_the_same_with_and_without_an_answer(bpe: Tokenizer) -> None:
    for template in ("{image}{text}", "{image} a photo of {text}", "q {image} {text}"):
        asked, told = (apart(encode_prompt(bpe, template, text, 2, 32), START, bpe.eos) for text in (None, "a bird"))
        assert asked.ids == told.ids
        assert asked.reply == Encoded([START], [IGNORE])
        assert told.reply is not None and told.reply.ids == [START, *bpe.encode("a bird"), bpe.eos]


@pytest.mark.parametrize("side", ["left", "right"])
def test_replies_are_padded_by_themselves(side: str) -> None:
    rows = [
        Encoded([5, 6], [IGNORE] * 2, Encoded([START], [IGNORE])),
        Encoded([5], [IGNORE], Encoded([START, 7], [7, 7])),
    ]
    text = pad(rows, 0, side)  # type: ignore[arg-type]
    assert text.reply is not None and text.written is text.reply
    gap = [[START, 0], [0, START]][side == "left"]
    assert text.reply.ids.tolist() == [gap, [START, 7]]
    assert text.reply.valid.sum(1).tolist() == [1, 2] and not text.reply.full
    picked = text.select(torch.tensor([1])).to("cpu")
    assert picked.reply is not None and picked.reply.ids.tolist() == [[START, 7]]


def test_a_batch(bpe: Tokenizer) -> None:
    samples = [Sample("k", "k", torch.zeros(3, 2, 2, dtype=torch.uint8), ["a fox", "a bird"])]
    prompts = collate(samples, bpe, 16, "{image} a photo of {text}", 2, START).prompts
    assert prompts is not None and prompts.reply is not None and prompts.full
    read = [bpe.bos, IMAGE_ID, IMAGE_ID, *bpe.encode("a photo of"), bpe.eos]
    assert prompts.ids.tolist() == [read, read] and (prompts.labels == IGNORE).all()
    fox = bpe.encode("a fox")
    row = prompts.reply.ids[0][prompts.reply.valid[0]].tolist()
    assert row == [START, *fox, bpe.eos]
    assert prompts.reply.labels[0][prompts.reply.valid[0]].tolist() == [IGNORE, *fox, bpe.eos]


def test_the_loader_says_how_replies_start(bpe: Tokenizer, tmp_path: Path) -> None:
    shards = Shards(str(write(tmp_path / "s.tar", numbered(0, 4))))
    transform = ImageTransform((8, 8), (0.5,) * 3, (0.5,) * 3)
    options = {"max_tokens": 16, "template": "{image}{text}", "image_tokens": 2}
    for start in (None, START):
        batch = next(Loader(shards, transform, bpe, 4, **options, reply_start=start).train([0]))
        assert batch.prompts is not None
        if start is None:
            assert batch.prompts.reply is None
        else:
            assert batch.prompts.written.ids[:, 0].tolist() == [START] * 4
