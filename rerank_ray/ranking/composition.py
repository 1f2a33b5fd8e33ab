"""Rankers made of rankers: ensembles, cascades and selective reranking.

Every child ranks all queries of a batch side by side, so a composition packs calls as well as its children do. A query
that a child fails on is an error, and costs no further calls: an average over fewer teachers would be another teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rerank_ray.ranking.fusion import fuse
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.records import CandidateList, Defect, Scores, Usage
from rerank_ray.settings.rankers import CascadeSettings, EnsembleSettings, SelectiveSettings
from rerank_ray.uncertainty import uncertainty_of

Rank = Callable[[Sequence[CandidateList]], list[Outcome]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A ranker inside a composition: its place in the config, its name, and how it ranks."""

    path: str
    name: str
    rank: Rank


@dataclass(slots=True)
class _Merged:
    """What one query's children have given so far."""

    request: CandidateList
    usage: Usage = field(default_factory=Usage)
    defects: list[Defect] = field(default_factory=list)
    rationales: dict[int, list[str]] = field(default_factory=dict)
    """Candidate -> one text for each child that gave one."""
    error: str | None = None

    def take(self, child: Child, outcome: Outcome, candidates: Sequence[int]) -> Scores | None:
        """Add a child's outcome over these candidates; returns its scores, or None when it failed."""
        self.usage = self.usage + outcome.usage
        scores = outcome.scores
        self.defects += [replace(d, detail=f"{child.path}: {d.detail}") for d in outcome.all_defects]
        if scores is None:
            self.error = f"{child.path}: {outcome.error}"
            return None
        if scores.rationales and not scores.rationales_are_of_calls:
            for i, text in zip(candidates, scores.rationales, strict=True):
                if text:
                    self.rationales.setdefault(i, []).append(text)
        return scores

    def outcome(self, scores: Scores | None) -> Outcome:
        """The query's outcome: these scores with what the children added to them, or the error."""
        if self.error is not None:
            defects = tuple(self.defects)
            return Outcome(request=self.request, scores=None, usage=self.usage, error=self.error, defects=defects)
        texts = ["\n\n".join(self.rationales.get(i, ())) for i in range(len(self.request))]
        scores = replace(
            scores,
            rationales=tuple(texts) if any(texts) else None,
            defects=(*self.defects, *scores.defects),
        )
        return Outcome(request=self.request, scores=scores, usage=self.usage)


class Ensemble:
    """Score = weighted mean of the rankers' scores, made comparable within the query; uncertainty = their deviation."""

    def __init__(self, settings: EnsembleSettings, children: Mapping[str, Child]) -> None:
        self.children = tuple(children.values())
        self.combine = settings.combine
        self.weights = settings.weights or [1.0] * len(self.children)
        parts = (f"{w:g}*({c.name})" for w, c in zip(self.weights, self.children, strict=True))
        self.name = f"ensemble:{settings.combine}:{'+'.join(parts)}"

    def rank(self, requests: Sequence[CandidateList]) -> list[Outcome]:
        queries = [(_Merged(request), []) for request in requests]
        for child in self.children:
            alive = [(merged, rows) for merged, rows in queries if merged.error is None]
            outcomes = child.rank([merged.request for merged, _ in alive])
            for (merged, rows), outcome in zip(alive, outcomes, strict=True):
                scores = merged.take(child, outcome, range(len(merged.request)))
                if scores is not None:
                    rows.append(scores.scores)
        return [merged.outcome(None if merged.error else self._fused(merged.request, rows)) for merged, rows in queries]

    def _fused(self, request: CandidateList, rows: Sequence[Sequence[float]]) -> Scores:
        doc_ids = [c.doc_id for c in request.candidates]
        return fuse(np.array(rows, dtype=float), self.combine, self.weights, doc_ids)


class Cascade:
    """Each stage reranks the top of the order that the one before it left (Wang, Lin & Metzler 2011).

    See `_Order.scores` for what the scores of different stages become.
    """

    def __init__(self, settings: CascadeSettings, children: Mapping[str, Child]) -> None:
        self.stages = tuple(
            (child, stage.keep) for child, stage in zip(children.values(), settings.stages, strict=True)
        )
        self.name = "cascade:" + ">".join(
            f"{'' if keep is None else keep}({child.name})" for child, keep in self.stages
        )

    def rank(self, requests: Sequence[CandidateList]) -> list[Outcome]:
        orders = [_Order(request) for request in requests]
        for child, keep in self.stages:
            _rerank(orders, child, keep)
        return [order.outcome() for order in orders]


class Selective:
    """The cheap ranker for every query, the expensive one for the top k of those whose cheap ranking is uncertain.

    A query is uncertain by its own cheap scores and a fixed threshold, so its result does not depend on its neighbours.
    """

    def __init__(self, settings: SelectiveSettings, children: Mapping[str, Child]) -> None:
        self.cheap, self.expensive = children["cheap"], children["expensive"]
        self.k, self.criterion, self.threshold = settings.k, settings.criterion, settings.threshold
        rule = f"{settings.criterion}@{settings.k}>{settings.threshold!r}"
        self.name = f"selective:{rule}:({self.expensive.name})|({self.cheap.name})"

    def rank(self, requests: Sequence[CandidateList]) -> list[Outcome]:
        orders = [_Order(request) for request in requests]
        _rerank(orders, self.cheap, None)
        chosen = [o for o in orders if uncertainty_of(o.values, self.k, self.criterion) > self.threshold]
        _rerank(chosen, self.expensive, self.k)
        return [order.outcome() for order in orders]


class _Order:
    """One query's order and scores between two stages; at first the order of the candidate list."""

    def __init__(self, request: CandidateList) -> None:
        given = [c.score for c in request.candidates]
        self.merged = _Merged(request)
        self.order = list(range(len(request)))
        # Without first-stage scores the order alone says how far apart two candidates are.
        self.values = [-float(i) for i in self.order] if None in given else [float(s) for s in given]
        self.uncertainty = [math.nan] * len(request)
        self.stage = [0] * len(request)
        """How many stages were over when a candidate was last scored; 0 for those that none has scored."""

    def apply(self, head: Sequence[int], scores: Scores) -> None:
        """Put the head into the order of its new scores; what they leave out goes to the end and stays unscored."""
        number = max(self.stage) + 1
        for position, i in enumerate(head):
            self.values[i], self.stage[i] = scores.scores[position], number
            self.uncertainty[i] = scores.uncertainty[position] if scores.uncertainty else math.nan
        rest = self.order[len(head) :]
        scored = sorted((i for i in head if not math.isnan(self.values[i])), key=lambda i: -self.values[i])
        self.order = [*scored, *rest, *(i for i in head if math.isnan(self.values[i]))]

    def scores(self) -> Scores:
        """Scores that fall along the order, so that sorting by them gives the order back.

        A candidate's score is that of the last stage that scored it. The top keeps its scores as they are; what a stage
        left below keeps its differences and is shifted as a whole, to start just below the worst of what is above it.
        Where a score ties with the one above it although the candidate list has the two the other way round, it is
        lowered by the smallest step of the float32 that labels are stored in.
        """
        final = [math.nan] * len(self.order)
        above, shift = None, 0.0
        for i in self.order:
            if math.isnan(self.values[i]):
                continue
            if above is None:
                final[i] = self.values[i]
            elif self.stage[i] != self.stage[above]:
                final[i] = _step_below(final[above])
                shift = final[i] - self.values[i]
            else:
                final[i] = min(self.values[i] + shift, final[above])
                if i < above and np.float32(final[i]) == np.float32(final[above]):
                    final[i] = _step_below(final[above])
            above = i
        known = any(not math.isnan(u) for u in self.uncertainty)
        return Scores(scores=tuple(final), uncertainty=tuple(self.uncertainty) if known else None)

    def outcome(self) -> Outcome:
        return self.merged.outcome(None if self.merged.error else self.scores())


def _rerank(orders: Sequence[_Order], child: Child, keep: int | None) -> None:
    """Let a child rerank the top `keep` of each query that has no error yet, all of them side by side."""
    alive = [o for o in orders if o.merged.error is None]
    heads = [o.order[:keep] for o in alive]
    outcomes = child.rank([_part(o.merged.request, head) for o, head in zip(alive, heads, strict=True)])
    for order, head, outcome in zip(alive, heads, outcomes, strict=True):
        scores = order.merged.take(child, outcome, head)
        if scores is not None:
            order.apply(head, scores)


def _step_below(score: float) -> float:
    return float(np.nextafter(np.float32(score), np.float32(-np.inf)))


def _part(request: CandidateList, positions: Sequence[int]) -> CandidateList:
    return replace(request, candidates=tuple(request.candidates[i] for i in positions))
