"""Retention: parallel, recurrent and chunkwise forms give the same outputs, memories and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlm.nn.block import Block, PreNorm, Stack
from vlm.nn.ffn import GatedMlp
from vlm.nn.retain import Chunkwise, Fading, Retained, parallel, recurrent
from vlm.nn.retention import Decay, Form, Retention, RetentionState, decays
from vlm.nn.route import PerRoute
from vlm.nn.state import KeyValue, LayerState, State
from vlm.nn.tokens import Route, Tokens

D, H = 24, 3


def inputs(
    batch: int, length: int, dtype: torch.dtype, heads: int = 2, key: int = 4, value: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (batch, length, heads)
    q, k = (torch.randn(*shape, key, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, torch.randn(*shape, value, dtype=dtype, requires_grad=True)


def fading(valid: Tensor, dtype: torch.dtype, seen: Tensor | None = None) -> Fading:
    tokens = Tokens.of(torch.zeros(*valid.shape, 1, dtype=dtype), valid=valid)
    return Decay(2, 4)(tokens, seen)


def by_hand(q: Tensor, k: Tensor, v: Tensor, f: Fading) -> Tensor:
    """The definition, number by number: B S H V."""
    batch, length, heads, width = q.shape
    rows = torch.zeros_like(v)
    for b in range(batch):
        for h in range(heads):
            decay = math.exp(float(f.log_decay[h]))
            for n in range(length):
                count = int(f.place[b, n])
                past = [m for m in range(n + 1) if f.turn_key[b, m].abs().sum() > 0]
                series = sum(decay ** (count - int(f.place[b, m])) for m in past)
                turned = [torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k)]
                score = {
                    m: decay ** (count - int(f.place[b, m]))
                    * ((turned[0][b, n, h] * f.turn[b, n]) * (turned[1][b, m, h] * f.turn[b, m]).conj()).real.sum()
                    / math.sqrt(width * series)
                    for m in past
                }
                total = max(1.0, abs(float(sum(score.values()))))
                rows[b, n, h] = sum((s * v[b, m, h] for m, s in score.items()), torch.zeros_like(v[b, n, h])) / total
    return rows


def everything(form: Form, q: Tensor, k: Tensor, v: Tensor, f: Fading, past: Tensor | None) -> list[Tensor]:
    """Outputs, memory, and the gradients of a loss on both."""
    done: Retained = form(q, k, v, f, past)
    maker = torch.Generator().manual_seed(1)

    def weighed(x: Tensor) -> Tensor:
        return (x * torch.randn(x.shape, generator=maker, dtype=torch.float64).to(x.dtype)).sum()

    loss = weighed(done.out) + weighed(done.total[..., :-1])
    leaves = [q, k, v] if past is None else [q, k, v, past]
    grads = list(torch.autograd.grad(loss, leaves))
    if past is not None:
        grads[-1] = grads[-1][..., :-1]  # the column of ones takes no part in learning
    return [done.out, done.total, *grads]


def test_parallel_is_the_definition() -> None:
    valid = torch.tensor([[True, True, False, True, True], [False, False, True, True, False]])
    q, k, v = inputs(2, 5, torch.float64)
    f = fading(valid, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(parallel(9 * q, k, v, f).out[valid], by_hand(9 * q, k, v, f)[valid])


@given(st.data())
@settings(max_examples=60)
def test_three_forms_agree(data: st.DataObject) -> None:
    dtype, limit = data.draw(st.sampled_from([(torch.float64, 1e-10), (torch.float32, 1e-5)]))
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    chunk = data.draw(st.integers(1, 80))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    q, k, v = inputs(batch, length, dtype)
    valid = torch.rand(batch, length) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    past = seen = None
    if data.draw(st.booleans()):
        past, seen = (
            torch.randn(batch, 2, 4, 7, dtype=dtype, requires_grad=True),
            torch.randint(0, 9, (batch,)).to(dtype),
        )
    f = fading(valid, dtype, seen)
    expected = everything(parallel, q, k, v, f, past)
    for form in (recurrent, Chunkwise(chunk)):
        for ours, theirs in zip(everything(form, q, k, v, f, past), expected, strict=True):
            assert float((ours - theirs).detach().abs().max()) <= limit * max(1.0, float(theirs.detach().abs().max()))


def test_bfloat16_at_two_thousand_tokens() -> None:
    """Within 2 % of fp64, in the norm, forward and backward, for the slowest and the fastest decay."""
    exact = inputs(1, 2048, torch.float64)
    rough = [x.detach().bfloat16().requires_grad_() for x in exact]
    everyone = torch.ones(1, 2048, dtype=torch.bool)
    expected = everything(Chunkwise(64), *exact, fading(everyone, torch.float64), None)
    found = everything(Chunkwise(64), *rough, fading(everyone, torch.bfloat16), None)
    assert found[1].dtype == torch.float32, "the memory stays in fp32"
    for ours, theirs in zip(found, expected, strict=True):
        assert float(((ours.double() - theirs).norm() / theirs.norm()).detach()) < 0.02


def test_long_memories_stay_finite() -> None:
    q, k, v = inputs(1, 5000, torch.float32)
    out = Chunkwise(512)(q, k, v, fading(torch.ones(1, 5000, dtype=torch.bool), torch.float32))
    assert out.out.isfinite().all() and out.total.isfinite().all()


def test_decay_schedules() -> None:
    assert decays(2).tolist() == [1 - 1 / 32, 1 - 1 / 64]
    paper = decays(3, "geometric")
    torch.testing.assert_close(1 / (1 - paper), torch.tensor([32.0, 128.0, 512.0], dtype=torch.float64))


# --- the mixer in a stack --------------------------------------------------------------------------------------------


def stack(form: Form | None = None, layers: int = 2, schedule: str = "powers") -> Stack:
    torch.manual_seed(0)
    blocks = [
        Block(Retention(D, H, form=form), GatedMlp(D, 32), PreNorm(nn.RMSNorm(D)), PreNorm(nn.RMSNorm(D)))
        for _ in range(layers)
    ]
    return Stack(blocks, nn.RMSNorm(D), decay=Decay(H, D // H, schedule)).double()  # type: ignore[arg-type]


def test_small_weights_change_nothing() -> None:
    """Where the published forms part: outputs so small that the norm's eps shows (systems: 3.7e-2 in logits)."""
    models = [stack(form) for form in (parallel, Chunkwise(3), recurrent)]
    x = torch.randn(2, 11, D, dtype=torch.float64)
    outs = []
    for model in models:
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data *= 0.02
        outs.append(model(Tokens.of(x)).hidden)
    torch.testing.assert_close(outs[1], outs[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(outs[2], outs[0], atol=1e-12, rtol=0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_cut_anywhere(cuts: list[int]) -> None:
    model, length = stack(Chunkwise(4)), sum(cuts)
    x = torch.randn(2, length, D, dtype=torch.float64)
    valid = torch.rand(2, length) < 0.8
    whole = model(Tokens.of(x, valid=valid))
    position = Tokens.of(x, valid=valid).position
    state, start, parts = None, 0, []
    for size in cuts:
        here = slice(start, start + size)
        tokens = Tokens.of(x[:, here], valid=valid[:, here], position=position[:, here])
        out = model(tokens, None, state)
        state, start = out.state, start + size
        parts.append(out.hidden)
    torch.testing.assert_close(torch.cat(parts, 1)[valid], whole.hidden[valid], atol=1e-10, rtol=0)
    assert torch.equal(state.position, whole.state.position)  # type: ignore[union-attr]
    assert torch.equal(state.seen, whole.state.seen)  # type: ignore[union-attr]
    for mine, theirs in zip(state.layers, whole.state.layers, strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(mine.total, theirs.total, atol=1e-10, rtol=0)


def test_padding_on_either_side_changes_nothing() -> None:
    model = stack()
    x = torch.randn(1, 6, D, dtype=torch.float64)
    alone = model(Tokens.of(x))
    for before in (0, 2, 5):
        junk = torch.randn(1, 11, D, dtype=torch.float64)
        valid = torch.zeros(1, 11, dtype=torch.bool)
        junk[:, before : before + 6], valid[:, before : before + 6] = x, True
        out = model(Tokens.of(junk, valid=valid))
        torch.testing.assert_close(out.hidden[:, before : before + 6], alone.hidden)
        torch.testing.assert_close(out.state.layers[0].total, alone.state.layers[0].total)
        assert int(out.state.position) == 6


def test_memory_does_not_grow() -> None:
    def size(state: State) -> int:
        assert state.valid is None
        return sum(layer.total.numel() for layer in state.layers)  # type: ignore[attr-defined]

    model = stack()
    with torch.no_grad():
        short, long = (model(Tokens.of(torch.randn(1, n, D, dtype=torch.float64))).state for n in (3, 300))
    assert size(short) == size(long)


def test_reorder() -> None:
    model = stack()
    x = torch.randn(3, 5, D, dtype=torch.float64)
    index = torch.tensor([2, 2, 0])
    state = model(Tokens.of(x)).state.reorder(index)
    more = torch.randn(3, 1, D, dtype=torch.float64)
    position = state.position[:, None]
    found = model(Tokens.of(more, position=position), None, state).hidden
    expected = model(Tokens.of(torch.cat([x[index], more], 1))).hidden[:, -1:]
    torch.testing.assert_close(found, expected)


def test_a_disposable_state_is_written_over_and_no_other() -> None:
    model = stack()
    x = torch.randn(2, 9, D, dtype=torch.float64)

    def step(n: int, state: State) -> State:
        return model(Tokens.of(x[:, n : n + 1], position=state.position[:, None]), None, state).state

    def totals(state: State) -> list[Tensor]:
        return [layer.total for layer in state.layers]  # type: ignore[attr-defined]

    with torch.no_grad():
        first = model(Tokens.of(x[:, :6])).state
        kept = [total.clone() for total in totals(first)]
        second = step(6, first)
        assert all(map(torch.equal, totals(first), kept))
        storage = [total.data_ptr() for total in totals(second)]
        third = step(8, step(7, second.disposable()))
        assert [total.data_ptr() for total in totals(third)] == storage
        torch.testing.assert_close(totals(third), totals(model(Tokens.of(x)).state))
    # Where gradients are recorded the memory before is still needed.
    before = [total.clone() for total in totals(third)]
    step(8, third)
    assert all(map(torch.equal, totals(third), before))


@pytest.mark.parametrize("drop", [0, 1, 3, 4])
def test_crop_takes_back_what_was_tried(drop: int) -> None:
    model = stack()
    x, tried = torch.randn(2, 7, D, dtype=torch.float64), torch.randn(2, 4, D, dtype=torch.float64)
    with torch.no_grad():
        before = model(Tokens.of(x)).state
        position = before.position[:, None] + torch.arange(4)
        cut = model(Tokens.of(tried, position=position), None, before).state.crop(drop)
        kept = model(Tokens.of(torch.cat([x, tried[:, : 4 - drop]], 1))).state
    assert torch.equal(cut.position, kept.position) and torch.equal(cut.seen, kept.seen)
    for mine, theirs in zip(cut.layers, kept.layers, strict=True):
        torch.testing.assert_close(mine.total, theirs.total)
    if 0 < drop < 4:
        assert cut.crop(4 - drop).layers[0].recent is None  # type: ignore[attr-defined]


def test_crop_refuses_what_is_gone() -> None:
    model = stack()
    with torch.no_grad():
        state = model(Tokens.of(torch.randn(1, 40, D, dtype=torch.float64))).state
    with pytest.raises(ValueError, match="keep the state from before"):
        state.crop(1)


def test_own_weights_per_route() -> None:
    """Retention's projections can be per route, sliced and dense alike."""
    model = stack(layers=1)
    mixer = model.blocks[0].mixer
    for name in ("query", "key", "value", "gate", "out"):
        shape = getattr(mixer, name)
        routes = {
            route: nn.Linear(shape.in_features, shape.out_features).double() for route in (Route.IMAGE, Route.TEXT)
        }
        setattr(mixer, name, PerRoute(routes))
    image, text = (torch.randn(2, n, D, dtype=torch.float64) for n in (3, 4))
    after = torch.arange(3, 7).expand(2, -1)
    tokens = Tokens.of(image, Route.IMAGE).concat(Tokens.of(text, position=after))
    torch.testing.assert_close(model(tokens).hidden, model(tokens.dynamic()).hidden)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_bidirectional_prefix_is_refused_in_words(dynamic: bool) -> None:
    x = torch.randn(1, 3, D, dtype=torch.float64)
    tokens = Tokens.of(x, Route.IMAGE, causal=False).concat(Tokens.of(x))
    with pytest.raises(ValueError, match=r"retention is causal.*mixer\.kind=attention"):
        stack()(tokens.dynamic() if dynamic else tokens)


def other(layer: LayerState, layers: int = 2) -> State:
    return State((layer,) * layers, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.long))


@pytest.mark.parametrize(
    "state",
    [
        other(KeyValue(torch.zeros(1, H, 1, 8), torch.zeros(1, H, 1, 8))),
        other(RetentionState(torch.zeros(1, H, 8, 99))),
        other(RetentionState(torch.zeros(1, H, 8, 17)), layers=3),
    ],
)
def test_a_state_of_another_model_is_refused(state: State) -> None:
    with pytest.raises(ValueError, match="state is of another model"):
        stack()(Tokens.of(torch.randn(1, 1, D, dtype=torch.float64)), None, state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retention(10, 3), "heads=3 does not divide dim=10"),
        (lambda: Retention(12, 3, value_dim=10), "heads=3 does not divide value_dim=10"),
        (lambda: Decay(2, 5), "must be even"),
        (lambda: Chunkwise(0), "chunk=0: from 1 to 512"),
        (lambda: Chunkwise(1000), "chunk=1000: from 1 to 512"),
    ],
)
def test_impossible_sizes(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
