"""Passages as prompts over a list show them."""

from __future__ import annotations

import re

from rerank_ray.records import Candidate, CandidateList

_IDENTIFIER = re.compile(r"\[(\w{1,3})\]")


def shown_passages(request: CandidateList, words: int) -> list[str]:
    """Each candidate's first words, on one line; what looks like an identifier in brackets gets parentheses."""
    return [shown_passage(c, words) for c in request.candidates]


def shown_passage(candidate: Candidate, words: int) -> str:
    return _IDENTIFIER.sub(r"(\1)", " ".join(candidate.contents.split()[:words]))
