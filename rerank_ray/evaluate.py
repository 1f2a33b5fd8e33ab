"""Evaluate rankings from any place they come from: run folders, Parquet files, TREC runs.

Documents' texts are never read: of Parquet files only ids and scores are decoded.
"""

from __future__ import annotations

import csv
import io
import math
import posixpath
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from rerank_ray import storage
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.qrels import read_qrels
from rerank_ray.formats.trec import read_run
from rerank_ray.metrics.evaluation import Metric, SystemResult, evaluate_rankings, parse_metric
from rerank_ray.metrics.significance import Comparison, compare_systems
from rerank_ray.parquet import doc_id_path, open_parquet
from rerank_ray.records import Candidate, CandidateList, Query, Scores, ranking_of
from rerank_ray.report.tables import print_table
from rerank_ray.runs import resolve_ended

DEFAULT_METRICS = ("ndcg@10", "mrr@10", "map", "recall@100")
_ROWS_PER_BATCH = 1024
_NAMED = re.compile(r"([^/\\=:]+)=(.+)")


class SourceKind(StrEnum):
    """Where a ranking comes from, which settles its order."""

    RANKINGS = "rankings"
    """Parquet of the `rankings` schema: doc ids as stored."""
    LABELS = "labels"
    """Parquet of the `labels` schema: candidates by descending teacher score, unscored ones last."""
    CANDIDATES = "candidates"
    """Parquet of the `candidates` schema: first-stage order."""
    RUN_FILE = "run file"
    """TREC run: by its rank column, by scores where ranks repeat within a query."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRankings:
    """The rankings of one source: query id -> doc ids, best first; `errors` holds the queries whose row has `error`.

    A query that is not wanted has no doc ids.
    """

    name: str
    path: str
    kind: SourceKind
    rankings: dict[str, tuple[str, ...]]
    errors: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemReport:
    """One source's result; `rows_with_error` of its queries failed, and score 0 where the qrels name them."""

    path: str
    kind: SourceKind
    rows_with_error: int
    result: SystemResult


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """What `rerank-ray evaluate` found: the systems by name, and every pair of them compared on every metric."""

    qrels: str
    metrics: tuple[Metric, ...]
    systems: dict[str, SystemReport]
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON types, per-query values included."""
        return {
            "qrels": self.qrels,
            "metrics": {m.name: m.definition for m in self.metrics},
            "systems": {
                name: {
                    "path": s.path,
                    "kind": str(s.kind),
                    "means": s.result.means,
                    "counts": _counts(s),
                    "per_query": s.result.per_query,
                }
                for name, s in self.systems.items()
            },
            "significance": [asdict(c) for c in self.comparisons],
        }

    def per_query_tsv(self) -> str:
        """A line for each metric and query of the qrels, tabs between: query_id, metric, and every system's value."""
        values = [system.result.per_query for system in self.systems.values()]
        text = io.StringIO()
        table = csv.writer(text, "excel-tab", lineterminator="\n")
        table.writerow(["query_id", "metric", *self.systems])
        for metric in self.metrics:
            columns = [by_metric[metric.name] for by_metric in values]
            table.writerows([query_id, metric.name, *(c[query_id] for c in columns)] for query_id in columns[0])
        return text.getvalue()


def _counts(system: SystemReport) -> dict[str, int]:
    result = system.result
    return {
        "queries": result.queries,
        "queries_without_ranking": result.queries_without_ranking,
        "rows_with_error": system.rows_with_error,
        "queries_without_relevant": result.queries_without_relevant,
        "rankings_without_qrels": result.rankings_without_qrels,
    }


def evaluate_sources(
    sources: Sequence[str] | Mapping[str, str],
    *,
    qrels: str,
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> EvaluationReport:
    """Evaluate sources (each `PATH` or `NAME=PATH`, or paths by name; see `load_rankings`) against TREC or BEIR qrels.

    Known gains in Parquet (`label`) are not used: they cover only what was retrieved, so recall and the ideal ranking
    would be wrong.

    Raises:
        ConfigError: an unknown metric, or two sources of one name.
        InputError: a file that can't be read, no query of a source in the qrels, or none of its documents judged.
        RunError: a source is a run that has not ended.
    """
    parsed = tuple({m.name: m for m in map(parse_metric, metrics)}.values())
    judgments = read_qrels(qrels, BadLines())
    loaded: dict[str, LoadedRankings] = {}
    named = sources.items() if isinstance(sources, Mapping) else map(_split_name, sources)
    for name, path in named:
        item = load_rankings(path, name, judgments)
        if item.name in loaded:
            raise ConfigError(
                f"{item.path} and {loaded[item.name].path} are both called {item.name!r}: name them, `NAME=PATH`"
            )
        loaded[item.name] = item
    for item in loaded.values():
        _check_overlap(item, judgments, qrels)
    results = evaluate_rankings(judgments, {name: item.rankings for name, item in loaded.items()}, parsed)
    return EvaluationReport(
        qrels=qrels,
        metrics=parsed,
        systems={
            name: SystemReport(path=item.path, kind=item.kind, rows_with_error=len(item.errors), result=results[name])
            for name, item in loaded.items()
        },
        comparisons=tuple(c for m in parsed for c in compare_systems(results, m.name)),
    )


def _check_overlap(item: LoadedRankings, judgments: dict[str, dict[str, float]], qrels: str) -> None:
    ids = [*item.rankings, *item.errors]
    if not any(query_id in judgments for query_id in ids):
        examples = f"it has {ids[0]!r}, they have {next(iter(judgments), None)!r}" if ids else "it has no rows"
        raise InputError(f"{item.path}: none of its queries is in {qrels} ({examples}): these are another set's qrels")
    ranked = {query_id: ids for query_id, ids in item.rankings.items() if ids and judgments.get(query_id)}
    # Where rows have only errors there is no document to know.
    if ranked and all(judgments[query_id].keys().isdisjoint(ids) for query_id, ids in ranked.items()):
        query_id, ids = next(iter(ranked.items()))
        raise InputError(
            f"{item.path}: {qrels} judges none of its documents (query {query_id!r}: it ranks {ids[0]!r}, they judge "
            f"{next(iter(judgments[query_id]))!r}): doc ids are written otherwise, or these are another collection's "
            "qrels"
        )


def print_report(report: EvaluationReport, console: Console) -> None:
    """Print means, the counts that are not zero for every system, and the corrected p-values of each pair."""
    counted = {k for s in report.systems.values() for k, v in _counts(s).items() if v}
    table = {
        name: {**system.result.means, **{k: v for k, v in _counts(system).items() if k in counted}}
        for name, system in report.systems.items()
    }
    print_table(table, console, title=f"Against {report.qrels}")
    if report.comparisons:
        pairs = {
            f"{c.first} − {c.second}, {c.metric}": {
                "difference": f"{c.difference:+.4f}",
                "p randomisation": f"{c.p_randomisation_holm:.4f}",
                "p t-test": f"{c.p_t_holm:.4f}",
            }
            for c in report.comparisons
        }
        print_table(pairs, console, title="Differences, p-values after Holm's correction", head="pair")


# Sources


def load_rankings(path: str, name: str | None = None, wanted: Container[str] | None = None) -> LoadedRankings:
    """Load rankings from a run folder (`run.json` and `data/*.parquet`), a Parquet file or folder, or a TREC run file
    (`.gz` too); they are called by the folder's name, or the file's without its suffix, where no other is given.

    Args:
        wanted: ids of the queries whose doc ids are kept, of Parquet: those of millions don't fit the memory.

    Raises:
        InputError: the path is missing, holds no rankings, or a row breaks the Parquet contract.
        RunError: the run has not ended, so that what is missing would score 0.
    """
    name = name or _own_name(path)
    if not storage.exists(path):
        raise InputError(f"{path}: no such file or folder: give a run folder, a Parquet file or a TREC run")
    is_folder = storage.is_directory(path)
    if not is_folder and not storage.without_options(path).endswith(".parquet"):
        entries = read_run(path, BadLines())
        rankings = {query_id: tuple(e.doc_id for e in run) for query_id, run in entries.items()}
        return LoadedRankings(name=name, path=path, kind=SourceKind.RUN_FILE, rankings=rankings, errors={})
    data = resolve_ended(path) if is_folder else path
    files = storage.list_files(data, ".parquet")
    if not files:
        raise InputError(f"{data}: holds no .parquet file: the run wrote no rows, or is not one that ranks")
    fs, _ = storage.open_filesystem(data)
    rankings, errors, kind = {}, {}, None
    for file_path in files:
        with open_parquet(fs, file_path) as file:
            kind, previous = _kind_of(file, file_path), kind
            if previous not in (None, kind):
                raise InputError(
                    f"{file_path}: follows the '{kind}' schema, its neighbours '{previous}': separate them"
                )
            for row in _rows(file, file_path, kind):
                query_id = row["query_id"]
                if query_id in rankings or query_id in errors:
                    raise InputError(f"{file_path}: query {query_id!r} appears twice: make the ids unique")
                if row.get("error") is not None:
                    errors[query_id] = row["error"]
                else:
                    kept = wanted is None or query_id in wanted
                    rankings[query_id] = _doc_ids(row, kind, file_path) if kept else ()
    return LoadedRankings(name=name, path=path, kind=kind, rankings=rankings, errors=errors)


def _split_name(source: str) -> tuple[str | None, str]:
    """(name, path) of `NAME=PATH`; a local path that has a `=` is a path."""
    named = _NAMED.fullmatch(source)
    if named and ("://" in source or not storage.exists(source)):
        return named[1], named[2]
    return None, source


def _own_name(path: str) -> str:
    stem = posixpath.basename(storage.without_options(path).rstrip("/")).removesuffix(".gz")
    return re.sub(r"\.(parquet|trec|run|txt)$", "", stem) or path


def _kind_of(file: pq.ParquetFile, path: str) -> SourceKind:
    names = set(file.schema_arrow.names)
    if {"query_id", "doc_ids", "error"} <= names:
        return SourceKind.RANKINGS
    if {"query_id", "candidates", "scores", "error"} <= names:
        return SourceKind.LABELS
    if {"query_id", "candidates"} <= names:
        return SourceKind.CANDIDATES
    raise InputError(f"{path}: neither candidates, labels nor rankings: its columns are {', '.join(sorted(names))}")


def _rows(file: pq.ParquetFile, path: str, kind: SourceKind) -> Iterator[dict]:
    """Stream rows with just the leaves that settle the order; of the candidates only their ids."""
    ids = [] if kind is SourceKind.RANKINGS else [doc_id_path(file, path)]
    columns = {
        SourceKind.RANKINGS: ["query_id", "doc_ids", "error"],
        SourceKind.LABELS: ["query_id", *ids, "scores", "error"],
        SourceKind.CANDIDATES: ["query_id", *ids],
    }[kind]
    for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=columns):
        yield from batch.to_pylist()


def _doc_ids(row: dict, kind: SourceKind, path: str) -> tuple[str, ...]:
    where = f"{path}: query {row['query_id']!r}"
    if kind is SourceKind.RANKINGS:
        return tuple(row["doc_ids"] or ())
    candidates = row["candidates"] or ()
    if None in candidates:
        raise InputError(f"{where}: candidate {candidates.index(None)} is null: leave it out")
    ids = tuple(c["doc_id"] for c in candidates)
    if kind is SourceKind.CANDIDATES:
        return ids
    if row["scores"] is None:
        raise InputError(f"{where}: 'scores' is null although 'error' is null")
    if len(row["scores"]) != len(ids):
        raise InputError(f"{where}: 'scores' has {len(row['scores'])} entries for {len(ids)} candidates")
    candidate_list = CandidateList(
        query=Query(query_id=row["query_id"], text=""), candidates=tuple(Candidate(doc_id=d, text="") for d in ids)
    )
    scores = tuple(math.nan if s is None else s for s in row["scores"])
    return ranking_of(candidate_list, Scores(scores=scores), model="").doc_ids
