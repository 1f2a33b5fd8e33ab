"""`rerank-ray quickstart`: make the collection, run the pipeline, show what it cost and what it brought."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console

from rerank_ray import config, storage
from rerank_ray.distill.metrics_log import FILE, written_lines
from rerank_ray.evaluate import EvaluationReport
from rerank_ray.execution.pipeline import run_pipeline
from rerank_ray.models import engine
from rerank_ray.quickstart.collection import build_collection
from rerank_ray.report.page import CurvePoint, PageSystem, render_page
from rerank_ray.report.tables import print_table
from rerank_ray.runs import RunFolder
from rerank_ray.settings.pipeline import PipelineSettings

_TRAIN_QUERIES, _TEST_QUERIES = 100, 50
_QUERIES_WITHOUT_TILES = 50, 40
"""Training and test queries of a CPU that multiplies bfloat16 as vectors (AVX-512 BF16), and takes longer for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Less:
    """What the quickstart does where models run in float32, so that the language model is done in minutes too."""

    train_queries: int = 24
    test_queries: int = 24
    depth: int = 8
    llm_tokens: int = 96
    """Of its whole prompt. Its order hardly suffers; MiniLM's does."""
    tokens: int = 128
    learning_rate: float = 5e-5
    """Larger steps, as there are few."""


_ROLES = {
    "BM25": ("first stage", "test"),
    "SmolLM2-135M query likelihood": ("teacher", "llm"),
    "MiniLM-L6 embedding cosine": ("teacher", "embedding"),
    "both teachers": ("teacher", "teachers"),
    "distilled student": ("student", "reranked"),
}


def quickstart(folder: Path, console: Console, *, full: bool = False) -> None:
    """Run the quickstart in a folder; a second call goes on from what is finished.

    Unless it is to be `full`, it does less where models run in float32.
    """
    started = time.monotonic()
    # Two replicas of one thread each: their matrix products must not fight over the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    collection = folder / "collection"
    less = None if full else _less_where_slow(console)
    if not (collection / "qrels" / "test.tsv").exists():
        train, test = _query_counts(less, full=full)
        documents = build_collection(collection, train_queries=train, test_queries=test)
        console.print(
            f"Collection from this Python installation's docstrings: {documents:,} documents, {train} training and "
            f"{test} test queries"
        )
    results = run_pipeline(_settings(collection, less), str(folder / "pipeline"), console)
    systems = _systems(results["report"], folder / "pipeline")
    _print(systems, console)
    page = folder / "report.html"
    storage.write_text(page, _page(systems, results["report"], folder / "pipeline"))
    console.print(
        f"Finished in {time.monotonic() - started:.0f} s. The report: {page}\n\n"
        "With your own data: copy rerank_ray/quickstart/pipeline.yaml, point its two ingest steps and the report's "
        "qrels at a BEIR folder (or ingest hits or a TREC run), choose a larger teacher, and start it:\n"
        "  rerank-ray pipeline my.yaml --run runs/mine\n"
        f"Use the student by itself: rerank-ray rerank with ranker.model.path={folder}/pipeline/student/student"
    )


def _query_counts(less: _Less | None, *, full: bool) -> tuple[int, int]:
    """Training and test queries."""
    if less is not None:
        return less.train_queries, less.test_queries
    if full or engine.multiplies_tiles(engine.pick_device("auto")):
        return _TRAIN_QUERIES, _TEST_QUERIES
    return _QUERIES_WITHOUT_TILES


def _less_where_slow(console: Console) -> _Less | None:
    if engine.computes_bfloat16(engine.pick_device("auto")):
        return None
    less = _Less()
    console.print(
        "This processor has no bfloat16 products, so models run in float32, several times slower: on "
        f"{less.train_queries} training and {less.test_queries} test queries (elsewhere up to {_TRAIN_QUERIES} "
        f"and {_TEST_QUERIES}) with {less.depth} candidates, cut shorter; --full does it all"
    )
    return less


def _settings(collection: Path, less: _Less | None) -> PipelineSettings:
    path = resources.files("rerank_ray.quickstart") / "pipeline.yaml"
    content = config.read_yaml(str(path))
    for step in content["steps"]:
        if "ingest" in step:
            step["ingest"]["folder"] = str(collection)
        if "evaluate" in step:
            step["evaluate"]["qrels"] = str(collection / "qrels" / "test.tsv")
        if less is not None:
            _lessen(step, less)
        if engine.pick_device("auto").type == "cuda":
            _on_gpu(step)
    return config.validate(PipelineSettings, content, source=str(path))


def _on_gpu(step: dict[str, Any]) -> None:
    """Workers that reserve no GPU see none; two replicas share the first."""
    for job in ("label", "rerank"):
        if job in step:
            step[job]["execution"] = step[job]["execution"] | {"gpus_per_actor": 0.5}
    if "distill" in step:
        step["distill"]["execution"]["gpus_per_worker"] = 1


def _lessen(step: dict[str, Any], less: _Less) -> None:
    if "ingest" in step:
        step["ingest"]["depth"] = less.depth
    if "label" in step:
        model = step["label"]["teacher"]["model"]
        model["max_length"] = less.llm_tokens if model["kind"] == "hf_causal" else less.tokens
    if "distill" in step:
        step["distill"]["student"]["max_length"] = less.tokens
        step["distill"]["sampling"]["group_size"] = less.depth
        step["distill"]["optimizer"]["learning_rate"] = less.learning_rate
    if "rerank" in step:
        step["rerank"]["ranker"]["model"]["max_length"] = less.tokens


def _systems(report: EvaluationReport, pipeline: Path) -> list[PageSystem]:
    systems = []
    for name, (role, step) in _ROLES.items():
        timings = RunFolder(uri=str(pipeline / step)).state().get("timings", {})
        systems.append(
            PageSystem(
                name=name,
                role=role,
                ndcg=report.systems[name].result.means["ndcg@10"],
                pairs_per_second=timings.get("pairs_per_replica_second"),
                parameters=timings.get("model", {}).get("parameters"),
            )
        )
    return systems


def _print(systems: list[PageSystem], console: Console) -> None:
    rows = {
        s.name: {
            "nDCG@10": s.ndcg,
            "pairs/s per core": s.pairs_per_second,
            "million parameters": s.parameters and s.parameters / 1e6,
        }
        for s in systems
    }
    print_table(rows, console, title="Held-out queries", head="ranker")


def _page(systems: list[PageSystem], report: EvaluationReport, pipeline: Path) -> str:
    lines = written_lines(pipeline / "student" / FILE)
    curve = [
        CurvePoint(step=m["step"], loss=m.get("loss/total"), validation_ndcg=m.get("validation_ndcg@10"))
        for m in map(json.loads, lines)
    ]
    queries = report.systems["BM25"].result.queries
    return render_page(
        title="rerank_ray quickstart",
        summary=f"A student distilled from two teachers without relevance judgments, on {queries} held-out queries.",
        systems=systems,
        curve=curve,
        details={"collection": "docstrings of this Python installation", "test queries": str(queries)},
    )
