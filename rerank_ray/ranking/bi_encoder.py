"""Bi-encoder cosine (Reimers & Gurevych 2019)."""

from __future__ import annotations

from rerank_ray.models.protocol import Backend, Embed
from rerank_ray.ranking.pointwise import Steps, cosine, scores_from
from rerank_ray.records import CandidateList
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
        return scores_from(request, [cosine(query, document) for document in documents])
