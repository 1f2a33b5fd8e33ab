"""Fusion: the scores that several rankers give one query's candidates become one, with their disagreement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rerank_ray.ranking.aggregation import RRF_K, kemeny
from rerank_ray.records import Defect, DefectKind, Scores
from rerank_ray.settings.rankers import FusionMethod


def fuse(scores: np.ndarray, method: FusionMethod, weights: Sequence[float], doc_ids: Sequence[str]) -> Scores:
    """Weighted mean of rankers' scores made comparable within the query.

    Args:
        scores: [rankers, candidates]; NaN where a ranker gave none. A candidate is averaged over the rankers that
            scored it, and stays NaN, with a defect, when none did.
        method: zscore (mean 0, population deviation 1), minmax (0..1), rrf (1/(60 + rank), Cormack et al. 2009),
            borda (share of the scored candidates ranked below), or kemeny (borda of the order that disagrees least with
            the rankers' preferences, a weight each; equal scores prefer nothing, and candidates that every ranker
            scored alike share their places).

    Returns:
        The means and, as uncertainty, the weighted population deviation between the rankers; for kemeny, of borda.
    """
    comparable = np.stack([_COMPARABLE[method](row) for row in scores])
    weight = np.where(np.isnan(comparable), 0.0, np.asarray(weights, dtype=float)[:, None])
    total = weight.sum(0)
    values = np.where(np.isnan(comparable), 0.0, comparable)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (weight * values).sum(0) / total
        deviation = np.sqrt((weight * (values - mean) ** 2).sum(0) / total)
    defects = tuple(
        Defect(kind=DefectKind.UNSCORED, detail=f"{doc_id}: no teacher scored it")
        for doc_id, t in zip(doc_ids, total, strict=True)
        if t == 0
    )
    if method == "kemeny":
        mean = _consensus(scores, weights)
    return Scores(scores=tuple(mean.tolist()), uncertainty=tuple(deviation.tolist()), defects=defects)


def _zscore(row: np.ndarray) -> np.ndarray:
    if np.isnan(row).all():
        return row
    # The deviation of equal scores need not be 0: their mean is rounded.
    if np.nanmax(row) == np.nanmin(row):
        return np.where(np.isnan(row), row, 0.0)
    return (row - np.nanmean(row)) / np.nanstd(row)


def _minmax(row: np.ndarray) -> np.ndarray:
    if np.isnan(row).all():
        return row
    span = np.nanmax(row) - np.nanmin(row)
    return (row - np.nanmin(row)) / span if span > 0 else np.where(np.isnan(row), row, 0.5)


def _ranks(row: np.ndarray) -> np.ndarray:
    """Ranks from 1, best first; ties share the mean of their ranks, NaN stays."""
    from scipy.stats import rankdata

    return rankdata(-row, method="average", nan_policy="omit")


def _rrf(row: np.ndarray) -> np.ndarray:
    return 1.0 / (RRF_K + _ranks(row))


def _borda(row: np.ndarray) -> np.ndarray:
    count = np.count_nonzero(~np.isnan(row))
    return (count - _ranks(row)) / max(1, count - 1)


def _consensus(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Share of the scored candidates ranked below in the Kemeny order, [candidates]; NaN where no ranker scored."""
    held = ~np.isnan(scores).all(0)
    shares = np.full(scores.shape[1], np.nan)
    shares[held] = _shares_below(scores[:, held], weights)
    return shares


def _shares_below(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The same, [candidates], where each has a score of some ranker."""
    one, other = scores[:, :, None], scores[:, None, :]
    # A comparison with NaN is false: a ranker that did not score both prefers neither.
    order = kemeny(np.einsum("t,tij->ij", weights, one > other))
    below = np.empty(len(order))
    below[order] = np.arange(len(order) - 1, -1, -1)
    # Between candidates that no ranker tells apart the order is the list's, which is no ranker's preference.
    alike = ((one == other) | (np.isnan(one) & np.isnan(other))).all(0)
    return alike @ below / alike.sum(1) / max(1, len(order) - 1)


_COMPARABLE = {"zscore": _zscore, "minmax": _minmax, "rrf": _rrf, "borda": _borda, "kemeny": _borda}
