"""Adaptive exits of a layer-wise student, calibrated on held-out lists (`rerank-ray calibrate-exit`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from rerank_ray import config, storage
from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.targets import validation_ndcg
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.models import engine
from rerank_ray.models.adaptive_exit import AdaptiveExit
from rerank_ray.models.exit_margins import ExitCalibration, calibrate
from rerank_ray.models.student import Student, load_student
from rerank_ray.models.student.base import description_of
from rerank_ray.parquet import inspect_input, read_rows
from rerank_ray.records import Labels
from rerank_ray.runs import CONFIG, resolve_input
from rerank_ray.schema import LABELS, labels_from_row
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.models import ModelSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found, on how many lists."""

    layers: tuple[int, ...]
    lists: int
    ndcg: tuple[float, ...]
    """Mean nDCG@10 at each layer."""
    calibration: ExitCalibration


def calibrate_exit(
    student: str,
    labels: str | None,
    max_loss: float,
    gains: Literal["teacher", "labels"] = "teacher",
    limit: int | None = None,
) -> Report:
    """Find the margins and write them into the student's folder, from where `exit_layer: adaptive` reads them.

    Args:
        student: its folder.
        labels: a label run on queries that the student was not trained on; None takes the queries that the student's
            own distillation run, whose folder it lies in, held out.
        max_loss: nDCG@10 that lists may lose on average against the last layer, with some 90 % confidence.
        gains: nDCG@10 against the teacher (its rank r has gain 11 − r for r ≤ 10) or against known gains.
        limit: read so many rows at most.

    Raises:
        ConfigError: not a layer-wise student, a negative loss, or a limit below two.
        ModelError: a student whose layers can't be computed apart.
        InputError: fewer than two lists have a gain.
    """
    description = description_of(student)
    if max_loss < 0:
        raise ConfigError(f"--max-loss {max_loss}: the nDCG@10 that may be lost is 0 or more")
    if limit is not None and limit < 2:
        raise ConfigError(f"--limit {limit}: two lists at least are needed to calibrate on")
    device = engine.pick_device("auto")
    model = load_student(ModelSettings(path=student), dtype=engine.pick_dtype("auto", device))
    if len(model.layers) == 1:
        raise ConfigError(f"{student}: it has a head on its last layer alone: distil with student.layers")
    # A student that can't leave early is refused before anything is scored.
    AdaptiveExit(model, [0.0] + [None] * (len(model.layers) - 2))
    model = model.to(device)
    # As where it scores.
    model.score_in_float32()
    lists = _held_out(Path(student).parent) if labels is None else _labelled(labels)
    measured = _measure(model, islice(lists, limit), gains)
    ndcg = np.array([by_layer for _, _, by_layer in measured]).reshape(-1, len(model.layers))
    if len(ndcg) < 2:
        raise InputError(
            f"{labels or student}: {len(ndcg)} lists have a gain ({gains}); at least two are needed to calibrate on"
        )

    def loss(number: int, scores: np.ndarray) -> float:
        labels, _, by_layer = measured[number]
        return by_layer[-1] - validation_ndcg(labels, scores.tolist(), gains)

    branch_layers = model.description.branch_layers
    found = calibrate([scores for _, scores, _ in measured], loss, max_loss, model.layers, branch_layers)
    changed = json.loads(description.read_text()) | {"exit_margins": found.margins}
    storage.write_text(description, json.dumps(changed, indent=2) + "\n")
    return Report(layers=model.layers, lists=len(ndcg), ndcg=tuple(ndcg.mean(0).tolist()), calibration=found)


def _labelled(labels: str) -> Iterator[Labels]:
    data = resolve_input(labels)
    inspect_input(data, LABELS)
    return (labels_from_row(row) for row in read_rows(data, LABELS.names) if row["error"] is None)


def _held_out(run: Path) -> Iterator[Labels]:
    """The lists that a distillation run kept out of training."""
    if not (run / CONFIG).exists():
        raise ConfigError(f"{run}: not a distillation run: name held-out lists with --labels")
    settings = config.load(DistillSettings, run / CONFIG)
    data = LabelSet.open(settings.input, settings.validation.fraction, settings.seed)
    return data.reader().read(data.validation)


@torch.inference_mode()
def _measure(student: Student, lists: Iterable[Labels], gains: str) -> list[tuple[Labels, np.ndarray, list[float]]]:
    """Every list with a gain, without its texts, its scores [exits, candidates] and its nDCG@10 at each exit."""
    runner = engine.BatchRunner(None, next(student.parameters()).device)
    measured = []
    for labels in lists:
        texts = [c.contents for c in labels.candidate_list.candidates]
        encoded = student.encode([labels.candidate_list.query.text] * len(texts), texts)

        def forward(batch: Sequence[int], encoded=encoded) -> list[list[float]]:
            return student(**student.batch([encoded[i] for i in batch])).float().T.tolist()

        by_layer = np.array(runner.run([len(e["input_ids"]) for e in encoded], forward)).T
        values = [validation_ndcg(labels, scores, gains) for scores in by_layer]
        if values[0] is not None:
            measured.append((_without_texts(labels), by_layer, values))
    return measured


def _without_texts(labels: Labels) -> Labels:
    """Ids, scores and gains alone: the texts of many thousand lists would fill the memory until the end."""
    listed = labels.candidate_list
    bare = tuple(replace(c, title=None, text="") for c in listed.candidates)
    return replace(labels, candidate_list=replace(listed, candidates=bare))
