"""What training-data formats share: a query with positives and negatives, as labels and back.

A file's own scores are a teacher's, and become `scores`. In a file without any the gains are the labels: `scores` then
repeats them, and `teacher` says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from rerank_ray import storage
from rerank_ray.formats.lines import BadLines, Fault, FirstSeen
from rerank_ray.records import Candidate, CandidateList, Labels, Query

BYTES_PER_PASS = 2 << 30
_GAINS = "gains"
_COMPRESSION = 4


def text_id(text: str) -> str:
    """An id for a text that comes without one: 16 hex digits that depend on the text alone."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class TrainingLists:
    """Makes labels of an ingest's lists, which may come from several files.

    Query ids are unique over all of them, and all lists have a teacher's scores or none has. A query without an id gets
    its text's, with -2, -3, … for further lists of the same text.
    """

    def __init__(self) -> None:
        self._ids = FirstSeen("query id")
        self._lists_of: Counter[str] = Counter()
        self._scored: bool | None = None

    def labels(
        self,
        path: str,
        place: int | str,
        query: Query,
        candidates: Sequence[Candidate],
        scores: Sequence[float] | None,
    ) -> Labels:
        """Check one list and make it labels; a passage given twice alike is one candidate.

        Args:
            place: the line of `path` that the list stands on.
            query: with an empty `query_id` where the file gives none.
            scores: the teacher's, one a candidate; None makes the gains the scores.

        Raises:
            Fault: no passages, a passage with two texts, gains or scores, a query id used before, or scores where other
                lists have none.
        """
        values = [c.label for c in candidates] if scores is None else scores
        kept: dict[str, tuple[Candidate, float]] = {}
        for candidate, value in zip(candidates, values, strict=True):
            if kept.setdefault(candidate.doc_id, (candidate, value)) != (candidate, value):
                shown = f"{candidate.doc_id!r} ({candidate.text[:40]!r})"
                raise Fault(f"passage {shown} is there twice, with other texts, gains or scores", "keep one of the two")
        if not kept:
            raise Fault("the query has no passages", "give it some or leave it out")
        if self._scored not in (None, scores is not None):
            here, before = ("has", "have none") if scores is not None else ("has no", "have some")
            raise Fault(f"the list {here} teacher scores, and earlier ones {before}", "ingest the two kinds apart")
        query = Query(
            query_id=query.query_id or self._unused_id(query.text), text=query.text, instruction=query.instruction
        )
        self._ids.check(query.query_id, f"line {place} of {path}" if isinstance(place, int) else f"{place} of {path}")
        self._lists_of[text_id(query.text)] += 1
        self._scored = scores is not None
        kind = _GAINS if scores is None else "imported"
        return Labels(
            candidate_list=CandidateList(query=query, candidates=tuple(c for c, _ in kept.values())),
            teacher=f"{kind}:{posixpath.basename(path)}",
            scores=tuple(value for _, value in kept.values()),
        )

    def checked(
        self,
        bad: BadLines,
        path: str,
        place: int | str,
        query: Query,
        candidates: Sequence[Candidate],
        scores: Sequence[float] | None,
    ) -> Iterator[Labels]:
        """`labels`, or nothing for a list whose fault is handed to `bad`."""
        try:
            yield self.labels(path, place, query, candidates, scores)
        except Fault as fault:
            bad.report(path, place, fault.reason, fault.fix)

    def _unused_id(self, text: str) -> str:
        earlier = self._lists_of[text_id(text)]
        return f"{text_id(text)}-{earlier + 1}" if earlier else text_id(text)


def repeats_gains(teacher: str) -> bool:
    """Whether labels of this teacher are a file's gains, and no teacher's scores."""
    return teacher.startswith(f"{_GAINS}:")


def passes_over(paths: Sequence[str], bytes_per_pass: int) -> int:
    """How often files are read when each pass gathers about so many bytes of them."""
    return max(1, math.ceil(sum(map(_bytes_of, paths)) / bytes_per_pass))


def _bytes_of(path: str) -> int:
    try:
        fs, inner = storage.open_filesystem(path)
        size = fs.get_file_info(inner).size or 0
    except (OSError, pa.ArrowException):
        # Reading it says why.
        return 0
    return size * _COMPRESSION if storage.without_options(path).endswith((".gz", ".parquet")) else size


def share_of(query: str, passes: int) -> int:
    """The pass, from 0, that gathers a query's lines."""
    return int(text_id(query), 16) % passes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingList:
    """One query's candidates as formats write them: by role, each with the teacher's score where there is one."""

    query: Query
    positives: tuple[tuple[Candidate, float | None], ...]
    negatives: tuple[tuple[Candidate, float | None], ...]


def split(labels: Labels, *, min_gain: float = 1.0, positives: int | None = None) -> TrainingList:
    """Tell positives from negatives.

    Args:
        min_gain: candidates with this gain or a higher one are positives, all others negatives.
        positives: if given, the teacher's first ones are the positives instead, so many of them.
    """
    candidates = labels.candidate_list.candidates
    pairs = list(zip(candidates, labels.scores or [None] * len(candidates), strict=True))
    if positives is None:
        chosen = {c.doc_id for c, _ in pairs if c.label is not None and c.label >= min_gain}
    else:
        # Ties keep the first-stage order, as in rankings.
        chosen = {c.doc_id for c, _ in sorted(pairs, key=lambda pair: -pair[1])[:positives]}
    return TrainingList(
        query=labels.candidate_list.query,
        positives=tuple(pair for pair in pairs if pair[0].doc_id in chosen),
        negatives=tuple(pair for pair in pairs if pair[0].doc_id not in chosen),
    )


def json_line(item: dict) -> str:
    return json.dumps(item, ensure_ascii=False) + "\n"
