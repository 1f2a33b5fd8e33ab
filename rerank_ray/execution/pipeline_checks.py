"""What a pipeline's later steps lack, found before its first one has cost anything.

Only what no earlier step makes can be looked for; each job checks the rest when its turn has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyarrow as pa

from rerank_ray import storage
from rerank_ray.config import Settings
from rerank_ray.errors import ConfigError, InputError, RerankRayError
from rerank_ray.formats import beir
from rerank_ray.metrics.evaluation import parse_metric
from rerank_ray.models.resolve import ask_hub, resolve
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.rankers import preflight
from rerank_ray.runs import check_ray_reads_below
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.jobs import CombineSettings, EvaluateSettings, LabelSettings, RerankSettings
from rerank_ray.settings.pipeline import BeirIngestSettings, IngestSettings, StepSettings, step_references
from rerank_ray.settings.rankers import CompositionSettings
from rerank_ray.settings.student import PROMPTED_HEADS
from rerank_ray.settings.synthesize import SynthesizeSettings

Check = Callable[[], object]
"""Raises what is wrong."""

# Of an ingest step's settings: a folder called "test" beside the config is not the split.
_NO_PATHS = {"kind", "split", "method"}


def check_steps(steps: Sequence[StepSettings], run_uri: str) -> None:
    """Look for the files, models and templates of steps that are still to be done, without loading any.

    Raises:
        ConfigError: all faults of all steps together, each with its step's name.
    """
    faults: dict[str, None] = {}
    for step in steps:
        for check in CHECKS[step.job](getattr(step, step.job), run_uri):
            try:
                check()
            except (RerankRayError, OSError, pa.ArrowException) as error:
                faults[f"  step {step.name}: {error}"] = None
    if faults:
        raise ConfigError("this pipeline would not come to its end; nothing was started:\n" + "\n".join(faults))


def source_paths(settings: IngestSettings) -> list[str]:
    """The files and folders that an ingest reads."""
    values = settings.model_dump(exclude=_NO_PATHS).values()
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [path for paths in lists for path in paths if isinstance(path, str)]


def _files(paths: Sequence[str], run_uri: str) -> Iterator[Check]:
    yield from (partial(_exists, path) for path in paths if not _is_made_by_a_step(path, run_uri))


def _is_made_by_a_step(path: str, run_uri: str) -> bool:
    """By its scheme, or because it lies in the pipeline's own run folder."""
    own = storage.absolute(run_uri).rstrip("/") + "/"
    return bool(step_references(path)) or storage.absolute(path).startswith(own)


def _exists(path: str) -> None:
    if not storage.exists(path):
        raise InputError(f"{path}: no such file or folder")


def _rankers(settings: Settings) -> Iterator[Check]:
    """The whole ranker, or those of its parts whose models no earlier step makes."""
    if not step_references(settings.model_dump()):
        yield partial(preflight, settings)
    elif isinstance(settings, CompositionSettings):
        for child in settings.children.values():
            yield from _rankers(child)


def _of_ingest(settings: IngestSettings, run_uri: str) -> Iterator[Check]:
    if isinstance(settings, BeirIngestSettings) and not _is_made_by_a_step(settings.folder, run_uri):
        yield from (partial(beir.find_file, settings.folder, name) for name in beir.file_names(settings.split))
    else:
        yield from _files(source_paths(settings), run_uri)


def _of_synthesize(settings: SynthesizeSettings, run_uri: str) -> Iterator[Check]:
    yield partial(check_ray_reads_below, run_uri)
    yield from _files([settings.corpus], run_uri)
    yield from _rankers(settings.writer)
    if settings.round_trip is not None:
        yield from _rankers(settings.round_trip.ranker)


def _of_label(settings: LabelSettings, run_uri: str) -> Iterator[Check]:
    yield partial(check_ray_reads_below, run_uri)
    yield from _files([settings.input], run_uri)
    yield from _rankers(settings.teacher)


def _of_rerank(settings: RerankSettings, run_uri: str) -> Iterator[Check]:
    yield partial(check_ray_reads_below, run_uri)
    yield from _files([settings.input], run_uri)
    yield from _rankers(settings.ranker)


def _of_combine(settings: CombineSettings, run_uri: str) -> Iterator[Check]:
    yield from _files(settings.inputs, run_uri)


def _of_distill(settings: DistillSettings, run_uri: str) -> Iterator[Check]:
    student = settings.student
    texts = student.exit_warm_up.texts if student.exit_warm_up else ()
    yield from _files([*settings.input, *texts], run_uri)
    if not step_references(student.base):
        yield lambda: ask_hub(resolve(student.model_settings()))
    if student.head in PROMPTED_HEADS:
        yield partial(load_template, student.prompt, "yes_no")


def _of_evaluate(settings: EvaluateSettings, run_uri: str) -> Iterator[Check]:
    yield from (partial(parse_metric, metric) for metric in settings.metrics)
    yield from _files([settings.qrels, *settings.rankings.values()], run_uri)


CHECKS: dict[str, Callable[..., Iterator[Check]]] = {
    "ingest": _of_ingest,
    "synthesize": _of_synthesize,
    "label": _of_label,
    "combine": _of_combine,
    "distill": _of_distill,
    "rerank": _of_rerank,
    "evaluate": _of_evaluate,
}
