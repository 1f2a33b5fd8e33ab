"""Paired significance tests between systems, corrected for the number of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rerank_ray.metrics.evaluation import SystemResult

_SIGNS_IN_MEMORY = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two systems on one metric: the mean of first minus second, and two-sided p-values, plain and after Holm."""

    metric: str
    first: str
    second: str
    difference: float
    p_randomisation: float
    p_randomisation_holm: float
    p_t: float
    p_t_holm: float


def compare_systems(
    results: Mapping[str, SystemResult], metric: str, *, resamples: int = 9999, seed: int = 0
) -> tuple[Comparison, ...]:
    """Test every pair of systems on one metric over the same queries, with Holm's correction over the pairs.

    The randomisation test (Fisher; recommended for retrieval by Smucker, Allan and Carterette, CIKM 2007) flips the
    signs of the per-query differences: all 2^queries ways when `resamples` allow it, else `resamples` seeded ones,
    where p = (extreme + 1) / (resamples + 1) is never 0. The t-test is Student's paired one.
    """
    pairs = list(combinations(results, 2))
    differences = [_differences(results[a], results[b], metric) for a, b in pairs]
    randomisation = [_randomisation_p(d, resamples, seed) for d in differences]
    student = [_t_p(d) for d in differences]
    return tuple(
        Comparison(
            metric=metric,
            first=a,
            second=b,
            difference=float(d.mean()),
            p_randomisation=p,
            p_randomisation_holm=p_holm,
            p_t=t,
            p_t_holm=t_holm,
        )
        for (a, b), d, p, p_holm, t, t_holm in zip(
            pairs, differences, randomisation, holm(randomisation), student, holm(student), strict=True
        )
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that control the family-wise error rate (Holm 1979): p ≤ α after it means significant at α.

    The i-th smallest of n (from 0) is multiplied by n - i, made monotone, and capped at 1.
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for i, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, (len(p_values) - i) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted


def _differences(a: SystemResult, b: SystemResult, metric: str) -> np.ndarray:
    """Per-query differences `[queries]`, paired by query id."""
    other = b.per_query[metric]
    return np.array([value - other[query_id] for query_id, value in a.per_query[metric].items()])


def _randomisation_p(differences: np.ndarray, resamples: int, seed: int) -> float:
    from scipy.stats import permutation_test

    # One query: its sign is flipped or not, equally far from 0 both ways.
    if len(differences) < 2 or not differences.any():
        return 1.0
    result = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _SIGNS_IN_MEMORY // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _t_p(differences: np.ndarray) -> float:
    """NaN-free: 1 where no query differs, or where a single query leaves no variance to estimate."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2 or not differences.any():
        return 1.0
    if np.ptp(differences) == 0:
        return 0.0
    return float(ttest_1samp(differences, 0.0).pvalue)
