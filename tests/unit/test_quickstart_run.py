"""What the quickstart shows at its end, from run folders as its pipeline leaves them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import rerank_ray.quickstart.run as run_module
from rerank_ray.cli import main
from rerank_ray.evaluate import evaluate_sources
from rerank_ray.models import engine
from rerank_ray.quickstart.run import _ROLES, _Less, _less_where_slow, _page, _print, _query_counts, _settings, _systems


def finished_pipeline(folder: Path) -> Path:
    """Run folders with timings, training metrics, one TREC run for each system, and qrels of two queries."""
    for number, (_, step) in enumerate(_ROLES.values()):
        (folder / step).mkdir(parents=True)
        timings = {"pairs_per_replica_second": 10.0 * number, "model": {"name": "m", "parameters": 22_713_216}}
        (folder / step / "run.json").write_text(json.dumps({"timings": timings if number else {}}))
        (folder / f"{step}.trec").write_text("q1 Q0 a 1 2 x\nq1 Q0 b 2 1 x\nq2 Q0 b 1 2 x\n")
    (folder / "student").mkdir()
    points = [{"step": 0, "validation_ndcg@10": 0.5}, {"step": 20, "validation_ndcg@10": 0.6, "loss/total": 1.0}]
    (folder / "student" / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    (folder / "qrels.txt").write_text("q1 0 a 1\nq2 0 a 1\n")
    return folder


def test_the_table_and_the_page_show_every_system(tmp_path: Path):
    """q1 is answered at rank 1 and q2 not at all, so each nDCG@10 is 0.5."""
    folder = finished_pipeline(tmp_path)
    sources = [f"{name}={folder / step}.trec" for name, (_, step) in _ROLES.items()]
    report = evaluate_sources(sources, qrels=str(folder / "qrels.txt"), metrics=["ndcg@10"])
    systems = _systems(report, folder)
    assert [s.ndcg for s in systems] == [0.5] * len(_ROLES)
    assert systems[0].pairs_per_second is None
    out = io.StringIO()
    _print(systems, Console(file=out, width=120))
    page = _page(systems, report, folder)
    for name in _ROLES:
        assert name in out.getvalue()
        assert name in page
    assert "22.7" in out.getvalue()


def test_the_pipeline_names_the_collection(tmp_path: Path):
    settings = _settings(tmp_path / "collection", None)
    folders = {step.ingest.folder for step in settings.steps if step.ingest}
    assert folders == {str(tmp_path / "collection")}
    assert settings.steps[-1].evaluate.qrels == str(tmp_path / "collection" / "qrels" / "test.tsv")
    assert set(settings.steps[-1].evaluate.rankings) == set(_ROLES)


def test_a_slow_processor_gets_less_and_says_so(monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    for native, expected in ((True, None), (False, _Less())):
        monkeypatch.setattr(engine, "computes_bfloat16", lambda device, native=native: native)
        assert _less_where_slow(Console(file=out, width=200)) == expected
    assert out.getvalue().count("no bfloat16 products") == 1


def test_on_a_gpu_every_model_reserves_some_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "pick_device", lambda name: torch.device("cuda"))
    steps = {step.name: step for step in _settings(tmp_path, None).steps}
    of_models = ("llm-labels", "embedding-labels", "llm", "embedding", "reranked")
    needs = [getattr(steps[name], steps[name].job).execution.needs.total.gpus for name in of_models]
    assert needs == [1.0] * len(of_models)
    assert steps["student"].distill.execution.needs.total.gpus == 1.0


def test_fewer_queries_where_a_cpu_has_no_tiles(monkeypatch: pytest.MonkeyPatch):
    for tiles, expected in ((True, (100, 50)), (False, (50, 40))):
        monkeypatch.setattr(engine, "multiplies_tiles", lambda device, tiles=tiles: tiles)
        assert _query_counts(None, full=False) == expected
        assert _query_counts(None, full=True) == (100, 50)
        assert _query_counts(_Less(), full=False) == (24, 24)


def test_less_reaches_every_step(tmp_path: Path):
    less = _Less(depth=7, llm_tokens=90, tokens=110)
    steps = {step.name: step for step in _settings(tmp_path, less).steps}
    assert steps["train"].ingest.depth == steps["test"].ingest.depth == 7
    assert steps["llm-labels"].label.teacher.model.max_length == steps["llm"].label.teacher.model.max_length == 90
    assert steps["embedding-labels"].label.teacher.model.max_length == 110
    assert steps["embedding"].label.teacher.model.max_length == 110
    assert steps["student"].distill.student.max_length == steps["reranked"].rerank.ranker.model.max_length == 110
    assert steps["student"].distill.sampling.group_size == 7
    assert steps["student"].distill.optimizer.learning_rate == less.learning_rate


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ([], "runs/quickstart"),
        (["--full"], "runs/quickstart-full"),
        (["--full", "--run", "mine"], "mine"),
    ],
)
def test_all_of_it_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, options: list[str], folder: str):
    """Less of it may lie in the other: `make quickstart` on a processor without bfloat16."""
    started = []
    monkeypatch.setattr(run_module, "quickstart", lambda folder, console, full: started.append((str(folder), full)))
    assert main(["quickstart", *options]) == 0
    assert started == [(folder, "--full" in options)]
