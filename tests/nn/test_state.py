"""The key/value memory: extending never changes an older value, whoever shares the storage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm.nn.attention import ImageKeyValue, attend, attend_branches
from vlm.nn.block import ImageMemory
from vlm.nn.state import Branched, KeyValue, LayerState, State


def columns(length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 4)


@pytest.mark.parametrize("grad", [True, False])
def test_extend_appends(grad: bool) -> None:
    parts = [columns(length) for length in (4, 1, 1, 40, 2, 1)]
    with torch.set_grad_enabled(grad):
        state = KeyValue(*parts[0])
        for part in parts[1:]:
            state = state.extend(*part)
    assert torch.equal(state.key, torch.cat([key for key, _ in parts], 2))
    assert torch.equal(state.value, torch.cat([value for _, value in parts], 2))


def test_gradients_flow_through_extend() -> None:
    key, value = (part.requires_grad_() for part in columns(2))
    longer = KeyValue(key, value).extend(*columns(1))
    (longer.key.sum() + 2 * longer.value.sum()).backward()
    assert key.grad is not None and value.grad is not None
    assert torch.equal(key.grad, torch.ones_like(key))
    assert torch.equal(value.grad, 2 * torch.ones_like(value))


@torch.no_grad()
def test_storage_is_shared_while_nobody_else_continues() -> None:
    state = KeyValue(*columns(3)).extend(*columns(1))
    longer = state.extend(*columns(1))
    assert longer.key.data_ptr() == state.key.data_ptr()
    assert longer.value.data_ptr() == state.value.data_ptr()
    assert state.extend(*columns(1)).key.data_ptr() != state.key.data_ptr()


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 20), st.booleans()), min_size=1, max_size=12))
def test_continuations_of_one_past_do_not_disturb_each_other(steps: list[tuple[int, int, bool]]) -> None:
    """A tree of continuations: each keeps equal to the plain concatenation that made it, to the end."""
    first = columns(2)
    states, expected = [KeyValue(*first)], [first]
    for parent, length, grad in steps:
        parent %= len(states)
        new = columns(length)
        with torch.set_grad_enabled(grad):
            states.append(states[parent].extend(*new))
        old = expected[parent]
        expected.append((torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)))
    for state, (key, value) in zip(states, expected, strict=True):
        assert torch.equal(state.key, key)
        assert torch.equal(state.value, value)


@torch.no_grad()
def test_reorder_picks_rows_and_copies() -> None:
    state = KeyValue(*columns(3)).extend(*columns(1))
    before = state.key.clone()
    picked = state.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(picked.key, before[[1, 1, 0]])
    key, value = (part[[0, 1, 0]] for part in columns(1))
    longer = picked.extend(key, value)
    assert torch.equal(longer.key[:, :, :4], before[[1, 1, 0]])
    assert torch.equal(state.key, before)


def test_the_state_of_a_stack_reorders_all_it_holds() -> None:
    layers = tuple(KeyValue(*columns(3)) for _ in range(2))
    assert all(isinstance(layer, LayerState) for layer in layers)
    state = State(layers, torch.tensor([[True, True, False], [True, True, True]]), torch.tensor([2, 3]))
    picked = state.reorder(torch.tensor([1, 0, 1]))
    assert picked.valid.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    assert picked.position.tolist() == [3, 2, 3]
    assert isinstance(picked.layers[1], KeyValue)
    assert torch.equal(picked.layers[1].value, layers[1].value[[1, 0, 1]])


def test_what_stands_beside_goes_along() -> None:
    """Two beams each of two rows: reordered when they begin, the same for all beams of a row after that."""
    seen = ImageKeyValue(*columns(5), torch.tensor([[True] * 5, [False] * 5])[:, None, None])
    begun = State((), torch.ones(2, 1, dtype=torch.bool), torch.tensor([1, 1]), True, None, ImageMemory((None, seen)))
    beams = begun.reorder(torch.tensor([0, 0, 1, 1]))
    assert isinstance(beams.beside, ImageMemory) and beams.beside.blocks[0] is None
    looked = beams.beside.blocks[1]
    assert looked is not None and looked.seen is not None
    assert (
        torch.equal(looked.key, seen.key[[0, 0, 1, 1]]) and looked.seen[:, 0, 0, 0].tolist() == [True] * 2 + [False] * 2
    )
    for later in (beams.move(torch.tensor([1, 1, 2, 3]), 1), beams.crop(1), beams.disposable()):
        assert later.beside is beams.beside


@pytest.mark.parametrize("shared", [False, True])
def test_moving_beams_is_reordering_them(shared: bool) -> None:
    """Two rows with three beams each; what stands behind another continuation is not written over."""
    with torch.no_grad():
        prompt = KeyValue(torch.randn(2, 1, 4, 3), torch.randn(2, 1, 4, 3))
        beams = prompt.reorder(torch.arange(2).repeat_interleave(3))
        said = beams.extend(torch.randn(6, 1, 2, 3), torch.randn(6, 1, 2, 3))
        other = said.extend(torch.randn(6, 1, 1, 3), torch.randn(6, 1, 1, 3)) if shared else None
        before = None if other is None else other.key.clone()
        index = torch.tensor([2, 0, 0, 4, 4, 5])
        expected = said.reorder(index)
        moved = said.move(index, 2)
        assert torch.equal(moved.key, expected.key) and torch.equal(moved.value, expected.value)
        if other is not None:
            assert torch.equal(other.key, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "padding", "bias"])
@pytest.mark.parametrize("groups", [1, 4])
@torch.no_grad()
def test_branches_are_copied_rows(groups: int, kind: str, dtype: torch.dtype) -> None:
    """Two pasts of five tokens with three branches each, which then add two tokens, change places, and look back."""
    prompt = KeyValue(*torch.randn(2, 2, groups, 5, 8).to(dtype))
    index, added = torch.arange(2).repeat_interleave(3), torch.randn(2, 6, groups, 2, 8).to(dtype)
    copies, branches = prompt.reorder(index).extend(*added), prompt.branch(3).extend(*added)
    order = torch.tensor([2, 0, 0, 4, 4, 5])
    copies, branches = copies.move(order, 2), branches.move(order, 2)
    query = torch.randn(6, 4, 1, 8).to(dtype)
    mask = {"none": None, "padding": (torch.rand(6, 1, 1, 7) + torch.eye(7)[0]) > 0.3, "bias": torch.randn(1, 4, 1, 7)}[
        kind
    ]
    trunk = branches.trunk.key, branches.trunk.value
    found = attend_branches(query, trunk, (branches.key, branches.value), mask, 0.5)
    bias = mask.to(dtype) if kind == "bias" and mask is not None else mask
    expected = attend(query, copies.key, copies.value, bias, scale=0.5, grouped=groups != 4)
    assert found.dtype == dtype and (found - expected).abs().max() < (1e-6 if dtype == torch.float32 else 2e-2)


def test_branches_written_out() -> None:
    with torch.no_grad():
        prompt, added = KeyValue(*columns(4)), torch.randn(2, 4, *columns(2)[0].shape[1:])
        branches = prompt.branch(2).extend(*added)
        copies = prompt.reorder(torch.arange(len(prompt.key)).repeat_interleave(2)).extend(*added)
        picked = torch.tensor([3, 0, 0])
        pairs = [(branches.whole(), copies), (branches.reorder(picked), copies.reorder(picked))]
        shorter = [(branches.crop(n), copies.crop(n)) for n in (0, 1, 3)]
        pairs += [(one.whole() if isinstance(one, Branched) else one, two) for one, two in shorter]
        for ours, wanted in pairs:
            assert torch.equal(ours.key, wanted.key) and torch.equal(ours.value, wanted.value)
