"""What pointwise methods share: one call a candidate, all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

from rerank_ray.models.protocol import Answer, Call, Result
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores

Steps = Generator[list[Call], list[Result], Scores]


def score_each(request: CandidateList, calls: Sequence[Call], read: Callable[[tuple], float]) -> Steps:
    """Make one call a candidate and read its score off the answer; a failed call leaves NaN and a defect."""
    results = yield list(calls)
    scores, defects = [], []
    for candidate, result in zip(request.candidates, results, strict=True):
        score = read(result.value) if isinstance(result, Answer) else math.nan
        if not math.isfinite(score):
            reason = "the model's score is not a finite number" if isinstance(result, Answer) else result.reason
            defects.append(Defect(kind=DefectKind.UNSCORED, detail=f"{candidate.doc_id}: {reason}"))
            score = math.nan
        scores.append(score)
    return Scores(scores=tuple(scores), defects=tuple(defects))
