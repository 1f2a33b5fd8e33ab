"""What precision and compilation do to an LLM teacher's speed, scores and ranking, by two methods.

    RERANK_RAY_DATA=DIR python benchmarks/llm_precision.py [--queries 43] [--depth 20] [--rounds 1]

SmolLM2 scores the first passages of BM25's lists for TREC-DL 2019, asked yes or no and by query likelihood. Seconds are
those of the process on one thread, which other programs on the machine don't prolong. nDCG@10 is that of the scored
passages' ranking by TREC's qrels, and the ideal ranking has passages that are not among them. bfloat16 is measured
where the processor has it; elsewhere float32 is compiled in its place.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from harness import DL19_QRELS, agreement, mean_ndcg, publish, qrels_of, ratio, trec_dl_lists
from pointwise_teacher import MODEL, in_turn, teacher
from pydantic import TypeAdapter

from rerank_ray.models.backends import load_backend
from rerank_ray.models.engine import pick_dtype
from rerank_ray.settings.models import HFCausalSettings
from rerank_ray.settings.rankers import RankerSettings

METHODS = {"yes/no": "yes_no", "query likelihood": "query_likelihood"}
WARM_UP_QUERIES, WARM_UP_DEPTH = 2, 5
"""A single query would leave what computes several shared prefixes in a pass to be compiled under the clock."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=43)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    requests, few = trec_dl_lists(options.queries, options.depth), trec_dl_lists(WARM_UP_QUERIES, WARM_UP_DEPTH)
    qrels = qrels_of(DL19_QRELS)
    own = str(pick_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    subjects, warm_up = {}, {}
    for how in dict.fromkeys(["float32", own, f"{own}, compiled", "int8, compiled"]):
        model = HFCausalSettings(path=MODEL, device="cpu", dtype=how.split(",")[0], compile="compiled" in how)
        backend = load_backend(model)
        started = time.perf_counter()
        for name, method in METHODS.items():
            settings = TypeAdapter(RankerSettings).validate_python({"method": method, "model": model})
            subjects[name, how] = teacher(settings, backend)
            subjects[name, how](few)
        warm_up[how] = time.perf_counter() - started
    scores, seconds = in_turn(subjects, requests, options.rounds)
    pairs = sum(len(r) for r in requests)
    rows = {
        f"{name}, {how}": {
            "pairs/s": pairs / statistics.median(seconds[name, how]),
            "times float32": ratio(seconds[name, "float32"], seconds[name, how]),
            **agreement(requests, scores[name, how], scores[name, "float32"]),
            "nDCG@10": mean_ndcg(requests, scores[name, how], qrels),
        }
        for name in METHODS
        for how in warm_up
    }
    spreads = " and ".join(f"{np.std(scores[name, 'float32']):.2f} ({name})" for name in METHODS)
    compilation = " and ".join(f"{took:.0f} s ({how})" for how, took in warm_up.items() if "compiled" in how)
    publish(
        "llm_precision",
        title="An LLM teacher's precision",
        about=f"{pairs} pairs of TREC-DL 2019, the first {options.depth} of BM25's lists, SmolLM2-135M, one thread, "
        f"medians of {options.rounds} round(s) in alternation, CPU seconds. Differences and Kendall τ (mean over "
        "queries) are to the method's scores in float32, whose standard deviation over all pairs is "
        f"{spreads}. The compiled models' first runs of both methods on {sum(len(r) for r in few)} pairs, compilation "
        f"included, took {compilation} of the clock.",
        rows=rows,
    )


if __name__ == "__main__":
    main()
