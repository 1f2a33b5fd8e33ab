"""Scores of methods that give an order and nothing else."""

from __future__ import annotations

from collections.abc import Sequence


def scores_of_order(order: Sequence[int]) -> tuple[float, ...]:
    """Score of candidate i = N − rank, ranks from 0: the first of the N candidates in `order` gets N, the last 1."""
    scores = [0.0] * len(order)
    for rank, candidate in enumerate(order):
        scores[candidate] = float(len(order) - rank)
    return tuple(scores)
