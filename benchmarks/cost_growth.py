"""How the time of a student's scoring grows with the number of pairs.

    RERANK_RAY_DATA=DIR python benchmarks/cost_growth.py STUDENT [--pairs 6400] [--rounds 3]

STUDENT, the folder of a cross-encoder, scores passages of TREC-DL 2019 and 2021 (BM25) on one thread: all of the pairs,
every 4th and every 16th, so that the lengths are alike. Seconds are those of the process, which other programs on the
machine don't prolong. The exponent is the slope of the least-squares line through the medians on logarithmic axes: 1 is
time in proportion to the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import numpy as np
import torch
from harness import alternate, forget_texts, publish, trec_dl_lists

from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.protocol import Pair
from rerank_ray.settings.models import CrossEncoderSettings

PARTS = (16, 4, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--pairs", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder = CrossEncoder(CrossEncoderSettings(path=options.student))
    lists = trec_dl_lists(queries=96, depth=100, years=(19, 21))
    calls = [Pair(query=r.query.text, text=c.contents) for r in lists for c in r.candidates][: options.pairs]
    parts = {f"{len(calls[::part])} pairs": calls[::part] for part in PARTS}

    def score(some: list[Pair]) -> None:
        forget_texts(encoder)
        encoder.run(some)

    subjects = {name: partial(score, some) for name, some in parts.items()}
    seconds = {n: statistics.median(s) for n, s in alternate(subjects, options.rounds, time.process_time).items()}
    counts = np.array([len(some) for some in parts.values()])
    exponent, _ = np.polyfit(np.log(counts), np.log(list(seconds.values())), 1)
    publish(
        "cost_growth",
        title="Time against the number of pairs",
        about=f"The exponent of time in pairs is {exponent:.3f}. MiniLM student, TREC-DL pairs, one thread, CPU "
        f"seconds, median of {options.rounds} rounds in alternation.",
        rows={name: {"s": seconds[name], "pairs/s": len(some) / seconds[name]} for name, some in parts.items()},
        facts={"exponent": exponent},
    )


if __name__ == "__main__":
    main()
