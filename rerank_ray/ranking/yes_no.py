"""Relevance generation: does the model say yes or no? (Liang et al. 2022; Nogueira et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rerank_ray.errors import ConfigError
from rerank_ray.models.protocol import Answer, Backend, Failure, Generate, NextToken, Result
from rerank_ray.prompts.parse.answer import whole_turn
from rerank_ray.prompts.parse.words import parse_label
from rerank_ray.prompts.render import Template, load_template
from rerank_ray.ranking.pointwise import Steps, Value, score_each, scores_from
from rerank_ray.records import CandidateList
from rerank_ray.settings.rankers import YesNoSettings


class YesNo:
    """Score = log p(yes) − log p(no) at the next position, or another reading of the same position.

    `probability` is p(yes) among the two answers. `sampled` is 1 + p where the answer is yes and 1 − p where it is no,
    p the answer's probability: the form for servers that tell one sampled token's probability and no other's. From a
    backend that has both answers' logits, p is that of the likelier one among the two. `logit` is the logit of yes
    alone, which FlagEmbedding's LLM rerankers are trained on; a log-probability won't do for it.
    """

    def __init__(self, settings: YesNoSettings, backend: Backend) -> None:
        self.template = load_template(settings.prompt, "yes_no")
        self.generates = settings.score == "sampled" and NextToken not in backend.answers
        self.needs = frozenset({Generate if self.generates else NextToken})
        if hasattr(backend, "check_labels") and not self.generates:
            backend.check_labels(self.template.labels, self.template.example())
        if self.generates:
            self.template.check_readable()
            if hasattr(backend, "check_fits"):
                backend.check_fits(self.template.example(), max_tokens=1)
        if self.generates and not getattr(backend, "tells_log_probabilities", True):
            raise ConfigError(
                f"score: sampled: {backend.name} is not asked for the log-probability of what it writes: set logprobs: "
                "true, or top_logprobs and score: log_odds"
            )
        if settings.score == "logit" and not getattr(backend, "tells_raw_logits", False):
            raise ConfigError(
                f"score: logit: {backend.name} tells log-probabilities, which leave each prompt's own constant out; "
                "use kind hf_causal or hf_seq2seq, or score: log_odds"
            )
        self.read = _READINGS[settings.score]
        form = "" if settings.score == "log_odds" else f":score={settings.score}"
        self.name = f"yes_no:{backend.name}:prompt={self.template.digest}{form}"

    def rank(self, request: CandidateList) -> Steps:
        prompts = [self.template.prompt(request.query, c) for c in request.candidates]
        if not self.generates:
            calls = [NextToken(prompt=prompt, labels=self.template.labels) for prompt in prompts]
            return (yield from score_each(request, calls, self.read))
        results = yield [Generate(prompt=prompt, max_tokens=1) for prompt in prompts]
        return scores_from(request, [_generated(result, self.template) for result in results])


def _log_odds(logits: Sequence[float]) -> float:
    return logits[0] - logits[1]


def _probability(logits: Sequence[float]) -> float:
    """The softmax of two is the sigmoid of their difference, here without overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * _log_odds(logits)))


def _sampled(logits: Sequence[float]) -> float:
    yes = _probability(logits)
    return 1.0 + yes if yes >= 0.5 else yes


_READINGS = {"log_odds": _log_odds, "probability": _probability, "sampled": _sampled, "logit": lambda x: x[0]}


def _generated(result: Result, template: Template) -> Value:
    if not isinstance(result, Answer):
        return result
    label = parse_label(whole_turn(template.prefill, result.value), template.labels)
    if label.index is None:
        return label.defects[0]
    if result.log_probability is None:
        return Failure(reason="the backend did not tell the probability of its answer")
    p = math.exp(result.log_probability)
    return 1.0 + p if label.index == 0 else 1.0 - p
