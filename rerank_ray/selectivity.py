"""The threshold of selective reranking that keeps to a budget (`rerank-ray selectivity`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rerank_ray.errors import ConfigError, InputError
from rerank_ray.parquet import inspect_input, read_scored, record_of
from rerank_ray.runs import resolve_input
from rerank_ray.schema import LABELS, check_scored
from rerank_ray.uncertainty import UncertaintyCriterion, uncertainty_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Selectivity:
    """The threshold that sends `selected` of `queries` to the expensive ranker."""

    threshold: float
    selected: int
    queries: int


def threshold_for(run: str, budget: float, k: int, criterion: UncertaintyCriterion) -> Selectivity:
    """The lowest threshold that sends at most `budget` of a cheap label run's queries to the expensive ranker.

    Rows with `error` are left out. Eight bytes a query are held in memory.

    Raises:
        ConfigError: the budget is no share, or k below 2, where every query is certain.
        InputError: no row has scores.
        RowError: a row without `error` has no scores, not as many as candidates, or an infinite one.
    """
    if not 0.0 <= budget <= 1.0:
        raise ConfigError(f"--budget {budget}: a share of the queries, between 0 and 1")
    if k < 2:
        raise ConfigError(f"--k {k}: uncertainty is about the order of two candidates at least")
    data = resolve_input(run)
    summary = inspect_input(data, LABELS)
    values = np.empty(summary.rows)
    count = 0
    for row in read_scored(data):
        if row["error"] is None:
            record_of(row, check_scored, data)
            scores = [math.nan if s is None else s for s in row["scores"]]
            values[count] = uncertainty_of(scores, k, criterion)
            count += 1
    if not count:
        raise InputError(f"{run}: no row has scores")
    falling = np.sort(values[:count])[::-1]
    # Queries above the threshold are sent, so the first one that the budget does not hold sets it.
    # 0.29 · 100 is a little less than 29.
    affordable = math.floor(budget * count + 1e-9)
    threshold = float(falling[affordable]) if affordable < count else -1.0
    return Selectivity(threshold=threshold, selected=int((falling > threshold).sum()), queries=count)
