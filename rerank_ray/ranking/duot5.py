"""duoT5: how probably is one passage more relevant than another, over all ordered pairs (Pradeep et al. 2021)."""

from __future__ import annotations

import itertools

import numpy as np

from rerank_ray.models.protocol import Backend, NextToken
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.comparisons import Comparisons, read_choice
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.records import CandidateList
from rerank_ray.settings.rankers import DuoT5Settings


class DuoT5:
    """p_ij = softmax(true, false)[true] of the prompt with passages i and j; a candidate's score aggregates the
    p_ij and p_ji of all j among the first m = `top` candidates, m(m−1) prompts:

    | aggregation   | score of i                    |
    |---------------|-------------------------------|
    | `sum`         | Σ_j p_ij                      |
    | `sum_log`     | Σ_j log p_ij                  |
    | `sym_sum`     | Σ_j p_ij + 1 − p_ji           |
    | `sym_sum_log` | Σ_j log p_ij + log(1 − p_ji)  |

    A pair of which an answer is missing is left out, and the sums of its two candidates are scaled up to m − 1 pairs.
    Candidates below the first m follow in their order: 1, 2, … below the lowest score.
    """

    needs = frozenset({NextToken})

    def __init__(self, settings: DuoT5Settings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "duot5")
        if hasattr(backend, "check_labels"):
            backend.check_labels(self.template.labels, self.template.example())
        self.name = f"duot5:{backend.name}:prompt={self.template.digest}:{settings.aggregation}:top={settings.top}"

    def rank(self, request: CandidateList) -> Steps:
        top = min(self.settings.top, len(request))
        asked = list(itertools.permutations(range(top), 2))
        results = yield [
            NextToken(
                prompt=self.template.pair_prompt(request.query, request.candidates[i], request.candidates[j]),
                labels=self.template.labels,
            )
            for i, j in asked
        ]
        result_of = dict(zip(asked, results, strict=True))
        comparisons = Comparisons(request)
        margins, answered = np.zeros((top, top)), np.zeros((top, top), dtype=bool)
        for i, j in itertools.combinations(range(top), 2):
            choices = [read_choice(result_of[pair], self.template.labels) for pair in ((i, j), (j, i))]
            answered[i, j] = answered[j, i] = all(choice.labels for choice in choices)
            comparisons.add((i, j), choices, answered=bool(answered[i, j]))
            if answered[i, j]:
                for a, b in ((i, j), (j, i)):
                    true, false = result_of[a, b].value
                    margins[a, b] = true - false
        scored = _aggregate(margins, answered, self.settings.aggregation)
        lowest = min(scored[answered.any(axis=1)], default=0.0)
        below = lowest - np.arange(1, len(request) - top + 1)
        return comparisons.scores([*scored.tolist(), *below.tolist()])


def _aggregate(margins: np.ndarray, answered: np.ndarray, aggregation: str) -> np.ndarray:
    """Scores [m] from logit(true) − logit(false) of each ordered pair, and which of the pairs count, both [m, m]."""
    log_p, log_not_p = -np.logaddexp(0, -margins), -np.logaddexp(0, margins)
    terms = {
        "sum": lambda: np.exp(log_p),
        "sum_log": lambda: log_p,
        "sym_sum": lambda: np.exp(log_p) + np.exp(log_not_p.T),
        "sym_sum_log": lambda: log_p + log_not_p.T,
    }[aggregation]()
    counted = np.maximum(answered.sum(axis=1), 1)
    return np.where(answered, terms, 0.0).sum(axis=1) * (len(terms) - 1) / counted
