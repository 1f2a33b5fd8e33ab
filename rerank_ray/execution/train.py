"""Distillation on Ray Train: data-parallel workers, checkpoints in the run folder, resume after any kill."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from rerank_ray import storage
from rerank_ray.distill.checkpoints import STUDENT
from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.metrics_log import FILE, MetricsLog, summary_line, written_lines
from rerank_ray.distill.parallel import World
from rerank_ray.distill.start import with_inputs
from rerank_ray.distill.train import train
from rerank_ray.errors import RerankRayError, RunError, UnavailableError
from rerank_ray.execution.cluster import root_cause, session
from rerank_ray.models import engine
from rerank_ray.prompts.render import names_a_file
from rerank_ray.runs import RunFolder
from rerank_ray.settings.distill import DistillSettings, TrainingExecutionSettings

_SCORE = "validation_ndcg@10"
_FAILURE = "failure.txt"
"""In the run folder: the error for which training is not tried again."""
_ECHO_EVERY_S = 1.0


def train_student(run: RunFolder, settings: DistillSettings, labels: LabelSet) -> dict:
    """Train until the objective's schedule or early stopping ends it; returns the best step's metrics.

    The workers run in folders of their own: paths in `settings` and `labels` are absolute (`with_absolute_paths`).

    Ray Train keeps the best and the latest checkpoint under the run's `checkpoints/`, and a run of that name which was
    killed goes on from the latest. The best step's student is copied to `student/`.

    Raises:
        RunError: a worker failed more often than `execution.max_failures`.
    """
    config = {"settings": settings.model_dump(mode="json"), "labels": labels}
    return fit(run, _worker, config, settings.execution, score=_SCORE, summary=summary_line)


def fit(
    run: RunFolder,
    worker: Callable[[dict], None],
    config: dict,
    execution: TrainingExecutionSettings,
    *,
    score: str,
    summary: Callable[[dict], str],
) -> dict:
    """Run a training loop on Ray Train, as `train_student` says; returns the best step's metrics.

    Args:
        worker: what every worker runs: `work` with the loop that `config` describes; "run" is added to that.
        score: the metric that is highest for the step that becomes the student, the last one of equals.
        summary: a line of metrics as one for people.
    """
    # The controller checks its workers' health at this interval, and a finished step waits for the next check.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    with session(execution.needs):
        trainer = TorchTrainer(
            worker,
            train_loop_config=config | {"run": storage.absolute(run.uri)},
            torch_config=TorchConfig(backend="nccl" if execution.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=execution.range_of_workers or execution.workers,
                use_gpu=execution.gpus_per_worker > 0,
                resources_per_worker=_resources(execution),
            ),
            run_config=RunConfig(
                name="checkpoints",
                storage_path=storage.absolute(run.uri),
                failure_config=FailureConfig(max_failures=execution.max_failures),
                worker_runtime_env=_without_gpus(execution),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=2, checkpoint_score_attribute=score, checkpoint_score_order="max"
                ),
            ),
        )
        _forget_failure(run.uri)
        try:
            with _echo(run, summary):
                result = trainer.fit()
        except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
            raise RunError(
                f"{run.uri}: training stopped: {root_cause(error)}\nStart the same command again to resume"
            ) from error
        finally:
            _forget_failure(run.uri)
        checkpoint, metrics = max(result.best_checkpoints, key=lambda pair: (pair[1][score], pair[1]["step"]))
        _publish(checkpoint, run)
    return metrics


def with_absolute_paths(settings: DistillSettings) -> DistillSettings:
    """Ray Train's workers run in a folder of their own."""
    base, prompt = absolute_if_there(settings.student.base), absolute_template(settings.student.prompt)
    student = settings.student.model_copy(update={"base": base, "prompt": prompt})
    return with_inputs(settings.model_copy(update={"student": student}), storage.absolute)


def absolute_if_there(path: str) -> str:
    """A file's or a folder's path made absolute; any other name, of a model or a template, as it is."""
    return storage.absolute(path) if os.path.exists(path) else path


def absolute_template(name: str) -> str:
    """A template's file made absolute; a built-in one's name as it is."""
    return storage.absolute(name) if names_a_file(name) else name


@contextmanager
def _echo(run: RunFolder, summary: Callable[[dict], str]) -> Iterator[None]:
    """Print each line of metrics as the workers log it; they may run on other machines, and share the run folder.

    A resumed training drops the lines behind its checkpoint and writes them again. What can't be read now, from a
    store that is out of reach for a moment, is read the next time. What has not changed is not read again.
    """
    path, console, ended = run.path(FILE), Console(stderr=True, soft_wrap=True), threading.Event()

    def print_new(seen: list[str], version: tuple | None) -> tuple[list[str], tuple | None]:
        try:
            current = storage.file_version(path)
            if current == version:
                return seen, version
            now = written_lines(path)
        except OSError:
            return seen, version
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(seen, now, strict=False)))
        for line in now[known:]:
            console.print(summary(json.loads(line)), highlight=False)
        return now, current

    def follow() -> None:
        seen, version = written_lines(path), None
        while not ended.wait(_ECHO_EVERY_S):
            seen, version = print_new(seen, version)
        print_new(seen, None)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _publish(checkpoint: Checkpoint, run: RunFolder) -> None:
    """Copy the best checkpoint's student, without the trainer's state, to the run's `student/`.

    Raises:
        RunError: it can't be written there.
    """
    target_fs, target = storage.open_filesystem(run.student)
    storage.delete_directory(run.student)
    # Object stores need no folders; the local copy would fail without.
    storage.make_directory(run.student)
    with storage.writing(run.student):
        pyarrow.fs.copy_files(
            f"{checkpoint.path}/{STUDENT}",
            target,
            source_filesystem=checkpoint.filesystem,
            destination_filesystem=target_fs,
        )


def _without_gpus(execution: TrainingExecutionSettings) -> dict | None:
    """Hides a node's GPUs from workers that reserve none; Ray does not."""
    hidden = not execution.gpus_per_worker and ray.cluster_resources().get("GPU")
    return {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}} if hidden else None


def _resources(execution: TrainingExecutionSettings) -> dict[str, float]:
    resources = {"CPU": execution.cpus_per_worker}
    if execution.gpus_per_worker:
        resources["GPU"] = execution.gpus_per_worker
    return resources


def _worker(config: dict) -> None:
    settings = DistillSettings.model_validate(config["settings"])
    log = metrics_log(config["run"])
    own = {"log": log.write} if log is not None else {}
    work(config["run"], log, settings.execution, partial(train, settings, data=config["labels"], **own))


def metrics_log(run_uri: str) -> MetricsLog | None:
    """The run's metrics on the first worker, which writes them; None on others."""
    return MetricsLog(run_uri) if ray.train.get_context().get_world_rank() == 0 else None


def work(run_uri: str, log: MetricsLog | None, execution: TrainingExecutionSettings, loop: Callable[..., None]) -> None:
    """What every worker runs: a Ray-free training loop, with Ray Train's ranks, checkpoints and reports, whose metrics
    the first worker logs.

    An error that would come again is raised again at once: Ray Train starts the loop anew whatever it was, and would
    take the steps since the last checkpoint only to meet it.
    """
    failure = storage.join(run_uri, _FAILURE)
    if storage.exists(failure):
        raise RunError(storage.read_text(failure))
    engine.use_threads(execution.cpus_per_worker, execution.gpus_per_worker)
    if execution.gpus_per_worker:
        # Workers of one node see all of its GPUs; "cuda" then means this worker's own.
        torch.cuda.set_device(ray.train.torch.get_device())
    context = ray.train.get_context()
    world = World(rank=context.get_world_rank(), size=context.get_world_size())

    def report(metrics: dict, folder: Path | None) -> None:
        if log is not None:
            log.write(metrics)
        if metrics["step"] < 0:
            # Ray Train wants a score of every checkpoint; those of the exits' warm-up have none, and are the worst.
            metrics = metrics | {_SCORE: -1.0}
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if folder else None)

    checkpoint = ray.train.get_checkpoint()
    try:
        if checkpoint is None:
            loop(world, report)
        else:
            with checkpoint.as_directory() as folder:
                loop(world, report, resume=Path(folder))
    except RerankRayError as error:
        if not _may_pass(error):
            storage.write_text(failure, str(error))
        raise


def _may_pass(error: RerankRayError) -> bool:
    """Whether the same loop may do without the error next time: a lost GPU, or a disk or a network that failed."""
    return isinstance(error, UnavailableError) or isinstance(error.__cause__, OSError)


def _forget_failure(run_uri: str) -> None:
    failure = storage.join(run_uri, _FAILURE)
    if storage.exists(failure):
        storage.delete_file(failure)
