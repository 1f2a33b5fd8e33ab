"""Permutation self-consistency (Tang et al. 2024): rank shuffled lists, and aggregate the rankings."""

from __future__ import annotations

import random

import numpy as np

from rerank_ray.errors import RowError
from rerank_ray.models.protocol import Backend, Generate
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking import aggregation
from rerank_ray.ranking.listwise import check_fits, permutation_call, read_permutation
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.ranking.windows import windows
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.settings.rankers import PermutationSelfConsistencySettings


class PermutationSelfConsistency:
    """Each shuffle is ranked by sliding windows of its own, all shuffles side by side: permutations × windows calls.

    A passage that an answer leaves out is not in that shuffle's ranking, and a shuffle with a window that was not
    ranked counts for nothing; both are defects. Scores are N − mean rank (from 0) for borda, the mean of
    1 / (60 + rank from 1) for rrf and N − rank (from 0) in the consensus for kemeny, over the rankings that hold the
    passage. `uncertainty` is the population standard deviation of the passage's ranks, in ranks. No ranking at all is
    an error of the query.
    """

    needs = frozenset({Generate})

    def __init__(self, settings: PermutationSelfConsistencySettings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "rank_gpt")
        check_fits(backend, self.template, settings.window, settings.max_tokens)
        self.name = (
            f"permutation_self_consistency:{backend.name}:prompt={self.template.digest}"
            f":window={settings.window}/{settings.step}:permutations={settings.permutations}:{settings.aggregation}"
            f":seed={settings.seed}:words={settings.passage_words}"
        )

    def rank(self, request: CandidateList) -> Steps:
        s = self.settings
        shuffles = _shuffles(len(request), s.permutations, f"{s.seed}:{request.query.query_id}")
        left_out: dict[int, set[int]] = {number: set() for number in range(len(shuffles))}
        defects: list[Defect] = []
        rationales: list[str] = []
        for window in windows(len(request), s.window, s.step):
            shown = {number: shuffles[number][window.start : window.stop] for number in left_out}
            results = yield [
                permutation_call(self.template, request, members, s.passage_words, s.max_tokens)
                for members in shown.values()
            ]
            for (number, members), result in zip(shown.items(), results, strict=True):
                rationale, parsed = read_permutation(self.template, result, len(members))
                where = f"shuffle {number + 1}, ranks {window.start + 1} to {window.stop}"
                defects += [Defect(kind=d.kind, detail=f"{where}: {d.detail}") for d in parsed.defects]
                if parsed.order is None:
                    del left_out[number]
                    continue
                rationales.append(rationale)
                order = [members[i] for i in parsed.order]
                shuffles[number][window.start : window.stop] = order
                left_out[number] |= set(order[parsed.named :])
        if not left_out and len(request):
            raise RowError(f"none of {len(shuffles)} shuffles was ranked, for example {defects[0]}", defects)
        rankings = [[i for i in shuffles[number] if i not in out] for number, out in left_out.items()]
        scores = _scores(rankings, len(request), s.aggregation)
        for index in np.flatnonzero(np.isnan(scores)):
            detail = f"{request.candidates[index].doc_id}: no shuffle's ranking holds it"
            defects.append(Defect(kind=DefectKind.UNSCORED, detail=detail))
        return Scores(
            scores=tuple(scores.tolist()),
            uncertainty=tuple(aggregation.rank_deviation(rankings, len(request)).tolist()),
            rationales=tuple(rationales) if any(rationales) else None,
            rationales_are_of_calls=True,
            defects=tuple(defects),
        )


def _shuffles(count: int, shuffles: int, seed: str) -> list[list[int]]:
    source = random.Random(seed)
    return [source.sample(range(count), count) for _ in range(shuffles)]


def _scores(rankings: list[list[int]], count: int, method: str) -> np.ndarray:
    """[count], NaN for an item that no ranking holds."""
    if method == "rrf":
        return aggregation.rrf(rankings, count)
    mean_ranks = aggregation.borda(rankings, count)
    if method == "borda":
        return count - mean_ranks
    scores = np.full(count, np.nan)
    held = np.flatnonzero(~np.isnan(mean_ranks))
    order = aggregation.kemeny(aggregation.preferences(rankings, count)[np.ix_(held, held)])
    scores[held[order]] = count - np.arange(len(order), dtype=float)
    return scores
