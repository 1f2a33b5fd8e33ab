"""What pointwise methods share: candidates scored one by one, all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

from rerank_ray.models.protocol import Answer, Call, Failure, Result
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores

Steps = Generator[list[Call], list[Result], Scores]
Value = float | Failure | Defect
"""What a candidate came to: its score, or why it has none."""


def score_each(request: CandidateList, calls: Sequence[Call], read: Callable[[tuple], float]) -> Steps:
    """Make one call a candidate and read its score off the answer; a failed call leaves NaN and a defect."""
    results = yield list(calls)
    return scores_from(request, [read(r.value) if isinstance(r, Answer) else r for r in results])


def cosine(query: Result, document: Result) -> float | Failure:
    """Of two embeddings, which are unit vectors, or why one is missing."""
    for result in (query, document):
        if not isinstance(result, Answer):
            return result
    return sum(a * b for a, b in zip(query.value, document.value, strict=True))


def scores_from(request: CandidateList, values: Sequence[Value]) -> Scores:
    """Scores of candidates in their order; a failure, a defect, or what is no finite number leaves NaN and a defect."""
    found = [_unscored(c.doc_id, v) for c, v in zip(request.candidates, values, strict=True)]
    scores = tuple(math.nan if defect else value for value, defect in zip(values, found, strict=True))
    return Scores(scores=scores, defects=tuple(defect for defect in found if defect))


def _unscored(doc_id: str, value: Value) -> Defect | None:
    """Why this value is no score; None when it is one."""
    if isinstance(value, Defect):
        return Defect(kind=value.kind, detail=f"{doc_id}: {value.detail}")
    if isinstance(value, Failure):
        return Defect(kind=DefectKind.UNSCORED, detail=f"{doc_id}: {value.reason}")
    if not math.isfinite(value):
        return Defect(kind=DefectKind.UNSCORED, detail=f"{doc_id}: the model's score is not a finite number")
    return None
