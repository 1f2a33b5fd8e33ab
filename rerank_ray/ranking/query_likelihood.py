"""Query likelihood: how probable is the query after the passage? (UPR, Sachan et al. 2022)."""

from __future__ import annotations

from rerank_ray.models.protocol import Backend, LogLikelihood
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.pointwise import Steps, score_each
from rerank_ray.records import CandidateList
from rerank_ray.settings.rankers import QueryLikelihoodSettings


class QueryLikelihood:
    """Score = mean log-probability of the query's tokens (a log-likelihood: higher is better, never above 0)."""

    needs = frozenset({LogLikelihood})

    def __init__(self, settings: QueryLikelihoodSettings, backend: Backend) -> None:
        self.template = load_template(settings.prompt, "query_likelihood")
        self.name = f"query_likelihood:{backend.name}:prompt={self.template.digest}"

    def rank(self, request: CandidateList) -> Steps:
        continuation = self.template.continued(request.query)
        calls = [
            LogLikelihood(prompt=self.template.prompt(request.query, c), continuation=continuation)
            for c in request.candidates
        ]
        return score_each(request, calls, lambda logs: sum(logs) / len(logs))
