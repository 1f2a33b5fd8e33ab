"""Training metrics as they come: `metrics.jsonl`, TensorBoard events, and a line for people."""

from __future__ import annotations

import json
import os

from tensorboardX import SummaryWriter

from rerank_ray import storage
from rerank_ray.report.tables import duration

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends lines of metrics to the run folder; a resumed run drops what came after its checkpoint.

    A local file is appended to. On an object store, where that can't be, the file is written whole at each validation.
    TensorBoard events are written when the run folder is local (its writer needs a file to append to).
    """

    def __init__(self, run_uri: str) -> None:
        self._path = storage.join(run_uri, FILE)
        self._lines = written_lines(self._path)
        self._file = storage.local_path(self._path)
        self._is_whole = False
        folder = storage.local_path(storage.join(run_uri, "tensorboard"))
        self._board = SummaryWriter(str(folder)) if folder else None

    def write(self, metrics: dict) -> None:
        step = metrics["step"]
        while self._lines and json.loads(self._lines[-1])["step"] >= step:
            del self._lines[-1]
            self._is_whole = False
        self._lines.append(json.dumps(metrics))
        if self._file and self._is_whole:
            with storage.writing(self._path), self._file.open("a") as file:
                file.write(self._lines[-1] + "\n")
        elif self._file or step < 0 or any(name.startswith("validation_") for name in metrics):
            storage.write_text(self._path, "\n".join(self._lines) + "\n")
            self._is_whole = True
        if self._board:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()


def written_lines(path: str | os.PathLike[str]) -> list[str]:
    """The file's lines so far. The last one may be half there: it is being written, or its process was killed."""
    text = storage.read_text(path) if storage.exists(path) else ""
    return text[: text.rfind("\n") + 1].splitlines()


def policy_summary_line(metrics: dict) -> str:
    """One line for people, of a policy's training: step and means since the last validation."""
    parts = [f"step {metrics['step']}/{metrics['total_steps']}"]
    named = [n for n in metrics if n.startswith(("validation_", "loss/")) and n != "validation_seconds"]
    named += [n for n in ("reward", "well_formed", "prompts_without_signal", "kl") if n in metrics]
    parts += [f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in named]
    if metrics.get("skipped_queries"):
        parts.append(f"{metrics['skipped_queries']:,.0f} queries skipped")
    return ", ".join([*parts, f"best at step {metrics['best_step']}"])


def summary_line(metrics: dict) -> str:
    """One line for people: step, nDCG@10 of a validation, losses, pairs per second, time left; of a warm-up, its KL."""
    if metrics["step"] < 0:
        kl = {n.split("/")[1].removeprefix("layer_"): v for n, v in metrics.items() if n.startswith("exit_warm_up/")}
        done = metrics["total_steps"] + metrics["step"] + 1
        told = ", ".join(f"{value:.4f} at layer {layer}" for layer, value in kl.items())
        return f"exit warm-up {done}/{metrics['total_steps']}, KL {told}"
    parts = [f"step {metrics['step']}/{metrics['total_steps']}"]
    if "validation_ndcg@10" in metrics:
        parts.append(f"validation nDCG@10 {metrics['validation_ndcg@10']:.4f} (best at step {metrics['best_step']})")
    if "trained_share" in metrics:
        parts.append(f"with {metrics['trained_share']:g} of the trained weights")
    parts += [
        f"{name.removeprefix('loss/')} {value:.4f}" for name, value in metrics.items() if name.startswith("loss/")
    ]
    skipped = {n.removeprefix("skipped_queries/"): v for n, v in metrics.items() if n.startswith("skipped_queries/")}
    parts += [f"{count} queries skipped by {name}" for name, count in skipped.items() if count]
    if "pairs_per_second" in metrics:
        left = (metrics["total_steps"] - metrics["step"]) * metrics["seconds_per_step"]
        parts.append(f"{metrics['pairs_per_second']:.1f} pairs/s, {duration(left)} of steps left")
    return ", ".join(parts)
