"""Fine-grained relevance labels: a scale or levels in words instead of yes and no (Zhuang et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rerank_ray.models.protocol import Answer, Backend, LogLikelihood, NextToken, Result
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.pointwise import Steps, Value, score_each, scores_from
from rerank_ray.records import CandidateList
from rerank_ray.settings.rankers import FineGrainedSettings


class FineGrained:
    """With s_k the log-likelihood of level k of 0..K: `expectation` is Σ p_k·k, p the softmax of s; `top` is s_K.

    A logit is a log-likelihood up to a constant of its prompt, which the softmax drops and `top` does not: `top` asks
    for the last level's log-likelihood, one call a candidate, however the levels are read.
    """

    def __init__(self, settings: FineGrainedSettings, backend: Backend) -> None:
        self.template = load_template(settings.prompt, "fine_grained")
        self.labels = self.template.labels if settings.score == "expectation" else self.template.labels[-1:]
        self.from_logits = settings.score == "expectation" and settings.read == "next_token"
        self.needs = frozenset({NextToken if self.from_logits else LogLikelihood})
        if self.from_logits and hasattr(backend, "check_labels"):
            backend.check_labels(self.labels, self.template.example())
        form = settings.score + (f":{settings.read}" if settings.score == "expectation" else "")
        self.name = f"fine_grained:{backend.name}:prompt={self.template.digest}:score={form}"

    def rank(self, request: CandidateList) -> Steps:
        prompts = [self.template.prompt(request.query, c) for c in request.candidates]
        if self.from_logits:
            calls = [NextToken(prompt=p, labels=self.labels) for p in prompts]
            return (yield from score_each(request, calls, _expectation))
        results = yield [LogLikelihood(prompt=p, continuation=label) for p in prompts for label in self.labels]
        count = len(self.labels)
        groups = [results[i : i + count] for i in range(0, len(results), count)]
        return scores_from(request, [_from_likelihoods(group) for group in groups])


def _from_likelihoods(results: Sequence[Result]) -> Value:
    """The expectation over the levels, or the log-likelihood of the only one."""
    failed = next((r for r in results if not isinstance(r, Answer)), None)
    if failed is not None:
        return failed
    likelihoods = [math.fsum(r.value) for r in results]
    return _expectation(likelihoods) if len(likelihoods) > 1 else likelihoods[0]


def _expectation(likelihoods: Sequence[float]) -> float:
    highest = max(likelihoods)
    weights = [math.exp(s - highest) for s in likelihoods]
    return sum(k * w for k, w in enumerate(weights)) / sum(weights)
