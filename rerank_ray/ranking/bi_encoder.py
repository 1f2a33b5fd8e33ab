"""Bi-encoder cosine (Reimers & Gurevych 2019)."""

from __future__ import annotations

import math

from rerank_ray.models.protocol import Answer, Backend, Embed
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.settings.rankers import BiEncoderRankerSettings


class BiEncoderRanker:
    """Score = cosine of the query's and the document's embedding."""

    needs = frozenset({Embed})

    def __init__(self, settings: BiEncoderRankerSettings, backend: Backend) -> None:
        self.name = f"bi_encoder:{backend.name.removeprefix('bi_encoder:')}"

    def rank(self, request: CandidateList) -> Steps:
        query, *documents = yield [
            Embed(text=request.query.text, role="query"),
            *(Embed(text=c.contents, role="document") for c in request.candidates),
        ]
        scores, defects = [], []
        for candidate, document in zip(request.candidates, documents, strict=True):
            failed = next((r for r in (query, document) if not isinstance(r, Answer)), None)
            if failed is None:
                scores.append(sum(a * b for a, b in zip(query.value, document.value, strict=True)))
            else:
                defects.append(Defect(kind=DefectKind.UNSCORED, detail=f"{candidate.doc_id}: {failed.reason}"))
                scores.append(math.nan)
        return Scores(scores=tuple(scores), defects=tuple(defects))
