"""Rank a label config's rows in a plain loop, without Ray, and print its seconds: what `label_job.py` compares with.

    python benchmarks/bare_loop.py CONFIG

It imports no more than it needs: the whole process is compared with, too.
"""

from __future__ import annotations

import sys
import time

import pyarrow as pa

from rerank_ray import config
from rerank_ray.models.engine import set_up_replica
from rerank_ray.parquet import read_rows
from rerank_ray.schema import CANDIDATES
from rerank_ray.settings.jobs import LabelSettings
from rerank_ray.stages import RankStage


def main() -> None:
    settings = config.load(LabelSettings, sys.argv[1])
    set_up_replica(settings.execution.cpus_per_actor, settings.execution.gpus_per_actor)
    stage = RankStage(settings.teacher, "labels")
    rows = list(read_rows(settings.input, CANDIDATES.names))
    size = settings.execution.rows_per_batch
    started = time.perf_counter()
    for start in range(0, len(rows), size):
        stage(pa.Table.from_pylist(rows[start : start + size], schema=CANDIDATES))
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
