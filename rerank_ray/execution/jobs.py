"""The jobs that rank: label, rerank, combine, each from settings to a finished run folder.

Nothing here imports PyTorch: the models are the workers' business.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rerank_ray import storage
from rerank_ray.accounting import Counts, count_output, passed_bounds
from rerank_ray.combine import combine
from rerank_ray.errors import RunError
from rerank_ray.formats.trec import check_ids, write_run
from rerank_ray.label_store import prepare
from rerank_ray.parquet import inspect_input, read_rows
from rerank_ray.planning import compare
from rerank_ray.ranking.rankers import preflight
from rerank_ray.runs import RunFolder, check_ray_reads_below, resolve_input
from rerank_ray.schema import CANDIDATES, LABELS, RANKINGS, ranking_from_row
from rerank_ray.settings.jobs import CombineSettings, LabelSettings, LimitSettings, RerankSettings

_TREC_RUN = "run.trec"


def label(settings: LabelSettings, run_uri: str, console: Console, *, retry_errors: bool = False) -> RunFolder:
    """Score candidate lists with a teacher: the run's `data/` holds the labels."""
    return _rank_job("label", settings, run_uri, console, retry_errors)


def rerank(settings: RerankSettings, run_uri: str, console: Console, *, retry_errors: bool = False) -> RunFolder:
    """Rank candidate lists: the run's `data/` holds the rankings, `run.trec` the same as a TREC run."""
    return _rank_job("rerank", settings, run_uri, console, retry_errors)


def _rank_job(
    kind: str, settings: LabelSettings | RerankSettings, run_uri: str, console: Console, retry_errors: bool
) -> RunFolder:
    from rerank_ray.execution.data import RowJob, rank_rows

    ranker = settings.teacher if isinstance(settings, LabelSettings) else settings.ranker
    source_uri = resolve_input(settings.input)
    for uri in (source_uri, run_uri):
        check_ray_reads_below(uri)
    source = inspect_input(source_uri, CANDIDATES)
    inputs = preflight(ranker) | {settings.input: source.fingerprint}
    writes_trec_run = isinstance(settings, RerankSettings) and settings.trec_run
    if writes_trec_run:
        check_ids(source_uri)
    if settings.store is not None:
        prepare(settings.store)
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start(kind, settings, inputs)
        lacks_trec_run = writes_trec_run and not storage.exists(run.path(_TREC_RUN))
        if before.get("state") == "done" and not retry_errors and not lacks_trec_run:
            console.print(f"{run_uri}: already done, {before['counts']['rows']} rows")
            return run
        run.update(state="running")
        job = RowJob(
            run=run,
            source_uri=source_uri,
            source=source,
            ranker=ranker,
            output="labels" if kind == "label" else "rankings",
            execution=settings.execution,
            store=settings.store,
        )
        counts, timings = rank_rows(job, retry_errors=retry_errors)
        _print_counts(console, run, counts, timings)
        _compare_with_plan(run, settings, source.fingerprint, timings, console)
        # Before the run is done, or a kill would leave one without.
        if writes_trec_run:
            write_run(
                (ranking_from_row(r) for r in _ranked_rows(run)), run.path(_TREC_RUN), tag=run_uri.rsplit("/", 1)[-1]
            )
        finish(run, counts, settings.limits, timings)
    return run


def _compare_with_plan(
    run: RunFolder, settings: LabelSettings | RerankSettings, fingerprint: str, timings: dict, console: Console
) -> None:
    """Where `rerank-ray plan` left a forecast, set what this start took beside it, if it had rows left to do."""
    if not timings["rows_this_start"]:
        return
    actual = {
        "calls": timings["calls_this_start"],
        "tokens": timings["tokens_this_start"],
        "replica_seconds": timings["replica_seconds"],
    }
    compared = compare(run, settings, fingerprint, timings["rows_this_start"], actual)
    if compared is not None:
        run.update(plan=compared)
        pairs = [f"{compared['predicted'][name]:,.0f} {name}, was {value:,.0f}" for name, value in actual.items()]
        console.print(f"foreseen: {'; '.join(pairs)}", highlight=False)


def _ranked_rows(run: RunFolder):
    columns = [name for name in RANKINGS.names if name not in ("defects", "usage")]
    return (row for row in read_rows(run.data, columns) if row["error"] is None)


def finish(run: RunFolder, counts: Counts, limits: LimitSettings, timings: dict, again: str | None = None) -> None:
    """Record the totals; a run past its bounds is failed, with its output kept.

    Args:
        again: how rows are done again, where that is not with --retry-errors.
    """
    over = passed_bounds(counts, limits)
    run.update(state="failed" if over else "done", counts=counts.to_dict(), rates=counts.rates(), timings=timings)
    if over:
        examples = "".join(f"\n  {e}" for e in counts.examples[:5])
        # That does rows with an error again, and would leave those with defects as they are.
        again = again or ("use --retry-errors" if counts.errors else "rank anew in another --run folder")
        raise RunError(
            f"{run.uri}: {'; '.join(over)}. The output is kept in {run.data}; raise the bound to accept it, or mend "
            f"the cause and {again}.{examples}"
        )


def _print_counts(console: Console, run: RunFolder, counts: Counts, timings: dict) -> None:
    table = Table(title=Text(run.uri), show_header=False)
    usage = counts.usage
    rows = {
        "rows": f"{counts.rows:,} = {counts.ok:,} ok + {counts.errors:,} with error",
        "pairs scored": f"{counts.pairs:,}",
        "rows with defects": _defects_line(counts),
        "model calls": f"{usage['calls']:,}",
        "prompt tokens": f"{usage['prompt_tokens']:,}, {usage['cached_tokens']:,} of them cached",
        "output tokens": f"{usage['output_tokens']:,}",
        "padding": _padding_line(timings.get("padding_share")),
        "label store": _store_line(timings.get("label_store")),
        "seconds of this start": f"{timings['seconds_of_last_start']:,.1f}",
        "output": run.data,
    }
    for name, value in rows.items():
        if value and (usage["calls"] or not name.endswith(("calls", "tokens"))):
            table.add_row(name, Text(value))
    console.print(table)


def _padding_line(share: float | None) -> str:
    """Of this start's batches; empty where no model ran here."""
    return "" if share is None else f"{share:.1%} of what was computed"


def _store_line(store: dict | None) -> str:
    """What this start asked of the label store; empty without one."""
    if not store:
        return ""
    calls = store["hits"] + store["misses"]
    faults = {
        "corrupt_segments": "corrupt segments",
        "failed_reads": "failed reads",
        "failed_writes": "failed writes",
        "not_stored": "answers not stored: raise store.max_gb",
    }
    told = [f"{store[name]:,} {words}" for name, words in faults.items() if store.get(name)]
    rate = f" ({store['hit_rate']:.1%})" if calls else ""
    return ", ".join([f"{store['hits']:,} of {calls:,} calls{rate}", *told])


def _defects_line(counts: Counts) -> str:
    rates = counts.rates()
    kinds = [
        f"{kind} {count:,} in {rates['defects'][kind]['rows_affected']:.2%} of rows"
        for kind, count in counts.defects.items()
    ]
    if rates["parse_failure"]["per_call"]:
        kinds.append(f"answers that could not be read: {rates['parse_failure']['per_call']:.2%} of model calls")
    return "; ".join([f"{counts.rows_with_defects:,} ({rates['defect']:.2%})", *kinds])


def combine_runs(settings: CombineSettings, run_uri: str, console: Console) -> RunFolder:
    """Combine label runs to one label run."""
    sources = [resolve_input(uri) for uri in settings.inputs]
    summaries = [inspect_input(source, LABELS) for source in sources]
    fingerprints = {uri: s.fingerprint for uri, s in zip(settings.inputs, summaries, strict=True)}
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start("combine", settings, fingerprints)
        if before.get("state") == "done":
            console.print(f"{run_uri}: already done, {before['counts']['rows']} rows")
            return run
        # A combination takes seconds and has no rows worth resuming: an unfinished one is made anew.
        storage.delete_directory(run.data)
        started = time.monotonic()
        combine(settings, sources, summaries, run.data)
        counts = count_output(run.data, summaries[0].rows)
        timings = {"seconds_of_last_start": round(time.monotonic() - started, 2)}
        _print_counts(console, run, counts, timings)
        finish(run, counts, settings.limits, timings, again="combine again")
    return run
