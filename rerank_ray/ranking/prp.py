"""Pairwise ranking prompting: which of two passages is more relevant? (Qin et al. 2023).

Models prefer a position, so both orders of a pair are asked; a passage wins when it is chosen in both, and the pair is
a tie otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence

from rerank_ray.models.protocol import Backend, Call, Generate, NextToken, Result
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.comparisons import Comparisons, read_choice
from rerank_ray.ranking.listwise import check_fits
from rerank_ray.ranking.orders import scores_of_order
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.ranking.sorting import Group, bubblesort, duels, heapsort, run_sort
from rerank_ray.records import CandidateList
from rerank_ray.settings.rankers import PRPSettings


class PRP:
    """Score with allpair: comparisons won plus half of the ties, N(N−1) prompts. With heapsort, of O(k·log₂N)
    comparisons, and sliding, of at most k(N−1), N − rank: the first k places are sorted, and below them the first
    stage's order stays.
    """

    def __init__(self, settings: PRPSettings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "prp")
        self.needs = frozenset({NextToken if settings.mode == "scoring" else Generate})
        if settings.mode == "scoring" and hasattr(backend, "check_labels"):
            backend.check_labels(self.template.labels, self.template.example())
        if settings.mode == "generation":
            check_fits(backend, self.template, 2, settings.max_tokens)
        how = settings.strategy if settings.strategy == "allpair" else f"{settings.strategy}:k={settings.k}"
        self.name = f"prp:{backend.name}:prompt={self.template.digest}:{settings.mode}:{how}"

    def rank(self, request: CandidateList) -> Steps:
        comparisons = Comparisons(request)

        def compare(pairs: Sequence[Group]) -> Generator[list[Call], list[Result], list[int | None]]:
            results = yield [self._call(request, a, b) for pair in pairs for a, b in (pair, pair[::-1])]
            both = zip(results[::2], results[1::2], strict=True)
            return [self._winner(pair, answers, comparisons) for pair, answers in zip(pairs, both, strict=True)]

        size, k = len(request), self.settings.k
        if self.settings.strategy == "allpair":
            pairs = list(itertools.combinations(range(size), 2))
            winners = yield from compare(pairs)
            return comparisons.scores(_points(size, pairs, winners))
        sort = bubblesort(size, k) if self.settings.strategy == "sliding" else heapsort(size, k, 2, duels)
        # Both orders of a pair are asked at once, so (a, b) has answered (b, a).
        order = yield from run_sort(sort, compare, key=frozenset)
        return comparisons.scores(scores_of_order(order))

    def _call(self, request: CandidateList, a: int, b: int) -> Call:
        prompt = self.template.pair_prompt(request.query, request.candidates[a], request.candidates[b])
        if self.settings.mode == "scoring":
            return NextToken(prompt=prompt, labels=self.template.labels)
        return Generate(prompt=prompt, max_tokens=self.settings.max_tokens)

    def _winner(self, pair: Group, answers: Sequence[Result], comparisons: Comparisons) -> int | None:
        choices = [read_choice(answer, self.template.labels, prefill=self.template.prefill) for answer in answers]
        labels = tuple(choice.labels for choice in choices)
        # The same position both times; exactly equal logits prefer nothing and contradict nothing.
        inconsistent = labels in (((0,), (0,)), ((1,), (1,)))
        comparisons.add(pair, choices, answered=all(labels), inconsistent=inconsistent)
        return {((0,), (1,)): pair[0], ((1,), (0,)): pair[1]}.get(labels)


def _points(size: int, pairs: Sequence[Group], winners: Sequence[int | None]) -> list[float]:
    points = [0.0] * size
    for pair, winner in zip(pairs, winners, strict=True):
        for item in pair if winner is None else (winner,):
            points[item] += 0.5 if winner is None else 1.0
    return points
