"""Relevance generation: does the model say yes or no? (Liang et al. 2022; Nogueira et al. 2020)."""

from __future__ import annotations

from rerank_ray.models.protocol import Backend, NextToken
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.pointwise import Steps, score_each
from rerank_ray.records import CandidateList
from rerank_ray.settings.rankers import YesNoSettings


class YesNo:
    """Score = log p(yes) − log p(no) at the next position; the sigmoid of it is p(yes) among the two."""

    needs = frozenset({NextToken})

    def __init__(self, settings: YesNoSettings, backend: Backend) -> None:
        self.template = load_template(settings.prompt, "yes_no")
        if hasattr(backend, "check_labels"):
            backend.check_labels(self.template.labels)
        self.name = f"yes_no:{backend.name}:prompt={self.template.digest}"

    def rank(self, request: CandidateList) -> Steps:
        calls = [
            NextToken(prompt=self.template.prompt(request.query, c), labels=self.template.labels)
            for c in request.candidates
        ]
        return score_each(request, calls, lambda logits: logits[0] - logits[1])
