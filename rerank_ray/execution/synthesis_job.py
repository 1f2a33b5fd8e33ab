"""The job that writes queries: from settings to a finished run folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
from rich.console import Console

from rerank_ray import storage
from rerank_ray.accounting import Counts, count_output
from rerank_ray.errors import InputError, RunError
from rerank_ray.execution.data import RowJob, rank_rows
from rerank_ray.execution.jobs import finish, label
from rerank_ray.label_store import prepare
from rerank_ray.parquet import inspect_input, read_candidates, read_rows, read_scored, write_candidates, write_rows
from rerank_ray.ranking.rankers import preflight
from rerank_ray.records import CandidateList
from rerank_ray.retrieval.collection import holds_candidates
from rerank_ray.runs import RunFolder, check_ray_reads_below, resolve_input
from rerank_ray.schema import CANDIDATES, PASSAGES, WRITTEN_QUERIES
from rerank_ray.settings.jobs import LabelSettings
from rerank_ray.settings.synthesize import SynthesizeSettings
from rerank_ray.synthesize import LEFT_OUT, draw_passages, finds_back, retrieve, usable_queries


def synthesize(
    settings: SynthesizeSettings, run_uri: str, console: Console, *, retry_errors: bool = False
) -> RunFolder:
    """Write queries for passages of a collection: the run's `data/` holds those that find back, with candidates.

    The models' work, in `written/` and `round_trip/`, is kept row by row; `passages/`, `retrieved/` and `data/` follow
    from it and are made anew by a start that finds the run unfinished. `retry_errors` does the failed rows again of
    that one of the two that failed.
    """
    check_ray_reads_below(run_uri)
    corpus = resolve_input(settings.corpus)
    inputs = preflight(settings.writer) | {settings.corpus: _digest(corpus)}
    if settings.round_trip is not None:
        inputs |= preflight(settings.round_trip.ranker)
    if settings.store is not None:
        prepare(settings.store)
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start("synthesize", settings, inputs)
        if before.get("state") == "done":
            console.print(f"{run_uri}: already done, {before['counts']['rows']} rows")
            return run
        started = time.monotonic()
        settings = settings.model_copy(update={"corpus": corpus})
        written, counts = _write_queries(settings, run, retry_errors)
        left_out: Counter[str] = Counter(dict.fromkeys(LEFT_OUT, 0))
        rows = read_rows(written.data, WRITTEN_QUERIES.names)
        queries = list(usable_queries(rows, settings.max_copied_words, left_out))
        retrieved = storage.absolute(run.path("retrieved"))
        storage.delete_directory(retrieved)
        found = write_candidates(retrieve(queries, settings, left_out), retrieved)
        if found and settings.round_trip is not None:
            kept = _found_back(settings, run, retrieved, console, left_out, retry_errors)
        else:
            kept = read_candidates(retrieved)
        storage.delete_directory(run.data)
        total = write_candidates(kept, run.data)
        run.update(
            state="done" if total else "failed",
            counts={"rows": total, "queries": counts.rows, "left_out": dict(left_out), "defects": counts.defects},
            rates={"kept": total / counts.rows},
            usage=counts.usage,
            timings={"seconds_of_last_start": round(time.monotonic() - started, 2)},
        )
    reasons = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in left_out.items() if count]
    share = f"{total:,} of {counts.rows:,} queries kept ({total / counts.rows:.1%})"
    console.print(f"{run_uri}: {'; '.join([share, *reasons])}", highlight=False)
    if not total:
        raise RunError(f"{run_uri}: no query is left: look at {written.data}, and try another prompt or model")
    return run


def _digest(corpus: str) -> str:
    if holds_candidates(corpus):
        return inspect_input(corpus, CANDIDATES).fingerprint
    try:
        return storage.digest(corpus)
    except (OSError, pa.ArrowException) as error:
        message = f"{corpus}: can't be read ({str(error).splitlines()[0]}): give a TSV or JSONL file, or candidates"
        raise InputError(message) from error


def _write_queries(settings: SynthesizeSettings, run: RunFolder, retry_errors: bool) -> tuple[RunFolder, Counts]:
    """The writer's finished run over the drawn passages, and its totals."""
    passages, written = run.path("passages"), RunFolder(uri=run.path("written"))
    if not written.state():
        storage.delete_directory(passages)
        write_rows(draw_passages(settings), passages, PASSAGES)
    source = inspect_input(passages, PASSAGES)
    before = written.start("write_queries", settings, {"passages": source.fingerprint})
    if before.get("state") == "done":
        return written, count_output(written.data, source.rows)
    job = RowJob(
        run=written,
        source_uri=passages,
        source=source,
        ranker=settings.writer,
        output="queries",
        execution=settings.execution,
        store=settings.store,
    )
    counts, timings = rank_rows(job, retry_errors=retry_errors and before.get("state") == "failed")
    finish(written, counts, settings.limits, timings)
    return written, counts


def _found_back(
    settings: SynthesizeSettings,
    run: RunFolder,
    retrieved: str,
    console: Console,
    left_out: Counter[str],
    retry_errors: bool,
) -> Iterator[CandidateList]:
    """The candidate lists in which the round trip's ranker finds the passage again, in their order."""
    job = LabelSettings(
        input=retrieved,
        teacher=settings.round_trip.ranker,
        execution=settings.execution,
        limits=settings.limits,
        store=settings.store,
    )
    round_trip = run.path("round_trip")
    failed = RunFolder(uri=round_trip).state().get("state") == "failed"
    labels = label(job, round_trip, console, retry_errors=retry_errors and failed)
    kept: set[str] = set()
    for row in read_scored(labels.data):
        if row["error"] is not None:
            left_out["not_ranked"] += 1
        elif finds_back(row["scores"], [c["label"] for c in row["candidates"]], settings.round_trip.top):
            kept.add(row["query_id"])
        else:
            left_out["not_found_by_round_trip"] += 1
    return (c for c in read_candidates(retrieved) if c.query.query_id in kept)
