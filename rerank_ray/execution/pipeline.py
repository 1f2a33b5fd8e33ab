"""A pipeline: jobs one after another in one Ray session, each in its own run folder, finished ones skipped."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from rich.console import Console

from rerank_ray import storage
from rerank_ray.config import Settings
from rerank_ray.evaluate import EvaluationReport, evaluate_sources, print_report
from rerank_ray.execution import jobs
from rerank_ray.execution.cluster import session
from rerank_ray.execution.pipeline_checks import check_steps, source_paths
from rerank_ray.execution.synthesis_job import synthesize
from rerank_ray.formats import beir
from rerank_ray.ingest import IngestSummary, ingest_beir, ingest_hits, ingest_merge, ingest_trec
from rerank_ray.ingest_labels import LIST_READERS, ingest_lists, ingest_rank_distillm, ingest_triples
from rerank_ray.runs import RunFolder, resolve_input
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.jobs import EvaluateSettings
from rerank_ray.settings.pipeline import STEP_SCHEME, BeirIngestSettings, IngestSettings, PipelineSettings, StepSettings
from rerank_ray.settings.resources import Needs


def run_pipeline(
    settings: PipelineSettings, run_uri: str, console: Console, *, retry_errors: bool = False
) -> dict[str, Any]:
    """Run every step that is not finished; returns what each step's job returned, by step name.

    A step that fails ends the pipeline; started again it goes on there, with `retry_errors` by doing the rows that
    failed once more.

    Raises:
        ConfigError: steps name files, models or templates that are not there; it is found before the first step starts.
    """
    results = {}
    folders = {step.name: storage.join(run_uri, step.name) for step in settings.steps}
    left = [step for step in settings.steps if _state(folders[step.name]) != "done"]
    check_steps(left, run_uri)
    needs = _needs(left)
    with nullcontext() if needs is None else session(needs):
        for number, step in enumerate(settings.steps, start=1):
            console.rule(f"{number}/{len(settings.steps)} {step.name} ({step.job})", align="left")
            job_settings = _with_references(getattr(step, step.job), run_uri)
            folder = folders[step.name]
            again = {"retry_errors": True} if retry_errors and _may_retry(step, folder) else {}
            results[step.name] = _JOBS[step.job](job_settings, folder, console, **again)
    return results


def _state(folder: str) -> str | None:
    return RunFolder(uri=folder).state().get("state")


def _may_retry(step: StepSettings, folder: str) -> bool:
    """Not a step that is done: those after it have read its output. A synthesis knows of its own two runs."""
    return step.job == "synthesize" or (step.job in ("label", "rerank") and _state(folder) == "failed")


def _needs(steps: Sequence[StepSettings]) -> Needs | None:
    """The most that any step needs; None where none of them takes Ray."""
    settings = [getattr(step, step.job) for step in steps]
    of_steps = [s.execution.needs for s in settings if hasattr(s, "execution")]
    return Needs.largest(of_steps) if of_steps else None


def _with_references(settings: Settings, run_uri: str) -> Settings:
    """Replace each `step://NAME/rest` by the path of that step's run folder."""

    def replaced(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(STEP_SCHEME):
            return storage.join(run_uri, value.removeprefix(STEP_SCHEME))
        if isinstance(value, dict):
            return {k: replaced(v) for k, v in value.items()}
        if isinstance(value, list):
            return [replaced(v) for v in value]
        return value

    return type(settings).model_validate(replaced(settings.model_dump(mode="json")))


def ingest(settings: IngestSettings, run_uri: str, console: Console) -> RunFolder:
    """Outside data to candidates, as a run folder."""
    run = RunFolder(uri=run_uri)
    with run.locked():
        before = run.start("ingest", settings, _source_digests(settings))
        if before.get("state") == "done":
            console.print(f"{run_uri}: already done, {before['counts']['rows']} rows")
            return run
        started = time.monotonic()
        summary = INGESTS[settings.kind](**settings.model_dump(exclude={"kind"}), out=run.data, overwrite=True)
        counts = {"rows": summary.rows, "candidates": summary.candidates, "labelled_pairs": summary.labelled_pairs}
        timings = {"seconds_of_last_start": round(time.monotonic() - started, 2)}
        run.update(state="done", counts=counts, timings=timings)
        print_ingest(summary, console)
    return run


INGESTS = {
    "beir": ingest_beir,
    "hits": ingest_hits,
    "trec": ingest_trec,
    "merge": ingest_merge,
    "triples": ingest_triples,
    "rank-distillm": ingest_rank_distillm,
    **{kind: partial(ingest_lists, kind) for kind in LIST_READERS},
}


def print_ingest(summary: IngestSummary, console: Console) -> None:
    """One line of counts, then what was left out."""
    console.print(
        f"{summary.out}: {summary.rows:,} queries, {summary.candidates:,} candidates, "
        f"{summary.labelled_pairs:,} with a known gain"
    )
    if summary.queries_without_candidates:
        missing = summary.queries_without_candidates
        console.print(f"  {len(missing)} queries found nothing and have no row: {', '.join(missing[:10])}")
    if summary.bad_lines:
        console.print(f"  {summary.bad_lines} bad lines skipped:")
        for line in summary.bad_lines_listed[:10]:
            console.print(f"    {line}")


def _source_digests(settings: IngestSettings) -> dict[str, str]:
    """Of what an ingest reads and what is still there, by path: a collection that has changed must not be taken for the
    one already ingested."""
    if isinstance(settings, BeirIngestSettings):
        paths = [beir.look_for(settings.folder, name) for name in beir.file_names(settings.split)]
    else:
        paths = filter(storage.exists, source_paths(settings))
    return {p: _digest(p) for p in paths if p}


def _digest(path: str) -> str:
    """Of a folder only its rows: the rest of a run changes whenever it is looked at again, and an ingest's lock
    whenever somebody tries to write there."""
    return storage.digest(resolve_input(path), ".parquet") if storage.is_directory(path) else storage.digest(path)


def evaluate(settings: EvaluateSettings, run_uri: str, console: Console) -> EvaluationReport:
    """Rankings against qrels: a table, and `evaluation.json` and `per_query.tsv` in the run folder."""
    report = evaluate_sources(settings.rankings, qrels=settings.qrels, metrics=settings.metrics)
    storage.write_text(storage.join(run_uri, "evaluation.json"), json.dumps(report.to_dict(), indent=1) + "\n")
    storage.write_text(storage.join(run_uri, "per_query.tsv"), report.per_query_tsv())
    print_report(report, console)
    return report


def _distill(settings: DistillSettings, run_uri: str, console: Console) -> RunFolder:
    # Imported when a pipeline has come to it: PyTorch and transformers take as long as a short step.
    from rerank_ray.execution.training_jobs import distill

    return distill(settings, run_uri, console)


_JOBS = {
    "ingest": ingest,
    "synthesize": synthesize,
    "label": jobs.label,
    "combine": jobs.combine_runs,
    "distill": _distill,
    "rerank": jobs.rerank,
    "evaluate": evaluate,
}
