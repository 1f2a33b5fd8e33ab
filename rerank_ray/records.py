"""The records that flow through every stage, from the first file to the report.

The datum is the candidate list: one query with its candidates. It is never split, joined or grouped,
so each stage is a map from one record to one record.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query: `query_id` is unique in a collection; `instruction` is a task description for models that take one."""

    query_id: str
    text: str
    instruction: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One document of a candidate list: `score` is the first stage's, `label` the known gain (from qrels)."""

    doc_id: str
    text: str
    title: str | None = None
    score: float | None = None
    label: float | None = None

    @property
    def contents(self) -> str:
        """Title and text as a model reads them; a title that already opens the text is not repeated."""
        if not self.title or self.text.startswith(self.title):
            return self.text
        return f"{self.title} {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateList:
    """One query with its candidates in first-stage order: one row of every Parquet file."""

    query: Query
    candidates: tuple[Candidate, ...]

    def __len__(self) -> int:
        return len(self.candidates)


class DefectKind(StrEnum):
    """What can be wrong with one model answer that was repaired or left without a score."""

    UNSCORED = "unscored"
    NOT_IN_RUN = "not_in_run"
    NOT_IN_CORPUS = "not_in_corpus"
    # Of a model's text, by rerank_ray.prompts.parse:
    EMPTY = "empty"
    REFUSAL = "refusal"
    UNPARSED = "unparsed"
    CUT_OFF = "cut_off"
    MISSING = "missing"
    REPEATED = "repeated"
    OUT_OF_RANGE = "out_of_range"
    # Of a comparison between passages: the two orders of a pair do not agree.
    INCONSISTENT = "inconsistent"


PARSE_FAILURES = frozenset({DefectKind.EMPTY, DefectKind.REFUSAL, DefectKind.UNPARSED})
"""Texts that hold no answer at all; the other defects of a text were repaired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One flaw in a teacher's answer, or `count` alike of which `detail` tells the first.

    It is stored as `kind: detail`, or `kind: 7×, first of detail`, so that rates by kind can be counted.
    """

    kind: DefectKind
    detail: str
    count: int = 1

    def __str__(self) -> str:
        several = f"{self.count}×, first of " if self.count > 1 else ""
        return f"{self.kind}: {several}{self.detail}"


def kind_and_count(stored: str) -> tuple[str, int]:
    """The kind of a stored defect, and for how many it stands."""
    kind, _, rest = stored.partition(": ")
    several = re.match(r"([0-9]{1,9})×, first of ", rest)
    return kind, int(several[1]) if several else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer cost: model calls and tokens (`cached_tokens` are prompt tokens that were not computed again)."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model."""
        return self.prompt_tokens - self.cached_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            calls=self.calls + other.calls,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
        )


@dataclass(slots=True, kw_only=True)
class Computed:
    """What a model's batches took so far: sequences' own tokens, and all positions, padding included. Tokens that are
    generated are in neither."""

    tokens: int = 0
    positions: int = 0

    def __add__(self, other: Computed) -> Computed:
        return Computed(tokens=self.tokens + other.tokens, positions=self.positions + other.positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a ranking method returns: one score per candidate (NaN = no score), higher is more relevant."""

    scores: tuple[float, ...]
    uncertainty: tuple[float, ...] | None = None
    rationales: tuple[str, ...] | None = None
    """The teacher's reasoning: one a candidate, or one a call."""
    rationales_are_of_calls: bool = False
    """Their number may be the same."""
    defects: tuple[Defect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """A candidate list with a teacher's scores; None where a file has candidates alone."""

    candidate_list: CandidateList
    teacher: str
    scores: tuple[float, ...] | None
    uncertainty: tuple[float, ...] | None = None
    rationales: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A ranked list: `doc_ids` best first with their `scores`, or the `error` that left the query without one."""

    query_id: str
    doc_ids: tuple[str, ...]
    scores: tuple[float, ...] | None
    model: str
    exit_layer: int | None = None
    """Of a layer-wise student; None where its exits are adaptive, as candidates then leave at several."""
    defects: tuple[str, ...] = ()
    usage: Usage = Usage()
    error: str | None = None


def ranking_of(candidate_list: CandidateList, scores: Scores, model: str) -> Ranking:
    """Order a candidate list by its scores, best first; ties and unscored candidates keep the first-stage order.

    Candidates with a NaN score go below every scored one.
    """
    order = sorted(range(len(scores.scores)), key=lambda i: _descending_nan_last(scores.scores[i]))
    return Ranking(
        query_id=candidate_list.query.query_id,
        doc_ids=tuple(candidate_list.candidates[i].doc_id for i in order),
        scores=tuple(scores.scores[i] for i in order),
        model=model,
    )


def _descending_nan_last(score: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(score) else (False, -score)


def with_gains(candidate_list: CandidateList, gains: dict[str, float]) -> CandidateList:
    """Set each candidate's `label` from one query's qrels (doc id -> gain); unjudged candidates get None."""
    return replace(
        candidate_list,
        candidates=tuple(replace(c, label=gains.get(c.doc_id)) for c in candidate_list.candidates),
    )


def storable(text: str | None) -> str | None:
    """A model's words as files and tokenizers take them: half of a surrogate pair, which JSON can hold, is "?" then."""
    return text and text.encode("utf-8", "replace").decode()
