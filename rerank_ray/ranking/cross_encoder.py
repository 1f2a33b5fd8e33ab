"""Cross-encoder reranking (Nogueira & Cho 2019), students included."""

from __future__ import annotations

from rerank_ray.models.protocol import Backend, Pair
from rerank_ray.ranking.pointwise import Steps, score_each
from rerank_ray.records import CandidateList
from rerank_ray.settings.rankers import CrossEncoderRankerSettings


class CrossEncoderRanker:
    """Score = the model's raw output for (query, document)."""

    needs = frozenset({Pair})

    def __init__(self, settings: CrossEncoderRankerSettings, backend: Backend) -> None:
        layer = "" if backend.exit_layer is None else f":layer={backend.exit_layer}"
        self.name = f"cross_encoder:{backend.name.removeprefix('cross_encoder:')}{layer}"

    def rank(self, request: CandidateList) -> Steps:
        calls = [Pair(query=request.query.text, text=c.contents) for c in request.candidates]
        return score_each(request, calls, lambda score: score)
