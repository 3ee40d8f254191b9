"""Counting by screened tiles beside counting all in fp32, above all where scores are close to the bars."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn.functional import normalize

import vlm.eval.retrieval as retrieval
from vlm.eval.retrieval import rank_counts
from vlm.eval.screen import SPARE, Extent, Screen, Tile, reached, scores_of


def vectors(generator: torch.Generator, *size: int, scale: float = 1.0) -> Tensor:
    return scale * normalize(torch.randn(*size, generator=generator), dim=-1)


def tile_of(
    seed: int, queries: int = 1, scale: float = 1.0, above: float = 0.003, sizes: tuple[int, int] = (150, 220)
) -> Tile:
    """Bars that about so great a share reaches, each just below one of the scores, as the best positive's is."""
    generator = torch.Generator().manual_seed(seed)
    image, text = vectors(generator, sizes[0], queries, 64, scale=scale), vectors(generator, sizes[1], 64, scale=scale)
    scores = torch.einsum("nqe,me->nqm", image, text).amax(1)
    slack = scale * scale * 1e-6
    text_bar = scores.sort(0, descending=True).values[round(above * sizes[0])] - slack
    image_bar = scores.sort(1, descending=True).values[:, round(above * sizes[1])] - slack
    mask = torch.rand(40, sizes[1], generator=generator) < 0.05
    return Tile(image, text, text_bar, image_bar, (slice(30, 70), mask))


def screen_of(tile: Tile) -> Screen:
    return Screen(Extent.of(tile.image), Extent.of(tile.text), tile.text.shape[1])


def lists(counts: tuple[Tensor, Tensor] | None) -> list[list[float]] | None:
    return None if counts is None else [each.tolist() for each in counts]


@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([1e-6, 1.0, 3e4]))
def test_counts_what_fp32_counts(seed: int, queries: int, scale: float) -> None:
    tile = tile_of(seed, queries, scale)
    assert lists(screen_of(tile)(tile)) == lists(reached(tile))


def test_a_screened_score_alone_would_miscount() -> None:
    """So that the test above can fail."""
    tile = tile_of(0)
    rough = (tile.image[:, 0].bfloat16() @ tile.text.bfloat16().T).float()
    assert (rough >= tile.text_bar).sum(0).tolist() != reached(Tile(*vars(tile).values()))[0].tolist()


@given(st.integers(0, 2**31), st.sampled_from([2, 64, 500]))
def test_no_score_is_further_off_than_the_bound(seed: int, width: int) -> None:
    """Also for numbers that lie in the middle of two of bf16, all off the same way."""
    generator = torch.Generator().manual_seed(seed)
    image, text = vectors(generator, 20, 1, width), vectors(generator, 30, width)
    image[:10] = (1 + 2**-8 - 2**-20) * image[:10].sign() * 2.0 ** torch.randint(-3, 1, (10, 1, 1), generator=generator)
    text[:10] = text[:10].sign() * (1 + 2**-8 - 2**-20)
    off = Screen(Extent.of(image), Extent.of(text), width).off
    exact = image[:, 0].double() @ text.double().T
    rounded = image[:, 0].bfloat16().double() @ text.bfloat16().double().T
    assert float((exact - rounded).abs().max()) <= off


def test_a_bar_that_is_not_positive_is_reached_by_what_reaches_it_but_not_by_its_own() -> None:
    tile = tile_of(1, above=0.0, sizes=(400, 500))
    tile.text_bar[7], tile.image_bar[33] = -0.05, -100.0
    counts = screen_of(tile)(tile)
    assert counts is not None and lists(counts) == lists(reached(tile))
    assert tile.own is not None and counts[1][33] == 500 - tile.own[1][3].sum()


def test_gives_up_where_too_many_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    good, poor = tile_of(2), tile_of(2, above=0.5)
    screen = screen_of(good)
    assert screen(good) is not None
    tried = list[Tile]()

    def rough(self: Screen, tile: Tile) -> Tensor:
        tried.append(tile)
        return scores(self, tile)

    scores = Screen._rough
    monkeypatch.setattr(Screen, "_rough", rough)
    for _ in range(20):
        assert screen(poor) is None
    assert len(tried) == SPARE + 1
    assert screen(good) is None


@pytest.mark.parametrize("queries", [1, 4])
def test_pairs_one_by_one(queries: int) -> None:
    generator = torch.Generator().manual_seed(3)
    image, text = vectors(generator, 9, queries, 16), vectors(generator, 7, 16)
    i, j = (torch.rand(9, 7, generator=generator) < 0.4).nonzero().unbind(1)
    expected = torch.einsum("nqe,me->nqm", image, text).amax(1)[i, j]
    torch.testing.assert_close(scores_of(image, text, i, j), expected)
    none = torch.zeros(0, dtype=torch.int64)
    assert scores_of(image, text, none, none).shape == (0,)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("shuffled", [False, True])
def test_ranks_are_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch, queries: int, shuffled: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    image = vectors(generator, 400, queries, 128)
    owner = torch.arange(400).repeat_interleave(3)
    text = normalize(
        image[owner, 0] + (0.16 if queries == 1 else 0.14) * torch.randn(1200, 128, generator=generator), dim=-1
    )
    ids = torch.arange(400)
    if shuffled:
        rows, columns = torch.randperm(400, generator=generator), torch.randperm(1200, generator=generator)
        image, ids, text, owner = image[rows], ids[rows], text[columns], owner[columns]
    found, screened = [], []
    call = Screen.__call__

    def told(self: Screen, tile: Tile) -> object:
        screened.append(call(self, tile))
        return screened[-1]

    monkeypatch.setattr(Screen, "__call__", told)
    for fast in (False, True):
        monkeypatch.setattr(retrieval, "bfloat16_is_fast", lambda device, fast=fast: fast)
        ranks = rank_counts(image, text, ids, owner, chunk=256)
        found.append((ranks.t2i.tolist(), ranks.i2t.tolist()))
    assert found[0] == found[1] and max(found[0][0]) > 1
    assert sum(each is not None for each in screened) > len(screened) / 2
