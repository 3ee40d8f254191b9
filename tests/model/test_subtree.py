"""Rows for whole modules of the original library: names below a prefix stay as they are, both ways."""

import pytest
import torch

from vlm.model.weights.rows import Row, Subtree
from vlm.model.weights.table import Table

TABLE = Table(
    "tower",
    (Subtree("visual.", "vision.", but=("proj", r"head\..*")), Row("visual.proj", "out.weight")),
    ignored=(r"visual\.head\..*",),
)
PUBLISHED = {
    "visual.blocks.0.weight": torch.rand(2),
    "visual.proj": torch.rand(2, 3),
    "visual.head.weight": torch.rand(1),
}


def test_both_ways_and_with_prefixes() -> None:
    for table, theirs, ours in ((TABLE, "", ""), (TABLE.under("model.", "our."), "model.", "our.")):
        given = {theirs + name: value for name, value in PUBLISHED.items()}
        found = table.to_ours(given)
        assert set(found) == {ours + "vision.blocks.0.weight", ours + "out.weight"}
        assert torch.equal(found[ours + "vision.blocks.0.weight"], PUBLISHED["visual.blocks.0.weight"])
        back = table.to_theirs(found)
        assert set(back) == {theirs + "visual.blocks.0.weight", theirs + "visual.proj"}
        assert all(torch.equal(value, given[name]) for name, value in back.items())


def test_what_stands_outside_or_is_left_to_other_rows_is_not_taken() -> None:
    with pytest.raises(ValueError, match=r"tower: published tensors that our table does not know: text\.weight$"):
        TABLE.to_ours({**PUBLISHED, "text.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"tower: tensors of ours that the table does not know: vision\.head\.bias$"):
        TABLE.to_theirs({"vision.head.bias": torch.zeros(1)})
