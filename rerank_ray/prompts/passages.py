"""Passages as prompts over a list show them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rerank_ray.errors import RowError
from rerank_ray.models.protocol import Prompt
from rerank_ray.prompts.render import Template
from rerank_ray.records import Candidate, CandidateList

_IDENTIFIER = re.compile(r"\[(\w{1,3})\]")


def prompt_over(
    template: Template, request: CandidateList, members: Sequence[int], words: int | None, criteria: str = ""
) -> Prompt:
    """The prompt over some of a list's candidates, given by index.

    Args:
        words: how many of a candidate's text are shown; None shows it as it is.

    Raises:
        RowError: the template shows first-stage scores, and a candidate of the list has none.
    """
    candidates = [request.candidates[i] for i in members]
    passages = [c.contents if words is None else shown_passage(c, words) for c in candidates]
    scores = None
    if template.shows_scores:
        all_scores = first_stage_scores(request, "the prompt shows first-stage scores")
        scores = [all_scores[i] for i in members]
    return template.list_prompt(request.query, passages, scores, criteria)


def shown_passage(candidate: Candidate, words: int) -> str:
    """A candidate's first words, on one line; what looks like an identifier in brackets gets parentheses."""
    return _IDENTIFIER.sub(r"(\1)", " ".join(candidate.contents.split(maxsplit=words)[:words]))


def has_what_is_shown(template: Template, request: CandidateList) -> bool:
    """Whether every candidate has the first-stage score that the template may show."""
    return not template.shows_scores or all(c.score is not None for c in request.candidates)


def first_stage_scores(request: CandidateList, why: str) -> list[float]:
    """Raises `RowError`, saying why scores are needed, when a candidate has none."""
    unscored = next((c.doc_id for c in request.candidates if c.score is None), None)
    if unscored is not None:
        raise RowError(f"candidate {unscored!r} has no score, and {why}")
    return [c.score for c in request.candidates]
