"""Row jobs on Ray Data: Parquet → a pool of rankers, or of query writers → Parquet, each input row exactly once."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.exceptions import ExecutionTimeoutError

from rerank_ray import storage
from rerank_ray.accounting import (
    Counts,
    committed,
    count_output,
    count_rows,
    delete_uncommitted,
    rebuild_checkpoint,
)
from rerank_ray.errors import LostError, RunError
from rerank_ray.execution.cluster import root_cause, session
from rerank_ray.execution.progress import ProgressDisplay, nothing_done
from rerank_ray.label_store import LabelStore, tidy
from rerank_ray.models import heap
from rerank_ray.parquet import InputSummary
from rerank_ray.quarantine import CrashGuard
from rerank_ray.records import Computed
from rerank_ray.runs import RunFolder
from rerank_ray.schema import CANDIDATES, PASSAGES
from rerank_ray.settings.jobs import ExecutionSettings, StoreSettings
from rerank_ray.settings.rankers import RankerSettings
from rerank_ray.settings.synthesize import QueryWriterSettings
from rerank_ray.shares import Shares, share_out
from rerank_ray.stages import RankStage, WriteStage

Output = Literal["labels", "rankings", "queries"]
_READ_CPUS = _WRITE_CPUS = 0.25
_TELL_EVERY_S = 5.0
_GIVE_BACK_EVERY_S = 300.0
_RETRY = "retry.json"
_FILES_PER_FOOTER_READER = 256
_MOST_FOOTER_READERS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RowJob:
    """What is ranked, or gets a query written for it, by whom, and the run that it goes into."""

    run: RunFolder
    source_uri: str
    source: InputSummary
    ranker: RankerSettings | QueryWriterSettings
    output: Output
    execution: ExecutionSettings
    store: StoreSettings | None = None


class RankWorker:
    """One replica: a ranker behind the crash guard, reporting what it finishes."""

    def __init__(self, job: RowJob, attempts_uri: str, counter: ray.actor.ActorHandle, folder: str) -> None:
        from rerank_ray.models import engine

        execution = job.execution
        if execution.gpus_per_actor:
            engine.require_gpu()
        # Ray starts workers where its daemon was started; relative paths are the user's.
        if os.path.isdir(folder):
            os.chdir(folder)
        engine.set_up_replica(execution.cpus_per_actor, execution.gpus_per_actor)
        self._store = None if job.store is None else LabelStore(job.store)
        self._id = uuid.uuid4().hex
        writes = job.output == "queries"
        stage = partial(WriteStage, job.ranker) if writes else partial(RankStage, job.ranker, job.output)
        self._stage = stage(store=self._store)
        self._guard = CrashGuard(self._stage, attempts_uri, execution.max_crashes_per_row)
        self._counter = counter
        self._gave_back = time.monotonic()
        counter.describe.remote(self._stage.ranker.name, self._stage.ranker.parameters)
        threading.Thread(target=self._tell_what_is_computed, daemon=True).start()

    def __call__(self, table: pa.Table) -> pa.Table:
        before = self._stage.usage
        started = time.time()
        try:
            result = self._guard(table)
        except LostError as error:
            # Only a new replica has a model again, and only this one's end lets the crash guard count the rows.
            print(error, file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)
        if time.monotonic() - self._gave_back > _GIVE_BACK_EVERY_S:
            heap.give_back()
            self._gave_back = time.monotonic()
        ended = time.time()
        usage = self._stage.usage
        self._counter.add.remote(
            rows=result.num_rows,
            pairs=pc.sum(pc.list_value_length(result["scores"])).as_py() or 0,
            calls=usage.calls - before.calls,
            tokens=usage.computed_tokens - before.computed_tokens,
            started=started,
            ended=ended,
        )
        self._counter.computed.remote(self._id, self._stage.ranker.computed)
        if self._store is not None:
            self._counter.store_counts.remote(self._id, asdict(self._store.counts))
        return result

    def _tell_what_is_computed(self) -> None:
        """While a batch goes on, not at its end alone."""
        told = Computed()
        while True:
            time.sleep(_TELL_EVERY_S)
            if (computed := self._stage.ranker.computed) != told:
                self._counter.computed.remote(self._id, computed)
                told = computed


def rank_rows(job: RowJob, *, retry_errors: bool) -> tuple[Counts, dict]:
    """Rank, or write a query for, every row that the run's checkpoint does not hold yet.

    Returns:
        The output's totals and this start's timings.

    Raises:
        RunError: the cluster gave up; what was finished is kept, and starting again goes on from there.
    """
    run = job.run
    _finish_retry(run, retry_errors)
    delete_uncommitted(run.data, run.checkpoint)
    done = _finished_rows(run)
    if done < job.source.rows:
        timings = _rank_rest(job, done)
    else:
        # Nothing is left but to count: the run was stopped there, or its limits were raised.
        timings = run.state().get("timings") or nothing_done()
    storage.delete_directory(run.path("attempts"))
    try:
        return count_output(run.data, job.source.rows), timings
    except RunError:
        _plan_retry(run, drop_errors=False)
        raise


def _rank_rest(job: RowJob, done: int) -> dict:
    """Rank the rows that are not done; returns this start's timings."""
    started = time.monotonic()
    run = job.run
    shares = share_out(job.source.rows - done, job.execution)
    held = job.execution.actors * shares.batch
    with session(job.execution.needs), ProgressDisplay(run.uri, job.source.rows, done, held) as progress:
        try:
            _execute(job, progress, shares)
        except ExecutionTimeoutError as error:
            raise RunError(_nothing_finished(run, job.execution)) from error
        except (ray.exceptions.RayError, OSError, RuntimeError) as error:
            raise RunError(
                f"{run.uri}: stopped: {root_cause(error)}\nFinished rows are kept: mend the cause and start the same "
                "command again"
            ) from error
        timings = progress.throughput()
    delete_uncommitted(run.data, run.checkpoint)
    if job.store is not None:
        tidy(job.store)
    timings["seconds_of_last_start"] = round(time.monotonic() - started, 2)
    return timings


def _nothing_finished(run: RunFolder, execution: ExecutionSettings) -> str:
    return (
        f"{run.uri}: stopped: no block of rows was finished in {execution.no_progress_timeout_s:,} s. Finished blocks "
        "are kept, and the same command goes on from there. If the replicas were at work, raise "
        f"execution.no_progress_timeout_s, or lower execution.rows_per_block (now {execution.block_rows}) and "
        f"rows_per_batch ({execution.rows_per_batch}); with `store` answers outlive a block that was not finished. If "
        "they were not, the cluster lacks what execution asks for, or a model hangs: `ray status` and its dashboard say"
    )


def _execute(job: RowJob, progress: ProgressDisplay, shares: Shares) -> None:
    _configure(job)
    run, execution = job.run, job.execution
    fs, _ = storage.open_filesystem(job.source_uri)
    rows = ray.data.read_parquet(
        list(job.source.files),
        filesystem=fs,
        # By default a folder named `query=…` would put its name in the place of that column.
        partitioning=None,
        schema=(PASSAGES if job.output == "queries" else CANDIDATES).remove_metadata(),
        num_cpus=_READ_CPUS,
    )
    # Whatever the input's row groups: a file with one of them would be one replica's work.
    ranked = rows.repartition(target_num_rows_per_block=shares.block, strict=True).map_batches(
        RankWorker,
        fn_constructor_kwargs={
            # Without what is as large as the input, of which a replica needs nothing.
            "job": replace(job, source=replace(job.source, files=(), id_hashes=job.source.id_hashes[:0].copy())),
            "attempts_uri": run.path("attempts", str(run.state()["starts"])),
            "counter": progress.counter,
            "folder": os.getcwd(),
        },
        # A block as it is, where it is one batch: Ray Data would add the last one's few rows to another's.
        batch_size=None if shares.block == shares.batch else shares.batch,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=execution.actors, max_tasks_in_flight_per_actor=shares.in_flight),
        num_cpus=execution.cpus_per_actor,
        num_gpus=execution.gpus_per_actor or None,
        memory=execution.memory_gb_per_actor * 2**30 or None,
    )
    data_fs, data_path = storage.open_filesystem(run.data)
    ranked.write_parquet(data_path, filesystem=data_fs, mode="append", ray_remote_args={"num_cpus": _WRITE_CPUS})


def _configure(job: RowJob) -> None:
    execution, source = job.execution, job.source
    # Ray Data's plan and progress would interleave with the job's own; what ends a job reaches it as an exception.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = execution.no_progress_timeout_s
    context.issue_detectors_config.detectors = []
    fs, path = storage.open_filesystem(job.run.checkpoint)
    context.checkpoint_config = CheckpointConfig(
        id_column="query_id",
        checkpoint_path=path,
        override_filesystem=fs,
        delete_checkpoint_on_success=False,
    )
    input_fs, _ = storage.open_filesystem(job.source_uri)
    size = sum(info.size for info in input_fs.get_file_info(list(source.files)))
    block_bytes = max(1, size * execution.block_rows // max(1, source.rows))
    os.environ["RAY_DATA_PARQUET_BIN_PACKING_BYTES"] = str(block_bytes)
    # Ray Data would start 32 processes to read the files' footers, each of two seconds' work to import what it needs.
    readers = max(1, min(_MOST_FOOTER_READERS, len(source.files) // _FILES_PER_FOOTER_READER))
    os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = str(readers)


def _finished_rows(run: RunFolder) -> int:
    """Rows that earlier starts finished. A checkpoint that has not as many as the output is made anew from it: a file
    was lost, or was damaged and deleted, and its rows are done again."""
    in_output = count_rows(run.data, storage.list_files(run.data, ".parquet"))
    if count_rows(run.checkpoint, committed(run.checkpoint)) != in_output:
        in_output -= rebuild_checkpoint(run.data, run.checkpoint, drop_errors=False)
    return in_output


def _plan_retry(run: RunFolder, *, drop_errors: bool) -> None:
    """Note that the checkpoint is to be made anew, so that a kill on the way is harmless."""
    storage.write_text(run.path(_RETRY), json.dumps({"drop_errors": drop_errors}) + "\n")


def _finish_retry(run: RunFolder, retry_errors: bool) -> None:
    """Take failed rows out for another try, or do what an earlier start has planned."""
    if retry_errors:
        _plan_retry(run, drop_errors=True)
    plan = run.path(_RETRY)
    if storage.exists(plan):
        rebuild_checkpoint(run.data, run.checkpoint, **json.loads(storage.read_text(plan)))
        storage.delete_file(plan)
