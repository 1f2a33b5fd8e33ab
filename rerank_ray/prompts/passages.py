"""Passages as prompts over a list show them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rerank_ray.errors import RowError
from rerank_ray.prompts.render import Template
from rerank_ray.records import Candidate, CandidateList

_IDENTIFIER = re.compile(r"\[(\w{1,3})\]")


def shown_passages(request: CandidateList, words: int) -> list[str]:
    """Each candidate's first words, on one line; what looks like an identifier in brackets gets parentheses."""
    return [shown_passage(c, words) for c in request.candidates]


def shown_passage(candidate: Candidate, words: int) -> str:
    return _IDENTIFIER.sub(r"(\1)", " ".join(candidate.contents.split()[:words]))


def has_what_is_shown(template: Template, request: CandidateList) -> bool:
    """Whether `scores_to_show` has an answer for this list."""
    return not template.shows_scores or all(c.score is not None for c in request.candidates)


def scores_to_show(template: Template, request: CandidateList) -> list[float] | None:
    """First-stage scores for a template that shows them.

    Raises:
        RowError: a candidate has none.
    """
    if not template.shows_scores:
        return None
    return first_stage_scores(request, "the prompt shows first-stage scores")


def scores_of(members: Sequence[int], shown: Sequence[float] | None) -> list[float] | None:
    """Those of `scores_to_show` that belong to these candidates."""
    return None if shown is None else [shown[i] for i in members]


def first_stage_scores(request: CandidateList, why: str) -> list[float]:
    """Raises `RowError`, saying why scores are needed, when a candidate has none."""
    unscored = next((c.doc_id for c in request.candidates if c.score is None), None)
    if unscored is not None:
        raise RowError(f"candidate {unscored!r} has no score, and {why}")
    return [c.score for c in request.candidates]
