"""A sliding window against a plain mask: whole, cut anywhere, padded anywhere, in constant memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vlm.nn.attention
from tests.nn.test_attention import gradients, heads, naive
from vlm.nn.attention import Attention, merge_heads
from vlm.nn.block import Block, PreNorm, Stack
from vlm.nn.context import Context
from vlm.nn.ffn import GatedMlp
from vlm.nn.rotary import Rotary
from vlm.nn.state import LayerState, State
from vlm.nn.tokens import Tokens
from vlm.nn.window import UNDO, Recent

D, H = 12, 3


def stack_of(window: int | None, layers: int = 2) -> Stack:
    """The same weights for every window."""
    torch.manual_seed(0)
    blocks = [
        Block(Attention(D, H, 1, window=window), GatedMlp(D, 16), PreNorm(nn.RMSNorm(D)), PreNorm(nn.RMSNorm(D)))
        for _ in range(layers)
    ]
    return Stack(blocks, nn.RMSNorm(D), Rotary(D // H, 50.0)).eval()


def inputs(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, D, generator=torch.Generator().manual_seed(length))


def in_band(valid: Tensor, size: int) -> Tensor:
    """B S S, column by column: at most `size` valid tokens from the key to the query."""
    rows, length = valid.shape
    band = torch.zeros(rows, length, length, dtype=torch.bool)
    for b in range(rows):
        for s in range(length):
            for t in range(length):
                band[b, s, t] = t >= s or int(valid[b, t + 1 : s + 1].sum()) < size
    return band


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("layout", ["causal", "free", "mixed"])
def test_equals_softmax_inside_the_band_with_gradients(size: int, layout: str) -> None:
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    tokens = Tokens.of(x, causal=layout == "causal")
    if layout == "mixed":
        valid = torch.tensor([[True, False, False, True, False], [True] * 5])
        tokens = Tokens.of(x[:, :2], causal=False).concat(Tokens.of(x[:, 2:], valid=valid))
    attention = Attention(D, H, 1, window=size).double()
    found, _ = attention(x, Context(tokens, tokens.visibility()))
    parts = [heads(linear, x, n) for linear, n in ((attention.query, H), (attention.key, 1), (attention.value, 1))]
    mixed = naive(*parts, tokens.mask()[:, 0] & in_band(tokens.valid, size))
    expected = attention.out(merge_heads(mixed))
    torch.testing.assert_close(found, expected)
    leaves = (x, *attention.parameters())
    torch.testing.assert_close(gradients(found, *leaves), gradients(expected, *leaves))


@given(
    size=st.integers(1, 9),
    flags=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 11)),
    grad=st.booleans(),
)
def test_cut_and_padded_anywhere_it_is_each_row_alone(
    size: int, flags: list[list[bool]], cuts: set[int], grad: bool
) -> None:
    stack, valid = stack_of(size), torch.tensor(flags)
    x = inputs(len(flags), 12)
    with torch.set_grad_enabled(grad):
        state: State | None = None
        rows, start = [], torch.zeros(len(flags), 1, dtype=torch.long)
        for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 12], strict=True):
            here = valid[:, first:last]
            position = start + (here.long().cumsum(1) - 1).clamp_min(0)
            known = None if bool(here.all()) else here
            out = stack(Tokens.of(x[:, first:last], valid=known, position=position), None, state)
            state, start = out.state, out.state.position[:, None]
            rows.append(out.hidden)
        found = torch.cat(rows, 1)
        for row, kept, whole in zip(x, valid, found, strict=True):
            if bool(kept.any()):
                alone = stack(Tokens.of(row[kept][None]))
                torch.testing.assert_close(whole[kept], alone.hidden[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_window_is_noticed_and_a_wide_one_is_none() -> None:
    x = inputs(2, 9)
    everything = stack_of(None)(Tokens.of(x)).hidden
    torch.testing.assert_close(stack_of(9)(Tokens.of(x)).hidden, everything)
    narrower = stack_of(8)(Tokens.of(x)).hidden
    torch.testing.assert_close(narrower[:, :8], everything[:, :8])
    assert float((narrower[:, 8] - everything[:, 8]).abs().max()) > 1e-4


def one_by_one(stack: Stack, x: Tensor, state: State) -> tuple[Tensor, list[State]]:
    rows, states = [], [state]
    for i in range(x.shape[1]):
        out = stack(Tokens.of(x[:, i : i + 1], position=state.position[:, None]), None, state)
        state = out.state
        rows.append(out.hidden)
        states.append(state)
    return torch.cat(rows, 1), states


def recent(state: LayerState) -> Recent:
    assert isinstance(state, Recent)
    return state


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_memory_stays_constant_while_decoding(padded: bool) -> None:
    size, x = 8, inputs(2, 300)
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[1, :37] = not padded
    stack = stack_of(size)
    first = stack(Tokens.of(x[:, :100], valid=valid if padded else None))
    found, states = one_by_one(stack, x[:, 100:], first.state)
    every = torch.cat([valid, torch.ones(2, 200, dtype=torch.bool)], 1)
    whole = stack(Tokens.of(x, valid=every if padded else None)).hidden
    torch.testing.assert_close(found, whole[:, 100:], atol=1e-5, rtol=1e-4)
    held = [recent(state.layers[0]).memory.key for state in states[1:]]
    columns = max(key.untyped_storage().nbytes() // (4 * 2 * (D // H)) for key in held)
    assert columns <= 2 * (size + UNDO + 32)
    assert len({key.data_ptr() for key in held}) < 20  # written in place, not copied for each token


@torch.no_grad()
def test_only_the_window_is_looked_at_and_no_mask_where_nothing_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool, bool]] = []
    plain = vlm.nn.attention.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        seen.append((key.shape[2], options["attn_mask"] is not None, bool(options["is_causal"])))
        return plain(query, key, value, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(vlm.nn.attention, "scaled_dot_product_attention", spy)
    stack, x = stack_of(4, layers=1), inputs(1, 9)
    out = stack(Tokens.of(x[:, :4]))
    one_by_one(stack, x[:, 4:7], out.state)
    stack(Tokens.of(x[:, :5]))
    assert seen == [(4, False, True), *[(4, False, False)] * 3, (5, True, False)]


@torch.no_grad()
def test_beams_go_on_from_their_rows() -> None:
    stack, x = stack_of(3), inputs(3, 9)
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[1, :3] = False
    out = stack(Tokens.of(x[:, :5], valid=valid))
    for index in ([2, 0, 1, 1], [0, 0, 3, 2]):
        order = torch.tensor(index)
        x, valid, state = x[order], valid[order], out.state.reorder(order)
        at = state.valid.shape[1]
        out = stack(Tokens.of(x[:, at : at + 1], position=state.position[:, None]), None, state)
        valid = torch.cat([valid, torch.ones(len(valid), 1, dtype=torch.bool)], 1)
        whole = stack(Tokens.of(x[:, : at + 1], valid=valid)).hidden
        torch.testing.assert_close(out.hidden[:, 0], whole[:, -1])


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_what_was_tried_can_be_taken_back(padded: bool) -> None:
    stack, x = stack_of(5), inputs(2, 100)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, :9] = valid[1, 20:22] = False
    out = stack(Tokens.of(x[:, :30], valid=valid if padded else None))
    for drop in (0, 1, 7, UNDO):
        for tried in range(max(drop, 1), drop + 40, 19):
            _, states = one_by_one(stack, x[:, 30 : 30 + tried], out.state)
            back, kept = states[-1].crop(drop), states[tried - drop]
            assert torch.equal(back.position, kept.position)
            token = Tokens.of(x[:, -1:], position=kept.position[:, None])
            found, wanted = stack(token, None, back).hidden, stack(token, None, kept).hidden
            torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_what_is_forgotten_cannot_be_brought_back() -> None:
    stack, x = stack_of(5), inputs(1, 90)
    start = stack(Tokens.of(x[:, :3])).state
    assert len(recent(start.crop(3).layers[0])) == 0
    _, states = one_by_one(stack, x[:, 3:], start)
    with pytest.raises(ValueError, match=r"70 tokens cannot be taken back from a window of 5.*at most \d\d, or keep"):
        states[-1].crop(70)
    with pytest.raises(ValueError, match="-1 tokens"):
        recent(start.layers[0]).crop(-1)


@torch.no_grad()
def test_continuations_of_one_past_do_not_disturb_each_other() -> None:
    stack, x = stack_of(4), inputs(1, 60)
    _, states = one_by_one(stack, x[:, 1:40], stack(Tokens.of(x[:, :1])).state)
    for at in (38, 20, 5, 39):
        one_by_one(stack, x[:, 50:55], states[at])
    for at in (39, 20, 5):
        found, _ = one_by_one(stack, x[:, 40:43], states[at])
        row = torch.cat([x[:, : at + 1], x[:, 40:43]], 1)
        torch.testing.assert_close(found, stack(Tokens.of(row)).hidden[:, -3:])


@pytest.mark.parametrize("size", [0, -3])
def test_a_window_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"window={size}: a token sees at least itself"):
        Attention(D, H, window=size)
