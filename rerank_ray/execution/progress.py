"""Progress of a job: workers count what they finish, the driver shows rates and the time left."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from rerank_ray.records import Computed
from rerank_ray.report.tables import duration

_LINE_EVERY_S = 15.0


_NOTHING = {"rows": 0, "pairs": 0, "calls": 0, "tokens": 0, "replica_seconds": 0.0}
_NO_REPORT = _NOTHING | {"model": {}, "ranking_seconds": 0.0, "store": {}, "computed": Computed()}


@ray.remote(num_cpus=0)
class Counter:
    """Adds up what workers report."""

    def __init__(self) -> None:
        self.totals = dict(_NOTHING)
        self.model: dict = {}
        self.stores: dict[str, dict[str, int]] = {}
        self.computations: dict[str, Computed] = {}
        self.first_start, self.last_end = math.inf, 0.0

    def describe(self, name: str, parameters: int) -> None:
        self.model = {"name": name, "parameters": parameters}

    def add(self, *, started: float, ended: float, **amounts: int) -> None:
        """Add one batch; `started` and `ended` are seconds since the epoch on the worker's clock."""
        for name, amount in {**amounts, "replica_seconds": ended - started}.items():
            self.totals[name] += amount
        self.first_start, self.last_end = min(self.first_start, started), max(self.last_end, ended)

    def store_counts(self, worker: str, counts: dict[str, int]) -> None:
        """Take what a worker has counted of the label store since it started."""
        self.stores[worker] = counts

    def computed(self, worker: str, computed: Computed) -> None:
        """Take what a worker's models have computed since it started; two threads tell it, in any order."""
        known = self.computations.get(worker, Computed())
        self.computations[worker] = max(known, computed, key=lambda c: c.positions)

    def read(self) -> dict:
        ranking_seconds = max(0.0, self.last_end - self.first_start)
        store = {name: sum(c[name] for c in self.stores.values()) for name in next(iter(self.stores.values()), ())}
        computed = sum(self.computations.values(), start=Computed())
        ranked = {"model": self.model, "ranking_seconds": ranking_seconds, "store": store, "computed": computed}
        return self.totals | ranked


class ProgressDisplay:
    """A bar on a terminal; elsewhere a line every 15 seconds.

    Rows that are done again after a crash count again, so the display may run ahead; `run.json` has the true counts.
    The counter lives on the driver's node: losing any other costs no figure. Should it die all the same, the figures
    stay what they were; the job goes on.
    """

    def __init__(self, name: str, rows: int, already_done: int, under_way: int) -> None:
        """`under_way` is how many rows the replicas hold at a time."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.counter = Counter.options(scheduling_strategy=here).remote()
        self._totals = _NO_REPORT
        self._name, self._rows, self._before, self._under_way = name, rows, already_done, under_way
        self._console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def throughput(self) -> dict:
        """The model, and the pairs a second that one replica ranked, start-up and waiting left out."""
        return _figures(self._read_totals())

    def _show(self) -> None:
        if not sys.stderr.isatty():
            while not self._stop.wait(_LINE_EVERY_S):
                done, rates = self._read()
                self._console.print(f"{self._name}: {done}/{self._rows} rows, {rates}", highlight=False)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
        )
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task(self._name, total=self._rows, completed=self._before, rates="starting")
            while not self._stop.wait(0.5):
                done, rates = self._read()
                bar.update(task, completed=done, rates=rates)

    def _read_totals(self) -> dict:
        with contextlib.suppress(ray.exceptions.RayError):
            self._totals = ray.get(self.counter.read.remote())
        return self._totals

    def _read(self) -> tuple[int, str]:
        totals = self._read_totals()
        done = min(self._before + totals["rows"], self._rows)
        return done, rates(totals, self._rows - self._before, self._under_way, time.monotonic() - self._started)


def rates(totals: dict, rows: int, under_way: int, elapsed: float) -> str:
    """Rows, pairs and tokens a second since the start, and the time left.

    A batch may take hours: what models have computed of those that are under way counts as rows in proportion, as if
    these were like the finished ones. Where they are longer, the estimate is used up before they are done.

    Args:
        totals: what the counter reads.
        rows: that this start has to do.
        under_way: that are so at most. Finished rows that a store answered took no tokens, and a replica that crashed
            computed some for nothing.
        elapsed: seconds since it.
    """
    computed = totals["computed"].tokens
    if not totals["rows"]:
        return f"first batch, {computed / elapsed:,.1f} tokens/s" if computed else "starting"
    begun = computed / totals["tokens"] - 1.0 if totals["tokens"] else 0.0
    share = 1.0 + min(max(0.0, begun), under_way / totals["rows"])
    speed = {name: share * totals[name] / elapsed for name in ("rows", "pairs", "tokens")}
    left = max(0.0, rows / speed["rows"] - elapsed)
    is_used_up = round(left) == 0 and totals["rows"] < rows
    told = "the last batches are under way" if is_used_up else f"{duration(left)} left"
    return ", ".join(f"{value:,.1f} {name}/s" for name, value in speed.items()) + f", {told}"


def nothing_done() -> dict:
    """The timings of a start that had no row left to rank."""
    return _figures(_NO_REPORT) | {"seconds_of_last_start": 0.0}


def _figures(totals: dict) -> dict:
    seconds, computed = totals["replica_seconds"], totals["computed"]
    rate = round(totals["pairs"] / seconds, 2) if seconds else None
    store = totals["store"]
    calls = store["hits"] + store["misses"] if store else 0
    return {
        "model": totals["model"],
        "rows_this_start": totals["rows"],
        "calls_this_start": totals["calls"],
        "tokens_this_start": totals["tokens"],
        "padding_share": round(1 - computed.tokens / computed.positions, 4) if computed.positions else None,
        "replica_seconds": round(seconds, 2),
        "pairs_per_replica_second": rate,
        "seconds_from_first_to_last_batch": round(totals["ranking_seconds"], 2),
        "label_store": store | {"hit_rate": store["hits"] / calls if calls else None} if store else None,
    }
