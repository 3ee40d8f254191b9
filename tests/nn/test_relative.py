"""Relative positions of T5: buckets by another formula, and attention with them over single queries."""

import math

import pytest
import torch
from torch import Tensor, nn

from vlm.nn.attention import Attention, CrossAttention, merge_heads, split_heads
from vlm.nn.block import Block, PreNorm, Stack
from vlm.nn.context import Context
from vlm.nn.ffn import Mlp
from vlm.nn.relative import Bucket, RelativeBias, backwards, both_ways
from vlm.nn.tokens import Tokens

D, H, S = 12, 3, 9


def bucket(distance: int, buckets: int, longest: int) -> int:
    """Of one distance of at least 0: edges grow by a constant factor from half of the buckets to `longest`."""
    exact = buckets // 2
    if distance < exact:
        return distance
    factor = (longest / exact) ** (1 / (buckets - exact))
    edges = [exact * factor**i for i in range(1, buckets - exact)]
    return exact + sum(distance >= edge * (1 - 1e-9) for edge in edges)


@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20), (10, 33)])
def test_buckets_widen_by_a_constant_factor(buckets: int, longest: int) -> None:
    distance = torch.arange(-200, 201)
    behind = [bucket(max(0, -d), buckets, longest) for d in range(-200, 201)]
    assert backwards(distance, buckets, longest).tolist() == behind
    half = buckets // 2
    both = [bucket(abs(d), half, longest) + (half if d > 0 else 0) for d in range(-200, 201)]
    assert both_ways(distance, buckets, longest).tolist() == both


def test_buckets_of_the_published_size() -> None:
    distance = -torch.tensor([0, 1, 15, 16, 18, 19, 21, 127, 128, 5000])
    assert backwards(distance, 32, 128).tolist() == [0, 1, 15, 16, 16, 17, 18, 31, 31, 31]
    assert both_ways(torch.tensor([0, -1, 1, -7, 7, -8, 127, -5000]), 32, 128).tolist() == [0, 1, 17, 7, 23, 8, 31, 15]


def padded(x: Tensor, causal: bool, side: str) -> Tokens:
    """Rows of full and of smaller length."""
    place = torch.arange(S)
    length = torch.tensor([[S], [4]])
    return Tokens.of(x, causal=causal, valid=place < length if side == "right" else place >= S - length)


def naive(attention: Attention, relative: RelativeBias, tokens: Tokens, longest: int) -> Tensor:
    """Valid tokens of each row alone, query by query, no score scaled."""
    query, key, value = (split_heads(layer(tokens.x), H) for layer in attention.readers())
    out = torch.zeros_like(query)
    for b in range(len(tokens.x)):
        columns = tokens.valid[b].nonzero()[:, 0].tolist()
        for h in range(H):
            for i, s in enumerate(columns):
                seen = [j for j in range(len(columns)) if j <= i or not bool(tokens.causal[b, s])]
                buckets = [int(relative.bucket(torch.tensor(j - i), 8, longest)) for j in seen]
                near = [relative.table.weight[k, h] for k in buckets]
                score = torch.stack([query[b, h, s] @ key[b, h, columns[j]] for j in seen]) + torch.stack(near)
                out[b, h, s] = score.softmax(0) @ torch.stack([value[b, h, columns[j]] for j in seen])
    return attention.out(merge_heads(out))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("rule", "causal"), [(both_ways, False), (backwards, True)])
def test_equals_softmax_over_single_queries_with_gradients(rule: Bucket, causal: bool, side: str) -> None:
    attention, relative = Attention(D, H, head_dim=5, scale=1.0).double(), RelativeBias(H, rule, 8, 12).double()
    x = torch.randn(2, S, D, dtype=torch.float64, requires_grad=True)
    leaves = (x, *attention.parameters(), *relative.parameters())
    whole = Tokens.of(x, causal=causal)
    for tokens in (padded(x, causal, side), whole, whole.dynamic()):
        found, _ = attention(x, Context(tokens, relative(tokens)))
        expected = naive(attention, relative, tokens, 12)
        kept = tokens.valid[..., None]
        torch.testing.assert_close(found * kept, expected * kept)
        slopes = [torch.autograd.grad((y * kept).square().sum(), leaves) for y in (found, expected)]
        torch.testing.assert_close(*slopes)


def stack(rule: Bucket) -> Stack:
    made = Stack(
        [
            Block(Attention(D, H, scale=1.0), Mlp(D, 16), PreNorm(nn.LayerNorm(D)), PreNorm(nn.LayerNorm(D)))
            for _ in range(2)
        ],
        relative=RelativeBias(H, rule, 8, 12),
    )
    return made.double().eval()


@pytest.mark.parametrize("side", ["left", "right", "none"])
@torch.no_grad()
def test_tokens_after_a_past_are_as_far_from_it_as_at_once(side: str) -> None:
    """Padding between the past of a row and what follows is no distance."""
    model, x = stack(backwards), torch.randn(2, S, D, dtype=torch.float64)
    first = Tokens.of(x) if side == "none" else padded(x, True, side)
    more = torch.randn(2, 3, D, dtype=torch.float64)
    out = model(first)
    then = model(Tokens.of(more[:, :2]), None, out.state)
    last = model(Tokens.of(more[:, 2:]), None, then.state)
    for row in range(2):
        alone = model(Tokens.of(torch.cat([x[row][first.valid[row]], more[row]])[None])).hidden[0, -3:]
        torch.testing.assert_close(torch.cat([then.hidden[row], last.hidden[row]]), alone)


def test_too_few_buckets_are_refused() -> None:
    for buckets, longest in ((2, 128), (32, 32)):
        with pytest.raises(ValueError, match=rf"buckets={buckets}, longest={longest}: at least 4 buckets"):
            RelativeBias(2, both_ways, buckets, longest)


def test_no_score_is_scaled_but_by_the_scale() -> None:
    """Attention with scale 1 is attention with queries larger by sqrt(head_dim)."""
    plain, free = Attention(D, H), Attention(D, H, scale=1.0)
    free.load_state_dict(plain.state_dict())
    free.query.weight.data /= math.sqrt(D // H)
    tokens = Tokens.of(torch.randn(2, S, D))
    context = Context(tokens, tokens.visibility())
    torch.testing.assert_close(plain(tokens.x, context)[0], free(tokens.x, context)[0])


def test_cross_attention_sees_no_padding_with_gradients() -> None:
    cross = CrossAttention(D, 7, H, bias=False, head_dim=5, scale=1.0).double()
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    read = torch.randn(2, S, 7, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(S) < torch.tensor([[3], [S]])
    looked = cross.project(read, valid)
    found = cross(x, looked)
    alone = [cross(x[i : i + 1], cross.project(read[i : i + 1, valid[i]])) for i in range(2)]
    torch.testing.assert_close(found, torch.cat(alone))
    slopes = [torch.autograd.grad(y.square().sum(), (x, read, *cross.parameters())) for y in (found, torch.cat(alone))]
    torch.testing.assert_close(*slopes)
    index = torch.tensor([1, 0, 0])
    torch.testing.assert_close(cross(x[index], looked.select(index)), found[index])
