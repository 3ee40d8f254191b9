"""Flat strings, ragged rows and stacks: what goes in comes out, whatever part is asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm.eval.rows import Rows, Stacked, Strings


@given(st.lists(st.text()))
def test_strings(texts: list[str]) -> None:
    packed = Strings.of(texts)
    assert list(packed) == [text.encode("utf-8", "replace").decode() for text in texts]
    assert packed[1:3] == list(packed)[1:3]
    assert not texts or packed[-1] == packed[len(texts) - 1]
    with pytest.raises(IndexError):
        packed[len(texts)]


@given(st.lists(st.lists(st.integers(0, 9)), min_size=1), st.integers(0, 5))
def test_rows(rows: list[list[int]], cut: int) -> None:
    made = [Rows.of(map(torch.tensor, part), torch.int64) for part in (rows[:cut], rows[cut:])]
    joined = Rows.joined(made)
    assert [joined[place].tolist() for place in range(len(joined))] == rows


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 99))
def test_stacked(sizes: list[int], seed: int) -> None:
    whole = torch.arange(sum(sizes) * 6).reshape(-1, 2, 3)
    stacked = Stacked(whole.split(sizes))
    rows = torch.randint(0, len(whole), (5,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(stacked.take(rows), whole[rows])
    some = stacked.select(rows)
    assert torch.equal(some.take(torch.tensor([4, 0])), whole[rows[[4, 0]]])
    assert torch.equal(torch.stack(list(some.select(torch.tensor([2])))), whole[rows[[2]]])
