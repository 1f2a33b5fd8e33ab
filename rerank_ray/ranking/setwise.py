"""Setwise ranking: which of several passages is the most relevant? (Zhuang et al. 2023), also with reasoning before the
answer (Rank-R1, Zhuang et al. 2025)."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Generator, Sequence

from rerank_ray.models.protocol import Backend, Call, Generate, NextToken, Result
from rerank_ray.prompts.passages import prompt_over
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.comparisons import Comparisons, read_choice
from rerank_ray.ranking.listwise import check_fits
from rerank_ray.ranking.orders import scores_of_order
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.ranking.sorting import Group, bubblesort, heapsort, run_sort
from rerank_ray.records import CandidateList
from rerank_ray.settings.rankers import RankR1Settings, SetwiseSettings


class Setwise:
    """Score = N − rank: the first k places are sorted, and below them the first stage's order stays.

    A set is a passage and up to `children` others. Its winner has the highest logit (likelihood) or is named by the
    text (generation). With `permutations` above 1 the set is asked in as many different orders, or in all that it has,
    drawn by query and set alone, and the most votes win; equal votes go to the passage that the first stage ranked
    higher.

    Rank-R1 is the form whose text reasons before it answers; a candidate's rationale is that of the last set it won.
    """

    def __init__(self, settings: SetwiseSettings | RankR1Settings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, settings.method)
        self.identifiers = self.template.identifiers(settings.children + 1)
        self.needs = frozenset({NextToken if settings.mode == "likelihood" else Generate})
        if settings.mode == "likelihood" and hasattr(backend, "check_labels"):
            backend.check_labels(self.identifiers, self.template.example(len(self.identifiers)))
        check_fits(
            backend, self.template, len(self.identifiers), 0 if settings.mode == "likelihood" else settings.max_tokens
        )
        self.name = (
            f"{settings.method}:{backend.name}:prompt={self.template.digest}:{settings.mode}:{settings.strategy}"
            f":children={settings.children}:k={settings.k}:permutations={settings.permutations}"
        )

    def rank(self, request: CandidateList) -> Steps:
        comparisons = Comparisons(request)
        rationales = [""] * len(request)

        def compare(groups: Sequence[Group]) -> Generator[list[Call], list[Result], list[int | None]]:
            asked = [self._orders(request, group) for group in groups]
            results = iter((yield [self._call(request, order) for orders in asked for order in orders]))
            answers = [[(order, next(results)) for order in orders] for orders in asked]
            return [self._winner(of_set, comparisons, rationales) for of_set in answers]

        size, k, children = len(request), self.settings.k, self.settings.children
        sort = heapsort if self.settings.strategy == "heapsort" else bubblesort
        order = yield from run_sort(sort(size, k, children), compare)
        return comparisons.scores(scores_of_order(order), rationales if self.settings.mode == "reasoning" else None)

    def _orders(self, request: CandidateList, group: Group) -> list[Group]:
        """The orders in which a set is asked: as it is, then shuffled. One that came twice would vote twice."""
        orders, numbers = [group], itertools.count(1)
        while len(orders) < min(self.settings.permutations, math.factorial(len(group))):
            shuffled = list(group)
            random.Random(f"{request.query.query_id}:{group}:{next(numbers)}").shuffle(shuffled)
            if tuple(shuffled) not in orders:
                orders.append(tuple(shuffled))
        return orders

    def _call(self, request: CandidateList, order: Group) -> Call:
        prompt = prompt_over(self.template, request, order, None)
        if self.settings.mode == "likelihood":
            return NextToken(prompt=prompt, labels=self.identifiers[: len(order)])
        stop = ("</answer>",) if self.settings.mode == "reasoning" else ()
        return Generate(prompt=prompt, max_tokens=self.settings.max_tokens, stop=stop)

    def _winner(
        self, asked: Sequence[tuple[Group, Result]], comparisons: Comparisons, rationales: list[str]
    ) -> int | None:
        tagged = self.settings.mode == "reasoning"
        choices = [
            read_choice(result, self.identifiers[: len(order)], prefill=self.template.prefill, tagged=tagged)
            for order, result in asked
        ]
        votes = [[order[label] for label in choice.labels] for (order, _), choice in zip(asked, choices, strict=True)]
        counts = Counter(item for vote in votes for item in vote)
        comparisons.add(asked[0][0], choices, answered=bool(counts))
        if not counts:
            return None
        winner = min(counts, key=lambda item: (-counts[item], item))
        rationales[winner] = next(c.rationale for c, vote in zip(choices, votes, strict=True) if winner in vote)
        return winner
