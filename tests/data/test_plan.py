"""The read order: every sample once an epoch, from anywhere, few shards at a time; mixtures with exact shares."""

import pickle
import tracemalloc
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.plan import BLOCK, NEAR_TRIES, WINDOW, Mix, Order, blocks, quotas, randomness

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any)
SEEDS = st.integers(0, 2**63 - 1)


def order_of(sizes: list[int], seed: int = 0, window: int = WINDOW, number: int = 0) -> Order:
    starts = np.cumsum([0, *sizes[:-1]])
    return Order(starts, sum(sizes), seed, window, number)


def shard_of(sizes: list[int], samples: list[int]) -> list[int]:
    return np.cumsum(sizes).searchsorted(samples, "right").tolist()


@settings(max_examples=200, deadline=None)
@given(SIZES, SEEDS, st.integers(1, 200), st.integers(0, 10**9))
def test_every_sample_once_an_epoch(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order, count = order_of(sizes, seed, window), sum(sizes)
    for number in (epoch, epoch + 1):
        found = [order(number * count + place) for place in range(count)]
        assert sorted(found) == list(range(count))


@pytest.mark.parametrize("sizes", [[1, 7, 2], [10], [4, 0, 5], [0, 3], [3, 0], [1] * 40, [1]])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_uneven_shards(sizes: list[int], window: int) -> None:
    order, count = order_of(sizes, 1, window), sum(sizes)
    found = [order(position) for position in range(5 * count)]
    for epoch in range(5):
        assert sorted(found[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(max_examples=100, deadline=None)
@given(SIZES, SEEDS, st.integers(1, 60), st.lists(st.integers(0, 400), max_size=20))
def test_any_start_is_as_walked(sizes: list[int], seed: int, window: int, starts: list[int]) -> None:
    walked = order_of(sizes, seed, window)
    expected = [walked(position) for position in range(401)]
    jumping = order_of(sizes, seed, window)
    assert [jumping(start) for start in starts] == [expected[start] for start in starts]
    assert pickle.loads(pickle.dumps(jumping))(17) == order_of(sizes, seed, window)(17) == expected[17]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), SEEDS, st.integers(1, 100))
def test_only_the_shards_of_a_window_are_touched(sizes: list[int], seed: int, window: int) -> None:
    """An epoch falls into windows of at most `window` samples and the rest of a shard; no shard is in two of them."""
    order, count = order_of(sizes, seed, window), sum(sizes)
    shards = shard_of(sizes, [order(position) for position in range(count)])
    last = {shard: place for place, shard in enumerate(shards)}
    first = {shard: place for place, shard in reversed(list(enumerate(shards)))}
    borders = [place for place in range(count + 1) if all(last[s] < place or first[s] >= place for s in last)]
    assert max(b - a for a, b in pairwise(borders)) < window + max(sizes)


def test_small_sets_are_fully_shuffled_and_large_ones_mixed_within_windows() -> None:
    sizes = [50] * 40
    whole, parts = order_of(sizes, 3), order_of(sizes, 3, 500)
    expected = randomness(3, 0, 0).permutation(2000).tolist()
    assert [whole(position) for position in range(2000)] == expected
    touched = [set(shard_of(sizes, [parts(p) for p in range(first, first + 500)])) for first in range(0, 2000, 500)]
    assert [len(shards) for shards in touched] == [10] * 4 and len(set.union(*touched)) == 40
    assert touched[0] != set(range(10))
    batch = shard_of(sizes, [parts(position) for position in range(100)])
    assert len(set(batch)) == 10 and max(map(batch.count, batch)) < 25


def test_orders_differ_by_seed_epoch_and_number() -> None:
    found = set()
    for seed in range(3):
        for number in range(3):
            order = order_of([5] * 10, seed, 10, number)
            found |= {tuple(order(50 * epoch + place) for place in range(50)) for epoch in range(3)}
    assert len(found) == 27


def test_blocks_of_what_has_no_shards() -> None:
    assert blocks(0).tolist() == [] and blocks(1).tolist() == [0]
    assert blocks(2 * BLOCK + 1).tolist() == [0, BLOCK, 2 * BLOCK]


def test_replacements_come_from_the_window_first_and_from_anywhere_later() -> None:
    sizes = [10] * 50
    order, random = order_of(sizes, 0, 10), np.random.default_rng(0)
    for position in (0, 7, 133):
        own = shard_of(sizes, [order(position)])
        near = [order.instead(position, 1 + i % NEAR_TRIES, random) for i in range(100)]
        assert set(shard_of(sizes, near)) == set(own) and len(set(near)) == 10
        far = [order.instead(position, NEAR_TRIES + 1, random) for _ in range(500)]
        assert len(set(shard_of(sizes, far))) == 50


def test_a_place_in_a_huge_set_costs_its_window_alone() -> None:
    """10**9 samples would take 8 GB as one permutation."""
    order = Order(np.arange(0, 10**9, 10**4), 10**9, 0, 10**5)
    tracemalloc.start()
    found = [order(position) for position in (7 * 10**9 + 5, 0, 123_456_789, 10**9 - 1)]
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert all(0 <= index < 10**9 for index in found)


# --- mixtures --------------------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.5, 7.0]), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8))
def test_quotas_are_within_one_of_the_share(weights: list[float]) -> None:
    found = quotas(weights)
    size, total = sum(found), sum(map(Fraction, map(str, weights)))
    assert size <= 10_000
    for quota, weight in zip(found, weights, strict=True):
        assert abs(quota - Fraction(str(weight)) * size / total) < 1


def test_quotas_of_plain_weights_are_exact() -> None:
    assert quotas([2.0, 1.0]) == [66, 33]
    assert quotas([0.5, 0.25, 0.25]) == [50, 25, 25]
    assert quotas([0.1, 0.2, 0.7]) == [10, 20, 70]
    assert quotas([5.0]) == [100]
    assert quotas([999.0, 1.0, 300.0]) == [999, 1, 300]
    assert quotas([118_287.0, 82_783.0]) == [5883, 4117]


def test_a_weight_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.train.1.weight=1e-05: beside .* less than one sample in 10000; raise"):
        quotas([1.0, 1e-5, 3.0])


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, SEEDS, st.data())
def test_shares_are_exact_and_each_source_goes_its_own_way(
    weights: list[float], seed: int, data: st.DataObject
) -> None:
    sizes = [data.draw(SIZES) for _ in weights]
    window = data.draw(st.integers(1, 50))
    alone = [order_of(each, seed, window, number) for number, each in enumerate(sizes)]
    mix = Mix(alone, weights, seed)
    first = data.draw(st.integers(0, 5)) * mix.block
    cursors, offsets = mix.seen(first), np.cumsum([0, *map(sum, sizes)])
    assert [Fraction(count * sum(map(int, np.array(weights) * 4))) for count in cursors] == [
        first * Fraction(weight) * 4 for weight in weights
    ]
    for position in range(first, first + mix.block):
        which, cursor = mix.place(position)
        assert cursor == cursors[which]
        cursors[which] += 1
        if position % 97 == 0:
            assert mix(position) == offsets[which] + order_of(sizes[which], seed, window, which)(cursor)
            assert mix.seen(position + 1) == cursors
    assert cursors == mix.seen(first + mix.block)


def test_a_mixture_is_mixed_and_another_in_every_block() -> None:
    orders = [order_of([10], 0, number=number) for number in range(2)]
    mix = Mix(orders, [3.0, 1.0], 0)
    parts = [[mix.place(position)[0] for position in range(first, first + 100)] for first in (0, 100)]
    assert [sum(part) for part in parts] == [25, 25] and parts[0] != parts[1]
    assert 5 <= sum(parts[0][:50]) <= 20
    again = Mix(orders, [3.0, 1.0], 0)
    assert [again(position) for position in (25_000, 3)] == [mix(position) for position in (25_000, 3)]
    assert [Mix(orders, [3.0, 1.0], 1).place(position)[0] for position in range(100)] != parts[0]


def test_replacements_in_a_mixture_come_from_the_same_source() -> None:
    mix, random = Mix([order_of([10], 0), order_of([5] * 4, 0, 5, 1)], [1.0, 1.0], 0), np.random.default_rng(0)
    for position in range(20):
        for attempt in (1, NEAR_TRIES + 1):
            assert (mix.instead(position, attempt, random) < 10) == (mix.place(position)[0] == 0)


def test_a_source_smaller_than_its_share_of_a_batch_is_refused() -> None:
    mix = Mix([order_of([100], 0), order_of([3], 0, number=1)], [1.0, 1.0], 0)
    mix.refuse_batch(6)
    with pytest.raises(
        ValueError, match=r"batch_size=8: data.train.1 has 3 usable samples, .* gives it 4.0 of a batch"
    ):
        mix.refuse_batch(8)
