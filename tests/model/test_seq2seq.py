"""An encoder-decoder inside a vision-language model: it reads once, and goes on from its state as if it read again."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.model.small import PATCHES, VOCABULARY, WIDTH, Eye, asked, finished, llava, pictures, seq2seq, texts, words
from vlm.data.batch import Text, pad
from vlm.data.encode import encode_prompt
from vlm.data.reply import apart
from vlm.data.text import Tokenizer, train_bpe
from vlm.model.beam import Beams
from vlm.model.connector import MlpConnector
from vlm.model.describe import describe, describe_live, describe_several
from vlm.model.generate import Decoding, Sampling, generate
from vlm.model.seq2seq import EncoderDecoder, t5
from vlm.model.vlm import VisionLanguageModel, last_valid
from vlm.nn.ffn import GatedMlp
from vlm.nn.tokens import Tokens
from vlm.train.parallel import recompute

TEMPLATE = "{image} a photo of {text}"
WAYS = [Sampling(7), Sampling(7, temperature=1.5), Beams(3, max_new=7)]


def language(model: VisionLanguageModel) -> EncoderDecoder:
    assert isinstance(model.language, EncoderDecoder)
    return model.language


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_reply_and_what_follows_is_the_longer_reply(side: str) -> None:
    """Rows of different length on both sides, each as if alone."""
    model = seq2seq()
    seen, rows = model.see(pictures()), [[2, 4, 5, 6], [2, 9]]
    given = asked(words(model, [2, 5], side), rows)
    following = torch.tensor([[7], [8]])
    out = model.write(seen, given)
    first = model.logits(last_valid(out.hidden, given.written.valid))
    second, state = model.proceed(following, out.state)
    third, _ = model.proceed(following, state)
    for row in range(2):
        kept = given.valid[row]
        own = texts([given.ids[row][kept]])
        longer = asked(own, [[*rows[row], int(following[row]), int(following[row])]])
        alone = model.logits(model.write(seen.select(torch.tensor([row])), longer).hidden)[0]
        for found, wanted in zip((first, second, third), alone[-3:], strict=True):
            torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_image_matters_to_its_own_answer_alone() -> None:
    model, images = seq2seq(), pictures()
    given = asked(words(model, [4, 4]), [[2, 5], [2, 5]])
    other = torch.stack([images[0], images[1] + 1])
    before, after = (model.write(model.see(pixels), given).hidden for pixels in (images, other))
    torch.testing.assert_close(before[0], after[0])
    assert float((before[1] - after[1]).abs().max()) > 1e-3


@torch.no_grad()
def test_what_is_read_sees_both_ways_and_what_is_written_only_back() -> None:
    model, given = seq2seq(), asked(words(seq2seq(), [4, 4]), [[2, 5, 6], [2, 5, 6]])
    seen = model.see(pictures())
    before = model.write(seen, given).hidden
    late = replace(given, reply=replace(given.written, ids=given.written.ids.clone()))
    late.written.ids[:, 2] += 1
    torch.testing.assert_close(model.write(seen, late).hidden[:, :2], before[:, :2])
    first, last = model.language.embed(given.ids), language(model).embed(given.ids)  # type: ignore[union-attr]
    last[:, -1] += 1
    states = [language(model).encoder(Tokens.of(x, causal=False)).hidden[:, 0] for x in (first, last)]
    assert float((states[0] - states[1]).abs().max()) > 1e-4


def test_a_text_without_a_reply_is_refused_in_words() -> None:
    model = seq2seq()
    with pytest.raises(ValueError, match=r"encoder-decoder, which writes its answer apart .* the text needs a reply"):
        model.write(model.see(pictures()), words(model, [3, 3]))
    with pytest.raises(ValueError, match="writes about what it has read: pass the memory that `read` gives"):
        language(model)(Tokens.of(torch.zeros(1, 2, WIDTH)))


def test_replies_start_as_the_model_says() -> None:
    assert seq2seq().reply_start == 2
    assert llava().reply_start is None
    assert seq2seq().image_tokens == PATCHES


def made() -> tuple[VisionLanguageModel, Tokenizer]:
    tokenizer = train_bpe(["a red square", "a blue square"] * 3, 290)
    reader = t5(tokenizer.size, WIDTH, 2, 3, head_dim=5, ffn=lambda: GatedMlp(WIDTH, 32), tied=False, buckets=8)
    return finished(VisionLanguageModel(Eye(), MlpConnector(10, WIDTH, PATCHES), language=reader)), tokenizer


@torch.no_grad()
def by_hand(model: VisionLanguageModel, tokenizer: Tokenizer, images: Tensor, decoding: Decoding) -> list[str]:
    prompt = apart(encode_prompt(tokenizer, TEMPLATE, None, PATCHES, 32), language(model).start, tokenizer.eos)
    text = pad([prompt] * len(images), tokenizer.pad)
    out = model.write(model.see(images), text)
    drawn = torch.Generator().manual_seed(1)
    logits, said = model.logits(out.hidden[:, 0]), text.written.ids
    rows = generate(model.proceed, logits, out.state, said, tokenizer.eos, decoding, drawn)
    return [" ".join(tokenizer.decode(row).split()) for row in rows]


@pytest.mark.parametrize("decoding", WAYS)
def test_captions(decoding: Decoding) -> None:
    model, tokenizer = made()
    images = pictures(3)
    told = describe(model, tokenizer, images, TEMPLATE, 32, decoding, torch.Generator().manual_seed(1))
    assert len(set(told)) == 3
    assert told == by_hand(model, tokenizer, images, decoding)
    if isinstance(decoding, Sampling):
        steps = describe_live(model, tokenizer, images, TEMPLATE, 32, decoding, torch.Generator().manual_seed(1))
        assert ["".join(pieces) for pieces in zip(*steps, strict=True)] == told
        if decoding.temperature == 0:
            assert told == describe(model, tokenizer, images, TEMPLATE, 32, Beams(1, max_new=7))
            assert told == [describe(model, tokenizer, images[i : i + 1], TEMPLATE, 32, decoding)[0] for i in range(3)]
    else:
        assert isinstance(decoding, Beams)
        several = describe_several(model, tokenizer, images, TEMPLATE, 32, replace(decoding, returned=2))
        assert [row[0].text for row in several] == told


@pytest.mark.parametrize("decoding", [Sampling(7), Beams(3, max_new=7)])
def test_image_and_prompt_are_read_once(decoding: Decoding) -> None:
    """Whatever is written, and with however many beams."""
    model, tokenizer = made()
    looks, reads = list[int](), list[int]()
    assert isinstance(model.vision, nn.Module)
    model.vision.register_forward_hook(lambda _, given, __: looks.append(len(given[0])))
    language(model).encoder.register_forward_hook(lambda _, given, __: reads.append(len(given[0].x)))
    describe(model, tokenizer, pictures(3), TEMPLATE, 32, decoding)
    assert looks == reads == [3]


def loss(model: VisionLanguageModel, text: Text) -> Tensor:
    return model.logits(model.write(model.see(pictures()), text).hidden).logsumexp(-1).mean()


def test_blocks_that_run_again_have_the_same_gradients() -> None:
    """Those of the tables of distances too, which all blocks share."""
    model, other = seq2seq(), seq2seq()
    recompute(other)
    for one in (model, other):
        loss(one, asked(words(one, [3, 5]), [[2, 4], [2, 4, 6]])).backward()
    for (name, first), second in zip(model.named_parameters(), other.parameters(), strict=True):
        assert first.grad is not None and second.grad is not None, name
        torch.testing.assert_close(first.grad, second.grad)
    assert float(language(model).encoder.relative.table.weight.grad.abs().max()) > 1e-6  # type: ignore[union-attr]


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_new_model_knows_nothing_yet(tied: bool) -> None:
    torch.manual_seed(0)
    model = t5(200, 64, 3, 4, head_dim=16, hidden=96, tied=tied)
    ids = torch.randint(0, 200, (4, 12))
    memory = model.read(Tokens.of(model.embed(ids), causal=False))
    logits = model.logits(model(Tokens.of(model.embed(ids)), None, memory).hidden)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    assert math.log(200) - 1 < float(entropy) < math.log(200)
    assert 0.5 < float(logits.std()) < 1.6


CASTS: list[Callable[[VisionLanguageModel], VisionLanguageModel]] = [lambda m: m, lambda m: m.bfloat16()]


@pytest.mark.parametrize("cast", CASTS, ids=["autocast", "whole"])
@torch.no_grad()
def test_half_precision(cast: Callable[[VisionLanguageModel], VisionLanguageModel]) -> None:
    model = seq2seq()
    given = asked(words(model, [3, 5]), [[2, 4], [2, 4, 6]])
    wanted = model.logits(model.write(model.see(pictures()), given).hidden)[given.written.valid]
    kind = next(cast(model).parameters()).dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.float32):
        found = model.logits(model.write(model.see(pictures().to(kind)), given).hidden)[given.written.valid]
    assert found.dtype == torch.bfloat16
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_it_can_be_made_without_memory() -> None:
    with torch.device("meta"):
        model = t5(VOCABULARY, WIDTH, 2, 3, head_dim=5)
    assert all(parameter.is_meta for parameter in model.parameters())
