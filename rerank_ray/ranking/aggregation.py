"""Many rankings of the same items to one: Borda, reciprocal rank fusion and Kemeny.

A ranking is a sequence of items from 0..N−1, best first; it may leave items out, and then says nothing about them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RRF_K = 60
_EXACT_ITEMS = 30


def rank_table(rankings: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Ranks from 0, [rankings, count]; NaN where a ranking leaves the item out."""
    table = np.full((len(rankings), count), np.nan)
    for row, ranking in zip(table, rankings, strict=True):
        row[list(ranking)] = np.arange(len(ranking))
    return table


def borda(rankings: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Mean rank from 0 over the rankings that hold the item, [count]; NaN for one that none holds. Lower is better."""
    return _mean_over_holders(rank_table(rankings, count))


def rrf(rankings: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Mean of 1 / (60 + rank), ranks from 1 (Cormack et al. 2009), over the rankings that hold the item, [count]; NaN
    for one that none holds. Higher is better."""
    return _mean_over_holders(1.0 / (RRF_K + 1 + rank_table(rankings, count)))


def rank_deviation(rankings: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Population standard deviation of an item's ranks over the rankings that hold it, in ranks, [count]."""
    table = rank_table(rankings, count)
    return np.sqrt(_mean_over_holders((table - _mean_over_holders(table)) ** 2))


def _mean_over_holders(values: np.ndarray) -> np.ndarray:
    held = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(held, values, 0.0).sum(0) / held.sum(0)


def preferences(rankings: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """How many rankings put i before j, [i, j], counting only those that hold both."""
    table = rank_table(rankings, count)
    return (table[:, :, None] < table[:, None, :]).sum(0).astype(float)


def kemeny(preference: np.ndarray) -> list[int]:
    """The order that disagrees least with pairwise preferences (Kemeny 1959), best first.

    It minimises Σ preference[j, i] over the pairs it orders i before j. Of several such orders it takes one that keeps
    most pairs in the order of their indices, when preferences are integers.

    Items split into groups of which each beats the next one in every pair (Truchon 1998), mostly of one item; inside a
    group the order is an integer programme. It is exact up to 30 items a group. A larger group, which only rankings
    that contradict each other all over give, is ordered by the pairs won and then improved by moving single items,
    until no move helps.

    Args:
        preference: how many rankings, or which weight of them, put i before j, [N, N].
    """
    # Here, as in `_solve`: SciPy takes a second to import, in every worker of every job.
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    wins = preference > preference.T
    _, group = connected_components(csr_array(~wins.T & ~np.eye(len(preference), dtype=bool)), connection="strong")
    groups = [np.flatnonzero(group == g) for g in range(group.max(initial=-1) + 1)]
    # An item beats all of the groups below its own and, outside its own, no other.
    groups.sort(key=lambda members: -wins[members[0], group != group[members[0]]].sum())
    order: list[int] = []
    for members in groups:
        inside = preference[np.ix_(members, members)]
        solve = _exact if len(members) <= _EXACT_ITEMS else _improved
        order += members[solve(inside)].tolist()
    return order


def _exact(preference: np.ndarray) -> list[int]:
    """The integer programme over x_ij (i before j), i < j, with 0 ≤ x_ij + x_jk − x_ik ≤ 1 for every i < j < k.

    Only the constraints that a solution breaks are added, then it is solved again (Conitzer et al. 2006).
    """
    count = len(preference)
    if count <= 2:
        return [1, 0] if count == 2 and preference[1, 0] > preference[0, 1] else list(range(count))
    above, below = np.triu_indices(count, 1)
    column = np.zeros((count, count), dtype=int)
    column[above, below] = np.arange(len(above))
    cost = (preference.T - preference)[above, below]
    if np.array_equal(cost, np.round(cost)):
        # Less than 1 in all: only orders of equal disagreement are told apart by it.
        cost = cost - 1.0 / (len(above) + 1)
    triples: set[tuple[int, int, int]] = set()
    while True:
        before = np.zeros((count, count), dtype=bool)
        before[above, below] = _solve(cost, sorted(triples), column)
        before |= ~before.T & ~np.eye(count, dtype=bool) & ~np.triu(np.ones((count, count), dtype=bool))
        cycles = before[:, :, None] & before[None, :, :] & before.T[:, None, :]
        broken = {tuple(sorted(triple)) for triple in np.argwhere(cycles).tolist()}
        if not broken:
            return np.argsort(-before.sum(1), kind="stable").tolist()
        triples |= broken


def _solve(cost: np.ndarray, triples: Sequence[tuple[int, int, int]], column: np.ndarray) -> np.ndarray:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    constraints = []
    if triples:
        i, j, k = np.array(triples).T
        rows = np.tile(np.arange(len(triples)), 3)
        columns = np.concatenate([column[i, j], column[j, k], column[i, k]])
        values = np.repeat([1.0, 1.0, -1.0], len(triples))
        matrix = csr_array((values, (rows, columns)), shape=(len(triples), len(cost)))
        constraints = [LinearConstraint(matrix, 0, 1)]
    result = milp(
        cost, integrality=np.ones_like(cost), bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0}
    )
    if result.x is None:
        raise AssertionError(f"the integer programme has no solution: {result.message}")
    return result.x > 0.5


def _improved(preference: np.ndarray) -> list[int]:
    """Most pairs won first, then the best move of a single item until none lowers the disagreement."""
    margin = preference - preference.T
    order = np.argsort(-np.sign(margin).sum(1), kind="stable").tolist()
    moved = True
    while moved:
        moved = False
        for item in list(order):
            at = order.index(item)
            rest = order[:at] + order[at + 1 :]
            # Gain of standing at each place: what stands before is lost, what stands behind is won.
            against = margin[item, rest]
            gain = against.sum() - 2 * np.concatenate([[0.0], np.cumsum(against)])
            best = int(np.argmax(gain))
            if gain[best] > gain[at] + 1e-9:
                order = [*rest[:best], item, *rest[best:]]
                moved = True
    return order
