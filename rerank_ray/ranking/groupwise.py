"""Scores for whole groups of passages, and GroupRank (Sun et al. 2025), which averages them over random groups."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rerank_ray.models.protocol import Answer, Backend, Generate, Result
from rerank_ray.prompts.parse.answer import split_reasoning
from rerank_ray.prompts.parse.scores import parse_score_rows
from rerank_ray.prompts.passages import first_stage_scores, prompt_over
from rerank_ray.prompts.render import Template, load_template
from rerank_ray.ranking.listwise import check_fits
from rerank_ray.ranking.pointwise import Steps, Value, scores_from
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.settings.rankers import GroupRankSettings

_HIGHEST = 10.0
UNGRADED = Defect(kind=DefectKind.UNSCORED, detail="no group's answer grades it")


class GroupRank:
    """Score = mean over the shuffles of the grade (0 … 10) / 10: shuffles × ⌈N / group_size⌉ calls, all at once.

    A passage that its group's answer leaves out, or whose group has no answer, has no grade from that shuffle, never 0;
    one without any stays unscored. With `rerank_weight` w below 1 the score is w · that + (1 − w) · the first-stage
    score, min-max scaled within the query because its unit is the first stage's own; grades keep their scale, which
    means the same for every query.
    """

    needs = frozenset({Generate})

    def __init__(self, settings: GroupRankSettings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "group_rank")
        check_fits(backend, self.template, settings.group_size, settings.max_tokens)
        self.name = (
            f"group_rank:{backend.name}:prompt={self.template.digest}:group={settings.group_size}"
            f":shuffles={settings.shuffles}:weight={settings.rerank_weight:g}:seed={settings.seed}"
            f":words={settings.passage_words}"
        )

    def rank(self, request: CandidateList) -> Steps:
        s = self.settings
        first_stage = None
        if s.rerank_weight < 1:
            first_stage = _scaled(first_stage_scores(request, f"rerank_weight is {s.rerank_weight:g}"))
        source = random.Random(f"{s.seed}:{request.query.query_id}")
        groups = [
            group
            for _ in range(s.shuffles)
            for group in split(source.sample(range(len(request)), len(request)), s.group_size)
        ]
        results = yield group_calls(self.template, request, groups, s.passage_words, s.max_tokens)
        graded = read_groups(self.template, request, groups, results, [(0.0, _HIGHEST)])
        values = [sum(row[0] for row in rows) / len(rows) / _HIGHEST if rows else UNGRADED for rows in graded.rows]
        if first_stage is not None:
            w = s.rerank_weight
            values = [v if v is UNGRADED else w * v + (1 - w) * f for v, f in zip(values, first_stage, strict=True)]
        return graded.scores(request, values)


def split(members: Sequence[int], size: int) -> list[list[int]]:
    """⌈N / size⌉ groups of neighbours whose sizes differ by one at most."""
    count = -(-len(members) // size)
    return [list(members[i * len(members) // count : (i + 1) * len(members) // count]) for i in range(count)]


def group_calls(
    template: Template,
    request: CandidateList,
    groups: Sequence[Sequence[int]],
    passage_words: int,
    max_tokens: int,
    criteria: str = "",
) -> list[Generate]:
    """One call a group of candidate indices."""
    prompts = [prompt_over(template, request, group, passage_words, criteria) for group in groups]
    return [Generate(prompt=prompt, max_tokens=max_tokens) for prompt in prompts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """Each candidate's rows of grades, one from every group that graded it; each group's reasoning; and defects."""

    rows: list[list[tuple[float, ...]]]
    rationales: tuple[str, ...] | None
    defects: tuple[Defect, ...]

    def scores(self, request: CandidateList, values: Sequence[Value]) -> Scores:
        """What the grades came to, candidate by candidate, beside the reasoning and the defects of the answers."""
        scored = scores_from(request, values)
        defects = (*self.defects, *scored.defects)
        return replace(scored, rationales=self.rationales, rationales_are_of_calls=True, defects=defects)


def read_groups(
    template: Template,
    request: CandidateList,
    groups: Sequence[Sequence[int]],
    results: Sequence[Result],
    bounds: Sequence[tuple[float, float]],
) -> Graded:
    """Read the answers to `group_calls`."""
    rows: list[list[tuple[float, ...]]] = [[] for _ in request.candidates]
    rationales: list[str] = []
    defects: list[Defect] = []
    for number, (group, result) in enumerate(zip(groups, results, strict=True), 1):
        if not isinstance(result, Answer):
            defects.append(Defect(kind=DefectKind.UNSCORED, detail=f"group {number}: {result.reason}"))
            continue
        text = template.prefill + result.value
        rationales.append(split_reasoning(text)[0])
        parsed = parse_score_rows(text, template.identifiers(len(group)), bounds, cut_off=result.cut_off)
        defects += [Defect(kind=d.kind, detail=f"group {number}: {d.detail}") for d in parsed.defects]
        for index, row in zip(group, parsed.rows, strict=True):
            if row is not None:
                rows[index].append(row)
    return Graded(rows=rows, rationales=tuple(rationales) if any(rationales) else None, defects=tuple(defects))


def _scaled(scores: Sequence[float]) -> list[float]:
    """Min-max to 0 … 1; equal scores are all ½."""
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    return [(s - low) / (high - low) if high > low else 0.5 for s in scores]
