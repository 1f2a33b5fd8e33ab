"""Agreement of rankings, by hand, against plain loops and against ranx."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_ray.metrics.agreement import auc, kendall, ndcg, ranks, rbo
from rerank_ray.metrics.evaluation import evaluate_rankings


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [30, 20, 10], -1.0),
        # Two of three pairs agree, one does not.
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        # One tie on the left: 2 concordant / √((3 − 1)·3).
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(6)),
        ([1, 1], [1, 2], None),
        ([1, 2], [1, 1], None),
        ([1], [1], None),
        ([], [], None),
    ],
)
def test_kendall_by_hand(first: list, second: list, expected: float | None):
    found = kendall(np.array(first, dtype=float), np.array(second, dtype=float))
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("abc", "abc", 1.0),
        ("abc", "xyz", 0.0),
        # Overlap 0 at depth 1, 2 at depth 2: (0.1/0.9)·(2/2)·0.81 + (2/2)·0.81.
        ("ab", "ba", 0.9),
        # The shorter agrees as far as it goes.
        ("a", "ab", 1.0),
        # Overlap 0, then 1 of 2: (0.1/0.9)·½·0.81 + ½·0.81.
        ("a", "ba", 0.45),
        ("", "ab", 0.0),
        ("", "", 1.0),
    ],
)
def test_rbo_by_hand(first: str, second: str, expected: float):
    assert rbo(first, second, 0.9) == pytest.approx(expected)
    assert rbo(second, first, 0.9) == pytest.approx(expected)


def plain_rbo(first: list[int], second: list[int], p: float) -> float:
    """(1 − p)·Σ p^(d−1)·A_d to a depth where nothing is left, with the agreement beyond the ends extrapolated: the
    shorter list goes on as it agreed over its length s, and beyond the longer one A stays as it is."""
    short, long = sorted((first, second), key=len)
    s, last, total = len(short), 0.0, 0.0
    for d in range(1, 2000):
        if d <= len(long):
            overlap = len(set(short[:d]) & set(long[:d]))
            if d > s:
                overlap += len(set(short) & set(long[:s])) / s * (d - s)
            last = overlap / d
        total += (1 - p) * p ** (d - 1) * last
    return total


rankings = st.lists(st.integers(0, 12), min_size=1, max_size=10, unique=True)


@given(rankings, rankings, st.sampled_from([0.5, 0.9, 0.98]))
def test_rbo_is_the_extrapolated_sum(first: list[int], second: list[int], p: float):
    assert rbo(first, second, p) == pytest.approx(plain_rbo(first, second, p), abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=10))
def test_auc_is_the_share_of_pairs_in_order(items: list[tuple[int, bool]]):
    pairs = [(a - b) for (a, x), (b, y) in itertools.product(items, items) if x and not y]
    found = auc(np.array([s for s, _ in items], dtype=float), np.array([r for _, r in items], dtype=bool))
    if not pairs:
        assert found is None
    else:
        assert found == pytest.approx(sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in pairs) / len(pairs))


def test_ranks_by_hand():
    np.testing.assert_array_equal(ranks(np.array([5.0, 9.0, 5.0, 1.0])), [2.5, 1.0, 2.5, 4.0])


def test_ndcg_is_that_of_evaluate():
    """Gains 2, 0, 1 of a ranking whose qrels hold another 2: (2 + 1/2)/(2 + 2/log₂3 + 1/2), and as ranx has it."""
    expected = 2.5 / (2 + 2 / math.log2(3) + 0.5)
    assert ndcg([2.0, 0.0, 1.0], [1.0, 2.0, 0.0, 2.0]) == pytest.approx(expected)
    (result,) = evaluate_rankings({"q": {"a": 2, "b": 0, "c": 1, "d": 2}}, {"s": {"q": "abc"}}, ["ndcg@10"]).values()
    assert result.means["ndcg@10"] == pytest.approx(expected)
    assert ndcg([0.0], [0.0, 0.0]) is None
    assert ndcg([0.0] * 10 + [1.0], [1.0]) == 0.0
