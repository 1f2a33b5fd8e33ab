"""Memory of the label job's driver and actors over 1× and 20× the rows.

    python benchmarks/job_memory.py [--rows 150] [--depth 10]

Each job is a `rerank-ray label` of its own with one replica (MiniLM bi-encoder, one thread). The figures are the
largest resident sets that Linux has seen of the driver and of Ray's workers (VmHWM): a longer job read now and then
would show more of its peaks. What counts is the ratio between the jobs: a job that held its rows would grow with
them. The larger one has the smaller one's rows as often, under other query ids; nothing is cached, so that each time
is work. Over its first hundred rows a replica's heap comes to hold what batches of all sizes leave free, and the
driver counts 16 files of 32 rows at a time at the end, which is why there are so many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from harness import publish
from label_job import TEACHER, prepare

from rerank_ray.parquet import read_rows, write_rows
from rerank_ray.schema import CANDIDATES

FACTOR = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=150)
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
        about=f"Rows of {options.depth} candidates, MiniLM bi-encoder, one replica of one thread; the largest resident "
        "set of the driver, and of the process of Ray's that has the largest, in MiB, as Linux has kept them (VmHWM).",
        rows=rows,
    )


def repeated(source: str, times: int) -> Iterator[dict]:
    for number in range(times):
        for row in read_rows(source, CANDIDATES.names):
            yield row | {"query_id": f"{row['query_id']}-{number}"}


def label(source: str, place: Path) -> dict[str, float]:
    """Run the job; largest resident set, in MiB, of its driver and of its largest Ray worker."""
    config = place / "label.yaml"
    config.write_text(json.dumps({"input": source, "teacher": TEACHER}))  # JSON is YAML
    command = [sys.executable, "-m", "rerank_ray.cli", "label", str(config), "--run", str(place / "run")]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    driver, largest = psutil.Process(job.pid), {"driver, MiB": 0.0, "actor, MiB": 0.0}
    while job.poll() is None:
        for process in (driver, *workers(driver)):
            who = "driver, MiB" if process == driver else "actor, MiB"
            try:
                largest[who] = max(largest[who], peak_mib(process.pid))
            except OSError:
                continue
        time.sleep(0.5)
    if job.returncode:
        raise SystemExit(f"the label job ended with exit code {job.returncode}")
    return largest


def peak_mib(pid: int) -> float:
    """The largest resident set that a process has had. Raises `OSError` when it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) / 1024 if found else 0.0


def workers(driver: psutil.Process) -> list[psutil.Process]:
    """Ray's worker processes among the driver's descendants: Ray names them after what they run."""
    try:
        below = driver.children(recursive=True)
        return [p for p in below if p.cmdline()[:1] and p.cmdline()[0].startswith("ray::")]
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    main()
