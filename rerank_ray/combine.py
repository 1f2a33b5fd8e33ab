"""An ensemble of teachers: several label runs over the same candidates become one, with their disagreement.

Rows are matched by query id, partition by partition of the ids' hash, so memory holds the scores of one partition and
one row group of texts, whatever the size of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from rerank_ray import storage
from rerank_ray.errors import InputError
from rerank_ray.records import Defect, DefectKind, Scores, Usage
from rerank_ray.schema import (
    CANDIDATES,
    LABELS,
    doc_id_path,
    id_hash,
    inspect_input,
    label_columns,
    open_parquet,
    read_rows,
    write_rows,
)
from rerank_ray.settings.jobs import CombineSettings

_QUERIES_PER_PARTITION = 100_000
_RRF_K = 60


def combine(settings: CombineSettings, sources: Sequence[str], out: str) -> int:
    """Write the ensemble of label Parquet `sources` to `out`; returns the number of rows.

    A query that any run failed on is a row with `error`: an average over fewer teachers would be another teacher.

    Raises:
        InputError: the runs do not hold the same queries.
    """
    summaries = [inspect_input(uri, LABELS) for uri in sources]
    for uri, summary in zip(sources[1:], summaries[1:], strict=True):
        if not np.array_equal(summary.id_hashes, summaries[0].id_hashes):
            shared = len(np.intersect1d(summary.id_hashes, summaries[0].id_hashes))
            raise InputError(
                f"{uri}: has {summary.rows} queries, {sources[0]} has {summaries[0].rows}, and they share {shared}: "
                "teachers are combined over the same candidates"
            )
    partitions = max(1, math.ceil(summaries[0].rows / _QUERIES_PER_PARTITION))
    weights = settings.weights or [1.0] * len(sources)
    return write_rows(_rows(settings, sources, weights, partitions), out, LABELS)


def _rows(
    settings: CombineSettings, sources: Sequence[str], weights: Sequence[float], partitions: int
) -> Iterator[dict]:
    for partition in range(partitions):
        others = [_scores(uri, partition, partitions) for uri in sources[1:]]
        for row in read_rows(sources[0], LABELS.names):
            if id_hash(row["query_id"]) % partitions == partition:
                entries = [_entry(row), *(o[row["query_id"]] for o in others)]
                yield {name: row[name] for name in CANDIDATES.names} | _combined(settings, entries, weights)


def _scores(uri: str, partition: int, partitions: int) -> dict[str, dict]:
    """Query id -> teacher, doc ids, scores and error of one partition, without texts."""
    fs, _ = storage.open_filesystem(uri)
    entries = {}
    for path in storage.list_files(uri, ".parquet"):
        with open_parquet(fs, path) as file:
            columns = ["query_id", "teacher", "scores", "error", doc_id_path(file, path)]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    if id_hash(row["query_id"]) % partitions == partition:
                        entries[row["query_id"]] = _entry(row)
    return entries


def _entry(row: dict) -> dict:
    doc_ids = [c["doc_id"] for c in row["candidates"] or []]
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
        scores = [entry["scores"][position[d]] for d in doc_ids]
        aligned.append([math.nan if s is None else s for s in scores])
    return label_columns(teacher, ensemble(np.array(aligned), settings.method, weights, doc_ids), Usage())


def ensemble(scores: np.ndarray, method: str, weights: Sequence[float], doc_ids: Sequence[str]) -> Scores:
    """Weighted mean of teachers' scores made comparable within the query.

    Args:
        scores: [teachers, candidates]; NaN where a teacher gave none. A candidate is averaged over the teachers that
            scored it, and stays NaN, with a defect, when none did.
        method: zscore (mean 0, population deviation 1), minmax (0..1), rrf (1/(60 + rank), Cormack et al. 2009) or
            borda (share of the scored candidates ranked below).

    Returns:
        The means and, as uncertainty, the weighted population deviation between the teachers.
    """
    comparable = np.stack([_COMPARABLE[method](row) for row in scores])
    weight = np.where(np.isnan(comparable), 0.0, np.asarray(weights, dtype=float)[:, None])
    total = weight.sum(0)
    values = np.where(np.isnan(comparable), 0.0, comparable)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (weight * values).sum(0) / total
        deviation = np.sqrt((weight * (values - mean) ** 2).sum(0) / total)
    defects = tuple(
        Defect(kind=DefectKind.UNSCORED, detail=f"{doc_id}: no teacher scored it")
        for doc_id, t in zip(doc_ids, total, strict=True)
        if t == 0
    )
    return Scores(scores=tuple(mean.tolist()), uncertainty=tuple(deviation.tolist()), defects=defects)


def _zscore(row: np.ndarray) -> np.ndarray:
    if np.isnan(row).all():
        return row
    # The deviation of equal scores need not be 0: their mean is rounded.
    if np.nanmax(row) == np.nanmin(row):
        return np.where(np.isnan(row), row, 0.0)
    return (row - np.nanmean(row)) / np.nanstd(row)


def _minmax(row: np.ndarray) -> np.ndarray:
    if np.isnan(row).all():
        return row
    span = np.nanmax(row) - np.nanmin(row)
    return (row - np.nanmin(row)) / span if span > 0 else np.where(np.isnan(row), row, 0.5)


def _ranks(row: np.ndarray) -> np.ndarray:
    """Ranks from 1, best first; ties share the mean of their ranks, NaN stays."""
    from scipy.stats import rankdata

    return rankdata(-row, method="average", nan_policy="omit")


def _rrf(row: np.ndarray) -> np.ndarray:
    return 1.0 / (_RRF_K + _ranks(row))


def _borda(row: np.ndarray) -> np.ndarray:
    count = np.count_nonzero(~np.isnan(row))
    return (count - _ranks(row)) / max(1, count - 1)


_COMPARABLE = {"zscore": _zscore, "minmax": _minmax, "rrf": _rrf, "borda": _borda}
