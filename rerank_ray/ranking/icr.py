"""In-context re-ranking: the attention a query pays to each document of one prompt (ICR, Chen et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rerank_ray.models.protocol import Answer, Attention, Backend
from rerank_ray.prompts.passages import prompt_over
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.orders import scores_of_order
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.ranking.windows import windows
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.settings.rankers import CoReHeadsSettings, ICRSettings

CALIBRATION_QUERY = "N/A"


class ICR:
    """Score of a document = Σ over its tokens of the attention from the query less that from a query without content.

    All documents stand in one prompt, which is computed once for both queries; the first stage's best comes last, next
    to the query. Of a list longer than `documents_per_prompt`, windows are ordered from the back to the front, half a
    window apart; scores of different prompts can't be compared, so such a list's are N − rank.
    """

    needs = frozenset({Attention})
    heads: tuple[tuple[int, int], ...] | None = None
    """(layer, head) pairs whose attention counts; None is all."""

    def __init__(self, settings: ICRSettings | CoReHeadsSettings, backend: Backend) -> None:
        self.template = load_template(settings.prompt, "icr")
        self._size = settings.documents_per_prompt
        # Raises ModelError for a model whose attention can't be read; a backend that answers no `Attention` has none.
        self._shape = getattr(backend, "attention_shape", None)
        self.name = f"{settings.method}:{backend.name}:prompt={self.template.digest}"

    def rank(self, request: CandidateList) -> Steps:
        order = list(range(len(request)))
        scores = [math.nan] * len(request)
        spans = windows(len(request), self._size, self._size // 2)
        for span in spans:
            shown = order[span.start : span.stop]
            (result,) = yield [self._call(request, shown[::-1])]
            if not isinstance(result, Answer):
                # The order of one window depends on the last: without it there is no ranking.
                return _unscored([math.nan] * len(request), [f"{len(shown)} documents in one prompt: {result.reason}"])
            for candidate, calibrated in zip(shown, reversed(result.value), strict=True):
                scores[candidate] = document_score(calibrated)
            order[span.start : span.stop] = sorted(shown, key=lambda i: (math.isnan(scores[i]), -scores[i]))
        missing = [i for i, score in enumerate(scores) if math.isnan(score)]
        if len(spans) > 1:
            ranks = scores_of_order(order)
            scores = [math.nan if math.isnan(s) else rank for s, rank in zip(scores, ranks, strict=True)]
        reason = "it has no tokens, or its attention is not a finite number"
        return _unscored(scores, [f"{request.candidates[i].doc_id}: {reason}" for i in missing])

    def _call(self, request: CandidateList, shown: Sequence[int]) -> Attention:
        prompt = prompt_over(self.template, request, shown, None)
        return Attention(prompt=prompt, query=request.query.text, calibration=CALIBRATION_QUERY, heads=self.heads)


def _unscored(scores: Sequence[float], details: Sequence[str]) -> Scores:
    return Scores(
        scores=tuple(scores), defects=tuple(Defect(kind=DefectKind.UNSCORED, detail=detail) for detail in details)
    )


def document_score(calibrated: np.ndarray) -> float:
    """Sum of a document's calibrated token scores without the abnormally low ones; NaN without any finite ones.

    Args:
        calibrated: [tokens], attention from the query less attention from the calibration query.

    Tokens below mean − 2 standard deviations are left out. The deviation divides by n − 1, as in the authors' code, but
    is 0 for one token, which therefore counts.
    """
    values = np.asarray(calibrated, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        return math.nan
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(values[values >= values.mean() - 2 * deviation].sum())
