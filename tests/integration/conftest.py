"""One small Ray session for all integration tests, and candidate Parquet made from nothing."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import ray
from rich.console import Console

from rerank_ray.parquet import write_candidates
from rerank_ray.records import Candidate, CandidateList, Query


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Six logical CPUs on however many there are."""
    ray.init(address="local", num_cpus=6, object_store_memory=150 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def candidate_list(number: int, size: int = 5, noise: int = 0) -> CandidateList:
    """Query `q<number>` with candidates `d0`, `d1`, … whose first-stage scores descend.

    `noise` bytes of each text are random, so that no compression makes them smaller.
    """
    random = Random(number)
    candidates = tuple(
        Candidate(doc_id=f"d{i}", text=f"passage {number} {i} {random.randbytes(noise).hex()}", score=float(size - i))
        for i in range(size)
    )
    return CandidateList(query=Query(query_id=f"q{number:04d}", text=f"query {number}"), candidates=candidates)


@pytest.fixture
def make_candidates(tmp_path: Path) -> Callable[..., str]:
    """Write candidate Parquet of `rows` queries to a folder and return its path."""

    def make(rows: int, *, name: str = "candidates", **arguments: int) -> str:
        folder = str(tmp_path / name)
        write_candidates((candidate_list(n, **arguments) for n in range(rows)), folder, rows_per_file=64)
        return folder

    return make
