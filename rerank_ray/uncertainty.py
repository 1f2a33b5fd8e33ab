"""How uncertain a ranking is about its top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

UncertaintyCriterion = Literal["entropy", "margin"]


def uncertainty_of(scores: Sequence[float], k: int, criterion: UncertaintyCriterion) -> float:
    """How uncertain a ranking is about its top `k`, between 0 and 1, from the softmax p of their scores.

    Args:
        scores: NaN where a candidate has none; taken in float32, as label runs store them, so that a threshold found on
            a label run (`rerank-ray selectivity`) means the same here.
        criterion: `entropy` is −Σ p log p / log k, `margin` is 1 − (p₁ − p₂).

    Returns:
        0 for fewer than two scored candidates: there is no order to be uncertain about.
    """
    values = np.asarray(scores, dtype=np.float32).astype(np.float64)
    top = np.sort(values[~np.isnan(values)])[::-1][:k]
    if len(top) < 2:
        return 0.0
    p = np.exp(top - top[0])
    p /= p.sum()
    if criterion == "margin":
        return float(1.0 - (p[0] - p[1]))
    entropy = -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).sum()
    return min(1.0, float(entropy / np.log(len(top))))
