"""Scores of another system, read from its run files."""

from __future__ import annotations

import math

from rerank_ray.errors import InputError
from rerank_ray.formats.hits import read_hits
from rerank_ray.formats.lines import BadLines, first_character
from rerank_ray.formats.trec import read_run
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.settings.rankers import ImportedSettings


class Imported:
    """Score = the run's score for the query and document; a query that the run lacks is an error for that row."""

    needs = frozenset()

    def __init__(self, settings: ImportedSettings, backend: None) -> None:
        self.outside = settings.outside
        self.name = f"imported:{'+'.join(settings.run)}:outside={settings.outside}"
        self.run: dict[str, dict[str, float]] = {}
        for path in settings.run:
            for query_id, scores in _read_scores(path).items():
                if query_id in self.run:
                    raise InputError(f"{path}: query {query_id!r} is also in an earlier file of `run`")
                self.run[query_id] = scores

    def rank(self, request: CandidateList) -> Steps:
        yield []
        known = self.run.get(request.query.query_id)
        if known is None:
            raise InputError(f"query {request.query.query_id!r} is not in the imported run")
        missing = [c.doc_id for c in request.candidates if c.doc_id not in known]
        if self.outside == "lowest":
            lowest = min(known.values())
            return Scores(scores=tuple(known.get(c.doc_id, lowest) for c in request.candidates))
        return Scores(
            scores=tuple(known.get(c.doc_id, math.nan) for c in request.candidates),
            defects=tuple(Defect(kind=DefectKind.NOT_IN_RUN, detail=doc_id) for doc_id in missing),
        )


def _read_scores(path: str) -> dict[str, dict[str, float]]:
    """Query id -> document id -> score, from hits (JSON, JSONL) or a TREC run."""
    bad = BadLines()
    if first_character(path) not in ("[", "{"):
        return {query_id: {e.doc_id: e.score for e in entries} for query_id, entries in read_run(path, bad).items()}
    scores: dict[str, dict[str, float]] = {}
    for hits in read_hits(path, bad):
        query_id = hits.query.query_id
        unscored = next((c.doc_id for c in hits.candidates if c.score is None), None)
        if unscored is not None:
            raise InputError(f"{path}: query {query_id!r}: hit {unscored!r} has no score, so it can't be a label")
        scores[query_id] = {c.doc_id: c.score for c in hits.candidates}
    return scores
