"""Multi-criteria reranking (REBEL, LeVine and Varjavand 2025): relevance, and criteria that the model writes first."""

from __future__ import annotations

import re
from dataclasses import replace

from rerank_ray.errors import RowError
from rerank_ray.models.protocol import Answer, Backend, Generate, Result
from rerank_ray.prompts.parse.words import ParsedItems, parse_items
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.groupwise import UNGRADED, group_calls, read_groups, split
from rerank_ray.ranking.listwise import check_fits
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.settings.rankers import RebelSettings

_PLACEHOLDER = re.compile(r"\{\s*\w+\s*\}")
_RELEVANCE, _CRITERION = (0.0, 10.0), (0.0, 5.0)
_LEAST_RELEVANCE = 3.0
_CRITERION_WEIGHT = 0.5


class Rebel:
    """One call writes criteria for the query, then ⌈N / group_size⌉ calls grade the passages, in first-stage order.

    Score = relevance + ½ · Σ criteria for a relevance of 3 or more. Below 3 a passage is dropped: its score is its
    relevance alone, which puts it below every passage that is kept. A passage without grades stays unscored. Criteria
    that can't be used (none, cut off, or with a placeholder such as {query} left in them) are an error of the query.
    """

    needs = frozenset({Generate})

    def __init__(self, settings: RebelSettings, backend: Backend) -> None:
        self.settings = settings
        self.criteria_template = load_template(settings.criteria_prompt, "rebel_criteria")
        self.template = load_template(settings.prompt, "rebel")
        check_fits(backend, self.template, settings.group_size, settings.max_tokens)
        self.name = (
            f"rebel:{backend.name}:prompt={self.template.digest}+{self.criteria_template.digest}"
            f":criteria={settings.criteria}:group={settings.group_size}:words={settings.passage_words}"
        )

    def rank(self, request: CandidateList) -> Steps:
        s = self.settings
        if not len(request):
            return Scores(scores=())
        prompt = self.criteria_template.query_prompt(request.query, s.criteria)
        (result,) = yield [Generate(prompt=prompt, max_tokens=s.max_tokens)]
        written = _criteria(self.criteria_template.prefill, result, s.criteria)
        listed = "\n".join(f"{number}. {item}" for number, item in enumerate(written.items, 1))
        groups = split(range(len(request)), s.group_size)
        results = yield group_calls(self.template, request, groups, s.passage_words, s.max_tokens, listed)
        graded = read_groups(self.template, request, groups, results, [_RELEVANCE, *[_CRITERION] * len(written.items)])
        scores = graded.scores(request, [_score(*rows[0]) if rows else UNGRADED for rows in graded.rows])
        return replace(scores, defects=(*written.defects, *scores.defects))


def _score(relevance: float, *criteria: float) -> float:
    return relevance if relevance < _LEAST_RELEVANCE else relevance + _CRITERION_WEIGHT * sum(criteria)


def _criteria(prefill: str, result: Result, count: int) -> ParsedItems:
    if not isinstance(result, Answer):
        defect = Defect(kind=DefectKind.UNSCORED, detail=f"criteria: {result.reason}")
        raise RowError(f"the call for criteria has no answer: {result.reason}", (defect,))
    parsed = parse_items(prefill + result.value, count, cut_off=result.cut_off)
    if not parsed.items:
        raise RowError(f"the model wrote no criteria: {'; '.join(map(str, parsed.defects))}", parsed.defects)
    placeholder = next((m[0] for item in parsed.items if (m := _PLACEHOLDER.search(item))), None)
    if placeholder is not None:
        detail = f"the model's criteria hold the placeholder {placeholder}, which nothing fills"
        raise RowError(detail, (Defect(kind=DefectKind.UNPARSED, detail=detail),))
    return parsed
