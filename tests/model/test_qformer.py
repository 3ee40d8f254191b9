"""The Q-Former: its layouts, its regimes of who sees whom, and its memory."""

import pytest
import torch
from torch import Tensor

from tests.model.small import LONGEST, QUERIES, VOCABULARY, WIDTH, qformer
from tests.parity.noise import noise
from vlm.model.qformer import QFormer, TextBranch, bert_transform
from vlm.nn.block import Block
from vlm.nn.tokens import Route, Tokens

B, T = 2, 5


def noisy(text: bool = True) -> QFormer:
    model = qformer(text)
    noise(model, scale=0.3)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 3:] = False
    return torch.randn(B, 4, 10), torch.randint(0, VOCABULARY, (B, T)), valid


@pytest.mark.parametrize("causal", [True, False])
def test_static_layout_equals_dynamic_with_gradients(causal: bool) -> None:
    model, (image, _, valid) = noisy(), inputs()
    x = torch.randn(B, QUERIES + T, WIDTH, requires_grad=True)
    text = Tokens.of(x[:, QUERIES:], Route.TEXT, causal, valid)
    tokens = Tokens.of(x[:, :QUERIES], Route.QUERY, False).concat(text)
    static = model.stack(tokens, model.stack.look(image)).hidden
    dynamic = model.stack(tokens.dynamic(), model.stack.look(image)).hidden
    torch.testing.assert_close(static, dynamic, atol=1e-5, rtol=1e-5)
    leaves = [x, *model.stack.parameters()]
    weight = torch.randn_like(static)
    found, expected = (torch.autograd.grad((y * weight).sum(), leaves) for y in (static, dynamic))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_written_token_by_token_equals_one_pass() -> None:
    model, (image, ids, _) = noisy(), inputs()
    everything = torch.ones_like(ids, dtype=torch.bool)
    state = model.query(model.stack.look(image), B).state
    start = torch.zeros(B, dtype=torch.long)
    whole = model.write(ids, everything, state, start)
    rows = []
    for t in range(T):
        out = model.write(ids[:, t : t + 1], everything[:, :1], state, start + t)
        state = out.state
        rows.append(out.hidden)
    torch.testing.assert_close(torch.cat(rows, 1), whole.hidden, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_who_sees_whom() -> None:
    model, (image, ids, valid) = noisy(), inputs()
    memory, changed, start = model.stack.look(image), ids.clone(), torch.zeros(B, dtype=torch.long)
    changed[:, 2] = (ids[:, 2] + 1) % VOCABULARY
    state = model.query(memory, B).state
    written, other = (model.write(words, valid, state, start).hidden for words in (ids, changed))
    assert torch.equal(written[:, :2], other[:, :2])
    assert float((written[1, 3:] - other[1, 3:]).abs().amax(1).min()) > 1e-3
    assert float((model.read(ids, valid) - model.read(changed, valid))[1].abs().amax(1).min()) > 1e-3
    assert float((model.fuse(memory, ids, valid) - model.fuse(memory, changed, valid)).abs().min(0).values.max()) > 1e-3
    padded = changed.clone()
    padded[0, 3:] = 7
    torch.testing.assert_close(model.fuse(memory, padded, valid), model.fuse(memory, changed, valid))


@torch.no_grad()
def test_forward_is_the_queries_after_the_image_at_the_readers_width() -> None:
    model, image = QFormer(10, WIDTH, 2, 4, QUERIES, out_dim=9).eval(), torch.randn(B, 4, 10)
    expected = model.out(model.query(model.stack.look(image), B).hidden)
    torch.testing.assert_close(model(image), expected)
    assert model(image).shape == (B, model.tokens, model.dim) == (B, QUERIES, 9)
    assert float((model(image) - model(image.flip(0))).abs().max()) > 0


def test_cross_attention_stands_in_every_kth_block() -> None:
    for every, expected in [(1, [True] * 4), (2, [True, False] * 2), (3, [True, False, False, True])]:
        model = QFormer(10, WIDTH, 4, 4, QUERIES, cross_every=every)
        assert [isinstance(block, Block) and block.cross is not None for block in model.stack.blocks] == expected


def test_texts_need_the_text_branch() -> None:
    model, (image, ids, valid) = noisy(text=False), inputs()
    state = model.query(model.stack.look(image), B).state
    for call in (
        lambda: model.read(ids, valid),
        lambda: model.fuse(model.stack.look(image), ids, valid),
        lambda: model.write(ids, valid, state),
        lambda: model.logits(torch.randn(2, WIDTH)),
    ):
        with pytest.raises(ValueError, match=r"no text branch: set model\.connector\.text=true"):
            call()


def test_a_text_too_long_is_refused() -> None:
    ids = torch.zeros(1, LONGEST + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{LONGEST + 1} tokens is longer than the Q-Former's {LONGEST}"):
        noisy().read(ids, torch.ones_like(ids, dtype=torch.bool))


def test_vocabulary_head_may_have_a_transform() -> None:
    branch, hidden = TextBranch(9, WIDTH, 4, torch.nn.LayerNorm(WIDTH)), torch.randn(2, WIDTH)
    torch.testing.assert_close(branch.logits(hidden), branch.head(branch.transform(hidden)))


def test_a_head_may_be_the_embedding_or_none_at_all() -> None:
    hidden = torch.randn(2, WIDTH)
    tied = TextBranch(9, WIDTH, 4, bert_transform(WIDTH), head="tied")
    assert {name for name, _ in tied.named_parameters() if "transform" not in name} == {
        "embedding.weight",
        "position.weight",
        "bias",
    }
    torch.nn.init.normal_(tied.bias)
    expected = tied.transform(hidden) @ tied.embedding.weight.T + tied.bias
    torch.testing.assert_close(tied.logits(hidden), expected)
    silent = QFormer(10, WIDTH, 2, 4, QUERIES, text=TextBranch(9, WIDTH, 4, head="none"))
    with pytest.raises(ValueError, match="reads texts but has no vocabulary head"):
        silent.logits(hidden)
