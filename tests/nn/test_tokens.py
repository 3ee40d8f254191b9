"""Who sees whom: the mask against a loop over single elements, its shortcuts, and positions."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm.nn.tokens import Route, Tokens, count_positions

Part = tuple[Route, bool, int, list[list[bool]] | None]  # route, causal, length, which tokens are valid (None: all)
Layout = tuple[int, list[Part], list[list[bool]] | None]  # rows, runs, valid past


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Rows, one to four runs side by side, some of them with padding anywhere, and perhaps a past."""
    batch = draw(st.integers(1, 3))

    def flags(length: int) -> st.SearchStrategy[list[list[bool]]]:
        return st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)

    parts: list[Part] = []
    for length in draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)):
        parts.append((draw(st.sampled_from(Route)), draw(st.booleans()), length, draw(st.none() | flags(length))))
    return batch, parts, draw(st.none() | flags(draw(st.integers(1, 3))))


def build(batch: int, parts: list[Part], past: list[list[bool]] | None) -> tuple[Tokens, Tensor | None]:
    made = [
        Tokens.of(torch.zeros(batch, length, 1), route, causal, None if valid is None else torch.tensor(valid))
        for route, causal, length, valid in parts
    ]
    whole = made[0]
    for part in made[1:]:
        whole = whole.concat(part)
    return whole, None if past is None else torch.tensor(past)


def seen(tokens: Tokens, past: Tensor | None, row: int, query: int, key: int) -> bool:
    """The rule for one pair, in words: `key` counts the past first."""
    before = 0 if past is None else past.shape[1]
    if past is not None and key < before:
        return bool(past[row, key])
    key -= before
    if key == query:
        return True
    hidden = tokens.causal[row, key] and key > query
    return bool(tokens.valid[row, key]) and not bool(hidden)


@given(layouts())
def test_mask_follows_the_rule_for_every_pair(layout: Layout) -> None:
    tokens, past = build(*layout)
    batch, length, _ = tokens.x.shape
    mask = tokens.mask(past)
    keys = length + (0 if past is None else past.shape[1])
    assert mask.shape == (batch, 1, length, keys)
    for row in range(batch):
        for query in range(length):
            expected = [seen(tokens, past, row, query, key) for key in range(keys)]
            assert mask[row, 0, query].tolist() == expected


@given(layouts())
def test_shortcuts_say_what_the_mask_says(layout: Layout) -> None:
    tokens, past = build(*layout)
    mask = tokens.mask(past)
    short = tokens.visibility(past)
    if short.mask is None:
        everything = torch.ones_like(mask)
        assert torch.equal(everything.tril() if short.is_causal else everything, mask)
    else:
        assert not short.is_causal
        assert torch.equal(short.mask, mask)
    without_hint = tokens.dynamic().visibility(past).mask
    assert without_hint is not None
    assert torch.equal(without_hint, mask)


def test_shortcuts_are_taken() -> None:
    x = torch.zeros(2, 3, 4)
    assert Tokens.of(x, causal=True).visibility() == (None, True)
    assert Tokens.of(x, causal=False).visibility() == (None, False)
    mixed = Tokens.of(x, causal=False).concat(Tokens.of(x, causal=True))
    assert mixed.visibility().mask is not None
    assert Tokens.of(x, causal=True).visibility(torch.ones(2, 1, dtype=torch.bool)).mask is not None
    assert Tokens.of(x, causal=True, valid=torch.ones(2, 3, dtype=torch.bool)).visibility().mask is not None


def test_grounded_generation_by_hand() -> None:
    queries = Tokens.of(torch.zeros(1, 2, 1), Route.QUERY, causal=False)
    text = Tokens.of(torch.zeros(1, 3, 1), Route.TEXT, causal=True, valid=torch.tensor([[True, True, False]]))
    expected = [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],  # padding sees itself, so that no row is empty
    ]
    assert queries.concat(text).mask()[0, 0].int().tolist() == expected


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3))
def test_positions_count_valid_tokens(rows: list[list[bool]]) -> None:
    found = count_positions(torch.tensor(rows)).tolist()
    for row, positions in zip(rows, found, strict=True):
        kept = [position for position, valid in zip(positions, row, strict=True) if valid]
        assert kept == list(range(sum(row)))
        assert min(positions) >= 0


def test_padding_on_either_side_shifts_no_position() -> None:
    left, right = torch.tensor([[False, False, True, True]]), torch.tensor([[True, True, False, False]])
    assert count_positions(left)[left].tolist() == count_positions(right)[right].tolist() == [0, 1]


def test_concat_keeps_positions_and_given_ones_are_taken() -> None:
    given_positions = torch.tensor([[7, 9]])
    first = Tokens.of(torch.zeros(1, 3, 1))
    both = first.concat(Tokens.of(torch.ones(1, 2, 1), Route.IMAGE, position=given_positions))
    assert both.position.tolist() == [[0, 1, 2, 7, 9]]
    assert both.route.tolist() == [[0, 0, 0, 1, 1]]
    assert both.x[0, :, 0].tolist() == [0, 0, 0, 1, 1]
    assert first.dynamic().concat(first).runs is None
