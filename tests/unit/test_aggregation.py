"""Rank aggregation: by hand, against brute force, and what incomplete rankings count for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.ranking import aggregation
from rerank_ray.ranking.aggregation import borda, kemeny, preferences, rank_deviation, rrf


@st.composite
def rankings_of(draw, size: int) -> list[list[int]]:
    """Up to seven rankings of items 0 … size−1, each of any number of them."""
    partial = st.permutations(range(size)).flatmap(lambda p: st.integers(0, size).map(lambda n: p[:n]))
    return draw(st.lists(partial, min_size=1, max_size=7))


def disagreement(order: list[int], preference: np.ndarray) -> float:
    return sum(preference[b, a] for i, a in enumerate(order) for b in order[i + 1 :])


# 0>1>2, 0>2, 2>0>1 (the second leaves 1 out; item 3 is in none).
RANKINGS = [[0, 1, 2], [0, 2], [2, 0, 1]]


def test_borda_by_hand():
    """Item 0: (0+0+1)/3; item 1: (1+2)/2; item 2: (2+1+0)/3."""
    np.testing.assert_allclose(borda(RANKINGS, 4), [1 / 3, 3 / 2, 1, math.nan])


def test_rrf_by_hand():
    expected = [(2 / 61 + 1 / 62) / 3, (1 / 62 + 1 / 63) / 2, (1 / 63 + 1 / 62 + 1 / 61) / 3, math.nan]
    np.testing.assert_allclose(rrf(RANKINGS, 4), expected)


def test_deviation_by_hand():
    """Ranks 0, 0, 1: variance 2/9; 1, 2: 1/4; 2, 1, 0: 2/3."""
    np.testing.assert_allclose(rank_deviation(RANKINGS, 4), [math.sqrt(2) / 3, 0.5, math.sqrt(2 / 3), math.nan])


def test_preferences_count_rankings_that_hold_both():
    expected = [[0, 2, 2, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(preferences(RANKINGS, 4), expected)


def test_kemeny_by_hand():
    """Condorcet's paradox with 23 of 60 votes for a>b>c, 17 b>c>a, 2 b>a>c, 10 c>a>b, 8 c>b>a (Young 1988): b>c>a."""
    votes = [(23, (0, 1, 2)), (17, (1, 2, 0)), (2, (1, 0, 2)), (10, (2, 0, 1)), (8, (2, 1, 0))]
    assert kemeny(preferences([order for count, order in votes for _ in range(count)], 3)) == [1, 2, 0]


@given(data=st.data(), size=st.integers(1, 6))
def test_kemeny_is_brute_force(data: st.DataObject, size: int):
    """The least disagreement of all orders; among them one with fewest pairs against the items' own order."""
    preference = preferences(data.draw(rankings_of(size)), size)
    order = kemeny(preference)
    assert sorted(order) == list(range(size))
    least = min(disagreement(p, preference) for p in itertools.permutations(range(size)))
    assert disagreement(order, preference) == least


@given(data=st.data())
def test_kemeny_with_weights_is_brute_force(data: st.DataObject):
    weights = data.draw(st.lists(st.floats(0.1, 3), min_size=20, max_size=20))
    preference = np.zeros((5, 5))
    preference[~np.eye(5, dtype=bool)] = weights
    least = min(disagreement(p, preference) for p in itertools.permutations(range(5)))
    assert disagreement(kemeny(preference), preference) == pytest.approx(least)


@given(data=st.data(), size=st.integers(1, 6))
def test_kemeny_of_one_group_keeps_ties_in_order(data: st.DataObject, size: int):
    """The whole integer programme, without the split into groups: of the best orders, the fewest pairs out of order."""
    preference = preferences(data.draw(rankings_of(size)), size)
    out_of_order = np.tril(np.ones((size, size))).T
    key = lambda p: (disagreement(p, preference), disagreement(p, out_of_order))  # noqa: E731
    assert key(aggregation._exact(preference)) == min(map(key, itertools.permutations(range(size))))


def test_nothing_to_aggregate():
    assert kemeny(np.zeros((0, 0))) == []
    assert kemeny(np.zeros((1, 1))) == [0]
    assert kemeny(np.zeros((3, 3))) == [0, 1, 2]


def test_rankings_that_agree_are_their_order():
    order = np.random.default_rng(0).permutation(100).tolist()
    assert kemeny(preferences([order] * 5, 100)) == order


def test_contradicting_rankings_of_a_hundred():
    """Larger than the integer programme takes: no move of a single item lowers the disagreement any further."""
    source = np.random.default_rng(0)
    preference = preferences([source.permutation(100).tolist() for _ in range(5)], 100)
    order = kemeny(preference)
    assert sorted(order) == list(range(100))
    least = disagreement(order, preference)
    for item in (0, 17, 99):
        rest = [i for i in order if i != item]
        assert least <= min(disagreement([*rest[:at], item, *rest[at:]], preference) for at in range(0, 100, 7))


def test_the_improved_order_is_near_the_exact_one():
    source = np.random.default_rng(1)
    for _ in range(5):
        preference = preferences([source.permutation(12).tolist() for _ in range(5)], 12)
        exact = disagreement(aggregation._exact(preference), preference)
        improved = disagreement(aggregation._improved(preference), preference)
        assert exact <= improved <= 1.1 * exact
