"""How far two rankings of one query agree, and how far scores agree with gains: pure functions over one query."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np


def kendall(first: np.ndarray, second: np.ndarray) -> float | None:
    """Kendall's τ-b between two score arrays over the same items, ties corrected (Kendall 1945).

    Returns:
        Between −1 and 1; None where one of the two orders nothing: fewer than two items, or all of them tied.
    """
    from scipy.stats import kendalltau

    if len(first) < 2 or first.min() == first.max() or second.min() == second.max():
        return None
    return float(kendalltau(first, second).statistic)


def rbo(first: Sequence[Hashable], second: Sequence[Hashable], p: float = 0.9) -> float:
    """Rank-biased overlap of two rankings, extrapolated beyond their ends (RBO_ext, Webber et al. 2010, equation 32).

    `p` is how likely a reader goes on from one rank to the next: at 0.9 the first ten ranks carry 86 % of the weight.
    The rankings may differ in length and items; ties have to be broken before.

    Returns:
        Between 0 (nothing in common) and 1 (the same order); 0 if one is empty, 1 if both are.
    """
    short, long = sorted((first, second), key=len)
    s, depth = len(short), len(long)
    if s == 0:
        return float(depth == 0)
    seen_short, seen_long = set(), set()
    overlap, total, overlap_at_s = 0, 0.0, 0
    for d in range(1, depth + 1):
        item = long[d - 1]
        seen_long.add(item)
        overlap += item in seen_short
        if d <= s:
            seen_short.add(short[d - 1])
            overlap += short[d - 1] in seen_long
            overlap_at_s = overlap
        total += overlap / d * p**d
        if d > s:
            total += overlap_at_s * (d - s) / (s * d) * p**d
    beyond = ((overlap - overlap_at_s) / depth + overlap_at_s / s) * p**depth
    return (1 - p) / p * total + beyond


def ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks from 1, best first; ties share the mean of their ranks."""
    from scipy.stats import rankdata

    return rankdata(-scores, method="average")


def auc(scores: np.ndarray, relevant: np.ndarray) -> float | None:
    """The share of (relevant, other) pairs that the scores order rightly, ties half (Mann & Whitney 1947).

    Returns:
        None where there is no such pair.
    """
    positives = int(relevant.sum())
    others = len(relevant) - positives
    if positives == 0 or others == 0:
        return None
    below = len(scores) + 1 - ranks(scores)
    return float((below[relevant].sum() - positives * (positives + 1) / 2) / (positives * others))


def ndcg(gains: Sequence[float], ideal: Sequence[float], depth: int = 10) -> float | None:
    """nDCG with linear gains: gain / log₂(rank + 1), as trec_eval's, for which gains below 0 are 0 too.

    Args:
        gains: of the ranked documents, best first.
        ideal: of all judged documents, in any order.

    Returns:
        None where no judged document has a gain.
    """
    best = _dcg(sorted(ideal, reverse=True)[:depth])
    return _dcg(gains[:depth]) / best if best > 0 else None


def _dcg(gains: Sequence[float]) -> float:
    return sum(max(g, 0.0) / math.log2(rank + 2) for rank, g in enumerate(gains))
