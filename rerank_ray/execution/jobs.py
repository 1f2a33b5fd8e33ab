"""The jobs: label, rerank, combine, synthesize, distil, reinforce …, each from settings to a finished run folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from rerank_ray import storage
from rerank_ray.accounting import Counts, count_output, passed_bounds
from rerank_ray.combine import combine
from rerank_ray.distill.parallel import check_installed
from rerank_ray.distill.targets import check_objective
from rerank_ray.distill.train import check_student, open_label_set, with_inputs
from rerank_ray.errors import InputError, RunError
from rerank_ray.formats.trec import write_run
from rerank_ray.label_store import prepare
from rerank_ray.models.resolve import resolve
from rerank_ray.planning import compare
from rerank_ray.ranking.rankers import preflight
from rerank_ray.records import CandidateList
from rerank_ray.runs import RunFolder, resolve_input
from rerank_ray.schema import (
    CANDIDATES,
    LABELS,
    PASSAGES,
    RANKINGS,
    WRITTEN_QUERIES,
    inspect_input,
    ranking_from_row,
    read_candidates,
    read_rows,
    read_scored,
    write_candidates,
    write_rows,
)
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.jobs import CombineSettings, LabelSettings, LimitSettings, RerankSettings
from rerank_ray.settings.rationale import RationaleSettings
from rerank_ray.settings.reinforce import ReinforceSettings
from rerank_ray.settings.synthesize import SynthesizeSettings
from rerank_ray.synthesize import LEFT_OUT, draw_passages, finds_back, retrieve, usable_queries


def label(settings: LabelSettings, run_uri: str, console: Console, *, retry_errors: bool = False) -> RunFolder:
    """Score candidate lists with a teacher: the run's `data/` holds the labels."""
    return _rank_job("label", settings, run_uri, console, retry_errors)


def rerank(settings: RerankSettings, run_uri: str, console: Console, *, retry_errors: bool = False) -> RunFolder:
    """Rank candidate lists: the run's `data/` holds the rankings, `run.trec` the same as a TREC run."""
    return _rank_job("rerank", settings, run_uri, console, retry_errors)


def _rank_job(
    kind: str, settings: LabelSettings | RerankSettings, run_uri: str, console: Console, retry_errors: bool
) -> RunFolder:
    from rerank_ray.execution.data import rank_rows

    ranker = settings.teacher if isinstance(settings, LabelSettings) else settings.ranker
    source_uri = resolve_input(settings.input)
    source = inspect_input(source_uri, CANDIDATES)
    preflight(ranker)
    if settings.store is not None:
        prepare(settings.store)
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start(kind, settings, {settings.input: source.fingerprint})
        if before.get("state") == "done" and not retry_errors:
            console.print(f"{run_uri}: already done, {before['counts']['rows']} rows")
            return run
        run.update(state="running")
        output = "labels" if kind == "label" else "rankings"
        counts, timings = rank_rows(
            run,
            source_uri,
            source,
            ranker,
            output,
            settings.execution,
            retry_errors=retry_errors,
            store=settings.store,
        )
        _print_counts(console, run, counts, timings)
        _compare_with_plan(run, settings, source.fingerprint, timings, console)
        _finish(run, counts, settings.limits, timings)
        if isinstance(settings, RerankSettings) and settings.trec_run:
            write_run(
                (ranking_from_row(r) for r in _ranked_rows(run)), run.path("run.trec"), tag=run_uri.rsplit("/", 1)[-1]
            )
    return run


def _compare_with_plan(
    run: RunFolder, settings: LabelSettings | RerankSettings, fingerprint: str, timings: dict, console: Console
) -> None:
    """Where `rerank-ray plan` left a forecast, set what this start took beside it."""
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
    return (row for row in read_rows(run.data, RANKINGS.names) if row["error"] is None)


def _finish(run: RunFolder, counts: Counts, limits: LimitSettings, timings: dict) -> None:
    """Record the totals; a run past its bounds is failed, with its output kept."""
    over = passed_bounds(counts, limits)
    run.update(state="failed" if over else "done", counts=counts.to_dict(), rates=counts.rates(), timings=timings)
    if over:
        examples = "".join(f"\n  {e}" for e in counts.examples[:5])
        raise RunError(
            f"{run.uri}: {'; '.join(over)}. The output is kept in {run.data}; raise the bound to accept it, or mend "
            f"the cause and use --retry-errors.{examples}"
        )


def _print_counts(console: Console, run: RunFolder, counts: Counts, timings: dict) -> None:
    table = Table(title=run.uri, show_header=False)
    usage = counts.usage
    rows = {
        "rows": f"{counts.rows:,} = {counts.ok:,} ok + {counts.errors:,} with error",
        "pairs scored": f"{counts.pairs:,}",
        "rows with defects": _defects_line(counts),
        "model calls": f"{usage['calls']:,}",
        "prompt tokens": f"{usage['prompt_tokens']:,}, {usage['cached_tokens']:,} of them cached",
        "output tokens": f"{usage['output_tokens']:,}",
        "label store": _store_line(timings.get("label_store")),
        "seconds of this start": f"{timings['seconds_of_last_start']:,.1f}",
        "output": run.data,
    }
    for name, value in rows.items():
        if value and (usage["calls"] or not name.endswith(("calls", "tokens"))):
            table.add_row(name, value)
    console.print(table)


def _store_line(store: dict | None) -> str:
    """What this start asked of the label store; empty without one."""
    if not store:
        return ""
    calls = store["hits"] + store["misses"]
    faults = [f"{store[name]:,} {name.replace('_', ' ')}" for name in ("corrupt_segments", "failed_writes")]
    rate = f" ({store['hit_rate']:.1%})" if calls else ""
    return ", ".join([f"{store['hits']:,} of {calls:,} calls{rate}", *(f for f in faults if not f.startswith("0 "))])


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
        _finish(run, counts, LimitSettings(max_error_rate=1.0, max_defect_rate=1.0), timings)
    return run


def synthesize(settings: SynthesizeSettings, run_uri: str, console: Console) -> RunFolder:
    """Write queries for passages of a collection: the run's `data/` holds those that find back, with candidates.

    The models' work, in `written/` and `round_trip/`, is kept row by row; `passages/`, `retrieved/` and `data/` follow
    from it and are made anew by a start that finds the run unfinished.
    """
    preflight(settings.writer)
    if settings.round_trip is not None:
        preflight(settings.round_trip.ranker)
    if settings.store is not None:
        prepare(settings.store)
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start("synthesize", settings, {settings.corpus: _digest(settings.corpus)})
        if before.get("state") == "done":
            console.print(f"{run_uri}: already done, {before['counts']['rows']} rows")
            return run
        started = time.monotonic()
        written, counts = _write_queries(settings, run)
        left_out: Counter[str] = Counter(dict.fromkeys(LEFT_OUT, 0))
        rows = read_rows(written.data, WRITTEN_QUERIES.names)
        queries = list(usable_queries(rows, settings.max_copied_words, left_out))
        retrieved = storage.absolute(run.path("retrieved"))
        storage.delete_directory(retrieved)
        found = write_candidates(retrieve(queries, settings, left_out), retrieved)
        if found and settings.round_trip is not None:
            kept = _found_back(settings, run, retrieved, console, left_out)
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


def _digest(path: str) -> str:
    try:
        return storage.digest(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: can't be read ({str(error).splitlines()[0]}): give a TSV or JSONL file") from error


def _write_queries(settings: SynthesizeSettings, run: RunFolder) -> tuple[RunFolder, Counts]:
    """The writer's finished run over the drawn passages, and its totals."""
    from rerank_ray.execution.data import rank_rows

    passages, written = run.path("passages"), RunFolder(uri=run.path("written"))
    if not written.state():
        storage.delete_directory(passages)
        write_rows(draw_passages(settings), passages, PASSAGES)
    source = inspect_input(passages, PASSAGES)
    before = written.start("write_queries", settings, {"passages": source.fingerprint})
    if before.get("state") == "done":
        return written, count_output(written.data, source.rows)
    counts, timings = rank_rows(
        written,
        passages,
        source,
        settings.writer,
        "queries",
        settings.execution,
        retry_errors=False,
        store=settings.store,
    )
    _finish(written, counts, settings.limits, timings)
    return written, counts


def _found_back(
    settings: SynthesizeSettings, run: RunFolder, retrieved: str, console: Console, left_out: Counter[str]
) -> Iterator[CandidateList]:
    """The candidate lists in which the round trip's ranker finds the passage again, in their order."""
    job = LabelSettings(
        input=retrieved,
        teacher=settings.round_trip.ranker,
        execution=settings.execution,
        limits=settings.limits,
        store=settings.store,
    )
    labels = label(job, run.path("round_trip"), console)
    kept: set[str] = set()
    for row in read_scored(labels.data):
        if row["error"] is not None:
            left_out["not_ranked"] += 1
        elif finds_back(row["scores"], [c["label"] for c in row["candidates"]], settings.round_trip.top):
            kept.add(row["query_id"])
        else:
            left_out["not_found_by_round_trip"] += 1
    return (c for c in read_candidates(retrieved) if c.query.query_id in kept)


def distill(settings: DistillSettings, run_uri: str, console: Console) -> RunFolder:
    """Train a student: the run's `student/` holds the best step's."""
    from rerank_ray.execution.train import train_student, with_absolute_paths

    settings = with_inputs(settings, resolve_input)
    absolute = with_absolute_paths(settings)
    labels = open_label_set(absolute)
    inputs = {"labels": labels.fingerprint}
    if labels.texts:
        inputs["texts"] = labels.texts.fingerprint
    check_objective(labels, settings.objective)
    check_installed(settings.execution)
    check_student(absolute.student)
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start("distill", settings, inputs, settings.execution.fixed)
        if before.get("state") == "done":
            console.print(f"{run_uri}: already done, student at {run.student}")
            return run
        started = time.monotonic()
        metrics = train_student(run, absolute, labels)
        counts = {
            "training_queries": len(labels.train),
            "validation_queries": len(labels.validation),
            "queries_without_labels": labels.unlabelled,
            "queries_without_scores": labels.unscored,
        }
        timings = {"seconds_of_last_start": round(time.monotonic() - started, 2)}
        run.update(state="done", counts=counts, timings=timings, best=metrics)
    best = f"step {metrics['step']}, validation nDCG@10 {metrics['validation_ndcg@10']:.4f}"
    console.print(f"{run_uri}: student at {run.student} ({best}, {timings['seconds_of_last_start']:,.0f} s)")
    return run


def reinforce(settings: ReinforceSettings, run_uri: str, console: Console) -> RunFolder:
    """Train a language model on ranking rewards: the run's `student/` holds the best step's."""
    from rerank_ray.distill.grpo import open_labels
    from rerank_ray.distill.tasks import make_task
    from rerank_ray.execution.policy import with_absolute_paths

    settings = settings.model_copy(update={"input": [resolve_input(uri) for uri in settings.input]})
    make_task(settings.reward)
    absolute = with_absolute_paths(settings)
    labels = open_labels(absolute)
    counts = {"training_queries": len(labels.train), "validation_queries": len(labels.validation)}
    return _train_policy(
        "reinforce", settings, absolute, labels, {"labels": labels.fingerprint}, counts, run_uri, console
    )


def distill_rationales(settings: RationaleSettings, run_uri: str, console: Console) -> RunFolder:
    """Train a language model on what teachers wrote: the run's `student/` holds the best step's."""
    from rerank_ray.distill.rationale import open_terms, term_names
    from rerank_ray.execution.policy import with_absolute_paths

    terms = [t.model_copy(update={"input": [resolve_input(uri) for uri in t.input]}) for t in settings.terms]
    settings = settings.model_copy(update={"terms": tuple(terms)})
    absolute = with_absolute_paths(settings)
    data = open_terms(absolute)
    named = dict(zip(term_names(settings.terms), data, strict=True))
    fingerprints = {name: labels.fingerprint for name, labels in named.items()}
    counts = {
        name: {"training_queries": len(labels.train), "validation_queries": len(labels.validation)}
        for name, labels in named.items()
    }
    return _train_policy("distill-rationales", settings, absolute, data, fingerprints, counts, run_uri, console)


def _train_policy(kind, settings, absolute, data, fingerprints, counts, run_uri: str, console: Console) -> RunFolder:
    """What the jobs that train a language model share; `absolute` are the settings with paths that workers can use."""
    from rerank_ray.execution.policy import train_policy

    resolve(settings.policy.model_settings())
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start(kind, settings, fingerprints)
        if before.get("state") == "done":
            console.print(f"{run_uri}: already done, model at {run.student}")
            return run
        started = time.monotonic()
        metrics = train_policy(run, kind, absolute, data)
        timings = {"seconds_of_last_start": round(time.monotonic() - started, 2)}
        run.update(state="done", counts=counts, timings=timings, best=metrics)
    console.print(
        f"{run_uri}: model at {run.student} (step {metrics['step']}, {timings['seconds_of_last_start']:,.0f} s)"
    )
    return run
