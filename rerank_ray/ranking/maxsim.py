"""Late interaction: Σ over query tokens of the best match among the document's tokens (Khattab & Zaharia 2020)."""

from __future__ import annotations

from rerank_ray.models.protocol import Answer, Backend, EmbedTokens
from rerank_ray.ranking.pointwise import Steps, scores_from
from rerank_ray.records import CandidateList
from rerank_ray.settings.rankers import MaxSimSettings


class MaxSim:
    """Score = Σ_q max_d q·d over the embeddings of the query's tokens q and the document's d."""

    needs = frozenset({EmbedTokens})

    def __init__(self, settings: MaxSimSettings, backend: Backend) -> None:
        self.name = f"maxsim:{backend.name}"

    def rank(self, request: CandidateList) -> Steps:
        query, *documents = yield [
            EmbedTokens(text=request.query.text, role="query"),
            *(EmbedTokens(text=c.contents, role="document") for c in request.candidates),
        ]
        if not isinstance(query, Answer):
            return scores_from(request, [query] * len(request))
        values = [float((query.value @ d.value.T).max(axis=1).sum()) if isinstance(d, Answer) else d for d in documents]
        return scores_from(request, values)
