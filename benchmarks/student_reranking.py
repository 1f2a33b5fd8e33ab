"""A student's scoring against sentence-transformers' CrossEncoder and against the machine's own matrix product.

    RERANK_RAY_DATA=DIR python benchmarks/student_reranking.py STUDENT [--queries 43] [--depth 50] [--threads 2]
        [--name student_reranking]

STUDENT is the folder of a trained cross-encoder with the linear head, BERT's kind, which both load; `predict` runs with
its defaults (float32, batches of 32, sorted by length). The pairs are BM25's for TREC-DL 2019. On one thread seconds
are those of the process, which other programs on the machine don't prolong; on several they are the clock's.

Floating-point work: a layer multiplies each token's H-vector with 4·H·H weights in attention and 2·H·F in the
feed-forward block, and attention itself takes 2·L·H for the products with the keys and as much for the values, a
multiply and an add each: 2·(4·H² + 2·H·F) + 4·L·H for each of a pair's L tokens and each layer. Of the last layer the
head reads the first token alone, and of the others it takes keys and values, 2·2·H². The machine's own speed
is that of the product of two 2048 × 2048 matrices, measured in the same rounds; what the work takes at that speed is
the floor. The product is in bfloat16 where the processor has it, and in float32 elsewhere, where no row is in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch
from harness import DL19_QRELS, agreement, alternate, forget_texts, mean_ndcg, publish, qrels_of, ratio, trec_dl_lists
from sentence_transformers import CrossEncoder as Public

from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.engine import pick_dtype
from rerank_ray.models.protocol import Pair
from rerank_ray.settings.models import CrossEncoderSettings

SIZE, PRODUCTS = 2048, 20
NAME, TITLE = "student_reranking", "A student's scoring"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--queries", type=int, default=43)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default=NAME, help="of the record and of the section in the docs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lists = trec_dl_lists(options.queries, options.depth)
    pairs = [(r.query.text, c.contents) for r in lists for c in r.candidates]
    calls = [Pair(query=query, text=text) for query, text in pairs]
    own = pick_dtype("auto", torch.device("cpu"))
    fastest = str(own).removeprefix("torch.")
    ours = {
        how: CrossEncoder(
            CrossEncoderSettings(path=options.student, dtype=how.split(",")[0], compile="compiled" in how)
        )
        for how in dict.fromkeys(["float32", fastest, f"{fastest}, compiled", "int8", "int8, compiled"])
    }
    public = Public(options.student, max_length=ours["float32"].student.description.max_length, device="cpu")
    square = torch.randn(SIZE, SIZE).to(own)
    scores: dict[str, Sequence[float]] = {}

    def predict() -> None:
        scores["CrossEncoder.predict, defaults"] = public.predict(
            pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False
        ).tolist()

    def score(how: str) -> None:
        forget_texts(ours[how])
        scores[f"rerank_ray, {how}"] = [a.value for a in ours[how].run(calls)]

    started = time.perf_counter()
    score(f"{fastest}, compiled")
    compilation = time.perf_counter() - started
    seconds = alternate(
        {
            "CrossEncoder.predict, defaults": predict,
            **{f"rerank_ray, {how}": partial(score, how) for how in ours},
            "product": lambda: [square @ square for _ in range(PRODUCTS)],
        },
        options.rounds,
        time.process_time if options.threads == 1 else time.perf_counter,
    )
    first = "CrossEncoder.predict, defaults"
    config = ours["float32"].student.pretrained.config
    lengths = [len(e["input_ids"]) for e in ours["float32"].student.encode(*zip(*pairs, strict=True))]
    work = sum(operations(length, config) for length in lengths)
    floor = [work * s / (PRODUCTS * 2 * SIZE**3) for s in seconds["product"]]
    qrels = qrels_of(DL19_QRELS)
    rows = {
        name: {
            "pairs/s": len(pairs) / statistics.median(seconds[name]),
            "times the first": ratio(seconds[first], seconds[name]),
            "of the machine's product": ratio(floor, seconds[name]),
            "nDCG@10": mean_ndcg(lists, scores[name], qrels),
            **agreement(lists, scores[name], scores[first]),
        }
        for name in (first, *(f"rerank_ray, {how}" for how in ours))
    }
    speed = PRODUCTS * 2 * SIZE**3 / statistics.median(seconds["product"])
    publish(
        options.name,
        title=TITLE if options.name == NAME else f"{TITLE} ({options.name})",
        about=f"{len(pairs)} pairs of TREC-DL 2019, {statistics.mean(lengths):.0f} tokens on average, "
        f"{work / len(pairs) / 1e9:.2f} GFLOP a pair; the machine multiplies {SIZE}² {fastest} matrices at "
        f"{speed / 1e12:.2f} TFLOP/s, at which {speed / work * len(pairs):.0f} pairs/s would be the most. "
        f"{options.threads} thread(s), median of {options.rounds} rounds in alternation. Differences and Kendall τ "
        "(mean over queries) are to the scores of the first row. The first run of the compiled student took "
        f"{compilation:.0f} s of the clock, compilation included.",
        rows=rows,
    )


def operations(length: int, config) -> int:
    """Floating-point operations of a pair of so many tokens in the encoder's layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    token = 2 * (4 * hidden**2 + 2 * hidden * inner) + 4 * length * hidden
    key_and_value = 2 * 2 * hidden**2
    return (config.num_hidden_layers - 1) * length * token + (length - 1) * key_and_value + token


if __name__ == "__main__":
    main()
