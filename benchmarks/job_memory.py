"""Memory of the label job's driver and actors over 1× and 20× the rows.

    python benchmarks/job_memory.py [--rows 160] [--depth 10]

Each job is a `rerank-ray label` of its own with one replica (MiniLM bi-encoder, one thread). The figures are the most
memory that the driver, and the largest of Ray's workers, were seen with, fifty times a second: their own, without the
pages of Ray's object store, which count for every process that has read them and are bounded by the store; that is a
figure of its own. What counts is the ratio between the jobs: a job that held its rows would grow with them. The larger
one has the smaller one's rows as often, under other query ids, in the same batches (ten of the default 16 rows): a
replica's most is that of its largest batch. Nothing is cached, so that each time is work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from harness import publish
from label_job import TEACHER, prepare

from rerank_ray.parquet import read_rows, write_rows
from rerank_ray.schema import CANDIDATES

FACTOR = 20
_STORE = "/dev/shm"
"""Where Ray keeps its object store."""
_LOOKS_FOR_WORKERS = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--depth", type=int, default=10)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        source = prepare(Path(folder), options.rows, options.depth)
        for times in (1, FACTOR):
            place = Path(folder, str(times))
            count = write_rows(repeated(source, times), f"{place}/rows", CANDIDATES)
            rows[f"{count} rows"] = label(f"{place}/rows", place)
    small, large = rows.values()
    rows["growth"] = {who: f"{large[who] / small[who] - 1:+.1%}" for who in small}
    publish(
        "job_memory",
        title=f"Memory of the label job over 1× and {FACTOR}× the rows",
        about=f"Rows of {options.depth} candidates, MiniLM bi-encoder, one replica of one thread; the most memory of "
        "their own, in MiB, that the driver and the largest of Ray's workers were seen with, and of the object store's "
        "files.",
        rows=rows,
    )


def repeated(source: str, times: int) -> Iterator[dict]:
    for number in range(times):
        for row in read_rows(source, CANDIDATES.names):
            yield row | {"query_id": f"{row['query_id']}-{number}"}


def label(source: str, place: Path) -> dict[str, float]:
    """Run the job; the most memory, in MiB, of its driver, of its largest Ray worker, and of the object store."""
    config = place / "label.yaml"
    config.write_text(json.dumps({"input": source, "teacher": TEACHER}))  # JSON is YAML
    command = [sys.executable, "-m", "rerank_ray.cli", "label", str(config), "--run", str(place / "run")]
    before = psutil.disk_usage(_STORE).used
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    driver, most = psutil.Process(job.pid), {"driver, MiB": 0.0, "actor, MiB": 0.0, "object store, MiB": 0.0}
    looks = itertools.count()
    while job.poll() is None:
        if next(looks) % _LOOKS_FOR_WORKERS == 0:
            found = workers(driver)
        for process in (driver, *found):
            who = "driver, MiB" if process == driver else "actor, MiB"
            with suppress(OSError):
                most[who] = max(most[who], own_mib(process.pid))
        most["object store, MiB"] = max(most["object store, MiB"], (psutil.disk_usage(_STORE).used - before) / 2**20)
        time.sleep(0.02)
    if job.returncode:
        raise SystemExit(f"the label job ended with exit code {job.returncode}")
    return most


def own_mib(pid: int) -> float:
    """A process's resident memory without shared pages. Raises `OSError` when it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssFile:"))) / 1024


def workers(driver: psutil.Process) -> list[psutil.Process]:
    """Ray's worker processes among the driver's descendants: Ray names them after what they run."""
    try:
        below = driver.children(recursive=True)
        return [p for p in below if p.cmdline()[:1] and p.cmdline()[0].startswith("ray::")]
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    main()
