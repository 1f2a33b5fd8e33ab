"""Which candidates of a query are scored in one step: a pure function of (seed, epoch, query)."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from rerank_ray.records import Labels
from rerank_ray.settings.distill import SamplingSettings


def teacher_order(labels: Labels) -> list[int]:
    """Indices of the scored candidates, the teacher's best first; ties keep the first-stage order."""
    scored = [i for i, s in enumerate(labels.scores) if not math.isnan(s)]
    return sorted(scored, key=lambda i: -labels.scores[i])


def sample_group(labels: Labels, settings: SamplingSettings, seed: int, epoch: int) -> list[int]:
    """Draw `group_size` candidate indices without replacement, in the teacher's order.

    A band that holds fewer candidates than its count is taken whole, and the rest of the group is drawn from the
    candidates left over. Candidates without a teacher score are never drawn.
    """
    order = teacher_order(labels)
    if len(order) <= settings.group_size:
        return order
    query_id = labels.candidate_list.query.query_id
    random = np.random.default_rng([seed, epoch, _number(query_id)])
    drawn: set[int] = set()
    for band in settings.bands or ():
        first, last = band.ranks
        available = [r for r in range(first - 1, min(last, len(order))) if r not in drawn]
        drawn.update(random.choice(available, min(band.count, len(available)), replace=False) if available else [])
    rest = [r for r in range(len(order)) if r not in drawn]
    drawn.update(random.choice(rest, settings.group_size - len(drawn), replace=False))
    return [order[rank] for rank in sorted(drawn)]


def _number(query_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(query_id.encode(), digest_size=8).digest(), "big")
