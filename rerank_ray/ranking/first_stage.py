"""The first stage's own scores: the baseline of every table, and a teacher where the first stage is a good one."""

from __future__ import annotations

import math

from rerank_ray.ranking.pointwise import Steps
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.settings.rankers import FirstStageSettings


class FirstStage:
    """Score = the candidate's `score`; a candidate without one stays unscored."""

    needs = frozenset()
    name = "first_stage"

    def __init__(self, settings: FirstStageSettings, backend: None) -> None:
        pass

    def rank(self, request: CandidateList) -> Steps:
        yield []
        defects = tuple(
            Defect(kind=DefectKind.UNSCORED, detail=f"{c.doc_id}: the candidate has no first-stage score")
            for c in request.candidates
            if c.score is None
        )
        scores = tuple(math.nan if c.score is None else c.score for c in request.candidates)
        return Scores(scores=scores, defects=defects)
