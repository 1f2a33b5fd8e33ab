"""Which candidates of a query are scored in one step: a pure function of (seed, epoch, query)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from rerank_ray.records import Labels
from rerank_ray.settings.sampling import FalseNegativeSettings, SamplingSettings


def teacher_order(labels: Labels) -> list[int]:
    """Indices of the scored candidates, the teacher's best first; ties keep the first-stage order."""
    scored = [i for i, s in enumerate(labels.scores) if not math.isnan(s)]
    return sorted(scored, key=lambda i: -labels.scores[i])


def sample_group(labels: Labels, settings: SamplingSettings, seed: int, epoch: int) -> list[int]:
    """Draw `group_size` candidate indices without replacement, in the teacher's order.

    Known positives come first, then the epoch's bands, whose ranks are the teacher's before anything is filtered. A
    band that holds fewer candidates than its count is taken whole, and the rest of the group is drawn from the
    candidates left over. Candidates without a teacher score and false negatives are never drawn, so that a group can
    be smaller than `group_size`.
    """
    order = teacher_order(labels)
    dropped = false_negatives(labels, order, settings.false_negatives)
    allowed = [r for r in range(len(order)) if r not in dropped]
    if len(allowed) <= settings.group_size:
        return [order[rank] for rank in allowed]
    query_id = labels.candidate_list.query.query_id
    random = np.random.default_rng([seed, epoch, _number(query_id)])
    drawn: set[int] = set()

    def draw(ranks: Sequence[int], count: int) -> None:
        left = [r for r in ranks if r not in drawn]
        if left and count:
            drawn.update(random.choice(left, min(count, len(left)), replace=False).tolist())

    draw([r for r in allowed if is_positive(labels, order[r])], settings.positives)
    for band in settings.bands_of(epoch) or ():
        first, last = band.ranks
        draw([r for r in allowed if first - 1 <= r < last], band.count)
    draw(allowed, settings.group_size - len(drawn))
    return [order[rank] for rank in sorted(drawn)]


def false_negatives(labels: Labels, order: Sequence[int], settings: FalseNegativeSettings | None) -> set[int]:
    """Ranks, from 0, of the candidates without a known gain that score too close to the positive or above it.

    The rules are those of NV-Retriever (Moreira et al. 2024), TopK-MarginPos and TopK-PercPos; the latter's fraction is
    taken from the list's lowest score, because teachers' scores have no common zero.
    """
    if settings is None or not order:
        return set()
    positive = next((r for r, i in enumerate(order) if is_positive(labels, i)), 0)
    highest, lowest = labels.scores[order[positive]], labels.scores[order[-1]]
    limits = []
    if settings.margin is not None:
        limits.append(highest - settings.margin)
    if settings.fraction is not None:
        limits.append(lowest + settings.fraction * (highest - lowest))
    return {
        r
        for r, i in enumerate(order)
        if r != positive and not is_positive(labels, i) and labels.scores[i] > min(limits)
    }


def is_positive(labels: Labels, index: int) -> bool:
    """Whether a candidate has a known gain."""
    return (labels.candidate_list.candidates[index].label or 0.0) > 0


def _number(query_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(query_id.encode(), digest_size=8).digest(), "big")
