"""Attention against softmax over single queries, with every part that a published model adds."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.nn.test_rotary import turned
from vlm.nn.attention import Attention, CrossAttention, attend, merge_heads, split_heads
from vlm.nn.context import Context
from vlm.nn.rotary import Rotary
from vlm.nn.tokens import Tokens

B, S, D, H = 2, 5, 12, 6


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """B H S K, B G T K, B G T K, B S T: every query by itself, its group's keys one by one."""
    groups = query.shape[1] // key.shape[1]
    batches = []
    for b in range(query.shape[0]):
        heads = []
        for h in range(query.shape[1]):
            rows = []
            for s in range(query.shape[2]):
                allowed = mask[b, s].nonzero()[:, 0].tolist()
                score = torch.stack([query[b, h, s] @ key[b, h // groups, t] for t in allowed])
                weight = (score / math.sqrt(query.shape[3])).exp()
                mixed = sum(weight[i] * value[b, h // groups, t] for i, t in enumerate(allowed))
                rows.append(mixed / weight.sum())
            heads.append(torch.stack(rows))
        batches.append(torch.stack(heads))
    return torch.stack(batches)


def mixed_tokens(x: Tensor) -> Tokens:
    """Two bidirectional tokens, then causal ones, with padding in one row."""
    valid = torch.ones(B, S - 2, dtype=torch.bool)
    valid[0, 2:] = False
    return Tokens.of(x[:, :2], causal=False).concat(Tokens.of(x[:, 2:], causal=True, valid=valid))


def heads(linear: nn.Module, x: Tensor, count: int) -> Tensor:
    return split_heads(linear(x), count)


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weight).sum(), of)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("rotary", [False, True])
def test_equals_softmax_over_single_queries_with_gradients(kv_heads: int | None, rotary: bool) -> None:
    attention = Attention(D, H, kv_heads, bias=True).double()
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    tokens = mixed_tokens(x)
    angles = Rotary(D // H, 100.0)(tokens.position) if rotary else None
    found, _ = attention(x, Context(tokens, tokens.visibility(), angles))
    groups = H if kv_heads is None else kv_heads
    query, key = heads(attention.query, x, H), heads(attention.key, x, groups)
    if rotary:
        query, key = turned(query, tokens.position, 100.0), turned(key, tokens.position, 100.0)
    mixed = naive(query, key, heads(attention.value, x, groups), tokens.mask()[:, 0])
    expected = attention.out(merge_heads(mixed))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    leaves = (x, *attention.parameters())
    torch.testing.assert_close(gradients(found, *leaves), gradients(expected, *leaves), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("bias", "out", "key"), [(False, None, None), (True, False, None), (True, None, False)])
def test_norms_of_heads_own_width_and_biases_by_hand(bias: bool, out: bool | None, key: bool | None) -> None:
    """Qwen3 has no bias, Qwen2 none after, EVA and BEiT none for the keys."""

    def norm(width: int) -> nn.Module:
        made = nn.RMSNorm(width, eps=1e-6)
        nn.init.normal_(made.weight)
        return made

    attention = Attention(D, H, 2, bias, out_bias=out, key_bias=key, head_dim=4, norm=norm).double()
    biases = {name.removesuffix(".bias") for name, _ in attention.named_parameters() if name.endswith("bias")}
    kept = {"query": bias, "key": bias and key is not False, "value": bias, "out": bias and out is not False}
    assert biases == {name for name, there in kept.items() if there}
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    tokens = mixed_tokens(x)
    found, _ = attention(x, Context(tokens, tokens.visibility(), Rotary(4)(tokens.position, torch.float64)))

    def normed(part: Tensor, gain: nn.Module) -> Tensor:
        length = (part.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return turned(part / length * gain.weight, tokens.position, 10_000.0)

    q = normed(heads(attention.query, x, H), attention.query_norm)
    k = normed(heads(attention.key, x, 2), attention.key_norm)
    expected = attention.out(merge_heads(naive(q, k, heads(attention.value, x, 2), tokens.mask()[:, 0])))
    torch.testing.assert_close(found, expected)
    leaves = (x, *attention.parameters())
    torch.testing.assert_close(gradients(found, *leaves), gradients(expected, *leaves))


def test_norms_of_heads_keep_the_type_under_autocast() -> None:
    attention = Attention(D, H, 2, norm=nn.RMSNorm)
    tokens = Tokens.of(torch.randn(1, 2, D))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = attention(tokens.x, Context(tokens, tokens.visibility(), Rotary(2)(tokens.position)))
    assert {y.dtype, state.key.dtype, state.value.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("added", [False, True])
def test_bf16_is_that_of_single_queries_in_fp32(kv_heads: int, queries: int, added: bool) -> None:
    make = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(B, count, length, 16, generator=make).bfloat16()
        for count, length in ((H, queries), (kv_heads, S), (kv_heads, S))
    )
    seen = torch.rand(B, queries, S, generator=make) > 0.4
    seen[..., 0] = True
    mask = torch.zeros(B, 1, queries, S, dtype=torch.bfloat16).masked_fill(~seen[:, None], -torch.inf)
    found = attend(query, key, value, mask if added else seen[:, None], grouped=kv_heads != H)
    expected = naive(query.float(), key.float(), value.float(), seen)
    assert found.dtype == torch.bfloat16
    if queries == 1:  # rounded but once, at the end; a last bit may fall the other way
        torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_remembers_keys_of_the_past() -> None:
    attention = Attention(D, H, 2)
    x = torch.randn(B, S, D)
    whole = Tokens.of(x)
    expected, state = attention(x, Context(whole, whole.visibility(), None))
    first, second = Tokens.of(x[:, :3]), Tokens.of(x[:, 3:])
    start, past = attention(first.x, Context(first, first.visibility(), None))
    rest, present = attention(second.x, Context(second, second.visibility(first.valid), None), past)
    torch.testing.assert_close(torch.cat([start, rest], 1), expected)
    torch.testing.assert_close(present.key, state.key)
    torch.testing.assert_close(present.value, state.value)


def test_cross_attention_equals_softmax_with_gradients() -> None:
    cross = CrossAttention(D, 7, H).double()
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    image = torch.randn(B, 3, 7, dtype=torch.float64, requires_grad=True)
    found = cross(x, cross.project(image))
    everything = torch.ones(B, S, 3, dtype=torch.bool)
    mixed = naive(heads(cross.query, x, H), heads(cross.key, image, H), heads(cross.value, image, H), everything)
    expected = cross.out(merge_heads(mixed))
    torch.testing.assert_close(found, expected)
    leaves = (x, image, *cross.parameters())
    torch.testing.assert_close(gradients(found, *leaves), gradients(expected, *leaves))


def test_selected_images_are_those_rows() -> None:
    cross = CrossAttention(D, 7, H)
    image, x, index = torch.randn(3, 4, 7), torch.randn(4, S, D), torch.tensor([2, 0, 0, 1])
    torch.testing.assert_close(cross(x, cross.project(image).select(index)), cross(x, cross.project(image[index])))


def test_heads_are_split_and_merged_in_order() -> None:
    x = torch.arange(12.0).view(1, 2, 6)
    assert split_heads(x, 3)[0, 1].tolist() == [[2, 3], [8, 9]]
    torch.testing.assert_close(merge_heads(split_heads(x, 3)), x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Attention(10, 4), "heads=4 does not divide dim=10"),
        (lambda: Attention(12, 6, 4), "kv_heads=4 does not divide heads=6: choose it among"),
        (lambda: Attention(12, 6, 0), "kv_heads=0 does not divide heads=6"),
        (lambda: CrossAttention(10, 7, 3), "heads=3 does not divide dim=10"),
    ],
)
def test_widths_that_do_not_divide_are_named(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=words):
        make()


@torch.no_grad()
def test_states_of_other_models_are_refused() -> None:
    tokens, one = Tokens.of(torch.randn(1, 3, D)), Tokens.of(torch.randn(1, 1, D))
    makers = {"plain": lambda: Attention(D, H), "grouped": lambda: Attention(D, H, 2)}
    makers["window"] = lambda: Attention(D, H, window=2)
    for name, make in makers.items():
        _, past = make()(tokens.x, Context(tokens, tokens.visibility()))
        for other, reader in makers.items():
            if other != name:
                with pytest.raises(ValueError, match="this state is of another model"):
                    reader()(one.x, Context(one, one.visibility(tokens.valid, True)), past)
