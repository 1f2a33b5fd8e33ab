"""An ensemble of teachers: several label runs over the same candidates become one, with their disagreement.

Rows are matched by query id, so many of the first run at a time, whose texts are read once: memory holds the other
runs' scores of these queries and one row group of texts, whatever the size of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from rerank_ray.errors import InputError
from rerank_ray.parquet import InputSummary, read_rows, read_scored, write_rows
from rerank_ray.ranking.fusion import fuse
from rerank_ray.records import Usage
from rerank_ray.schema import CANDIDATES, LABELS, label_columns
from rerank_ray.settings.jobs import CombineSettings

_QUERIES_AT_A_TIME = 100_000


def combine(settings: CombineSettings, sources: Sequence[str], summaries: Sequence[InputSummary], out: str) -> int:
    """Write the ensemble of label Parquet `sources`, which were inspected, to `out`; returns the number of rows.

    A query that any run failed on is a row with `error`: an average over fewer teachers would be another teacher.

    Raises:
        InputError: the runs do not hold the same queries.
    """
    for uri, summary in zip(sources[1:], summaries[1:], strict=True):
        if not np.array_equal(summary.id_hashes, summaries[0].id_hashes):
            shared = len(np.intersect1d(summary.id_hashes, summaries[0].id_hashes))
            raise InputError(
                f"{uri}: has {summary.rows} queries, {sources[0]} has {summaries[0].rows}, and they share {shared}: "
                "teachers are combined over the same candidates"
            )
    weights = settings.weights or [1.0] * len(sources)
    return write_rows(_rows(settings, sources, weights), out, LABELS)


def _rows(settings: CombineSettings, sources: Sequence[str], weights: Sequence[float]) -> Iterator[dict]:
    ids = (row["query_id"] for row in read_rows(sources[0], ["query_id"]))
    rows = read_rows(sources[0], LABELS.names)
    while queries := frozenset(islice(ids, _QUERIES_AT_A_TIME)):
        others = [{row["query_id"]: _entry(row) for row in read_scored(uri, queries)} for uri in sources[1:]]
        for row in islice(rows, len(queries)):
            entries = [_entry(row), *(other[row["query_id"]] for other in others)]
            yield {name: row[name] for name in CANDIDATES.names} | _combined(settings, entries, weights)


def _entry(row: dict) -> dict:
    """Teacher, doc ids, scores and error, without texts."""
    # What is no candidate is its row's error.
    doc_ids = [c["doc_id"] for c in row["candidates"] or [] if c]
    return {"teacher": row["teacher"], "doc_ids": doc_ids, "scores": row["scores"], "error": row["error"]}


def _combined(settings: CombineSettings, entries: Sequence[dict], weights: Sequence[float]) -> dict:
    teacher = f"combine:{settings.method}:" + "+".join(
        f"{w:g}*({e['teacher']})" for e, w in zip(entries, weights, strict=True)
    )
    failed = next((e for e in entries if e["error"] is not None), None)
    if failed is not None:
        return label_columns(teacher, None, error=f"{failed['teacher']}: {failed['error']}")
    doc_ids = entries[0]["doc_ids"]
    aligned = []
    for entry in entries:
        position = {doc_id: i for i, doc_id in enumerate(entry["doc_ids"])}
        if set(position) != set(doc_ids):
            return label_columns(teacher, None, error=f"{entry['teacher']} labelled other candidates of this query")
        if (given := len(entry["scores"] or ())) != len(doc_ids):
            error = f"{entry['teacher']}: 'scores' has {given} entries for {len(doc_ids)} candidates"
            return label_columns(teacher, None, error=error)
        scores = [entry["scores"][position[d]] for d in doc_ids]
        aligned.append([math.nan if s is None else s for s in scores])
    return label_columns(teacher, fuse(np.array(aligned), settings.method, weights, doc_ids), Usage())
