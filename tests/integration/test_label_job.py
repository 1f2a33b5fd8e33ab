"""The label and rerank jobs on Ray Data: exactly once, whatever happens."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.tiny_models import tiny_cross_encoder_folder
from rich.console import Console

from rerank_ray import config
from rerank_ray.audit import audit
from rerank_ray.errors import InputError, RunError
from rerank_ray.execution import jobs
from rerank_ray.parquet import read_rows, write_rows
from rerank_ray.planning import plan
from rerank_ray.runs import RunFolder
from rerank_ray.schema import CANDIDATES, LABELS
from rerank_ray.settings.jobs import LabelSettings, RerankSettings
from rerank_ray.stages import RankStage

pytestmark = pytest.mark.usefixtures("ray_session")


def label_settings(source: str, **model) -> LabelSettings:
    content = {
        "input": source,
        "teacher": {"method": "yes_no", "model": {"kind": "fake", **model}},
        "execution": {"actors": 2, "rows_per_batch": 4, "rows_per_block": 16, "cpus_per_actor": 1},
    }
    return config.validate(LabelSettings, content, source="test")


def rows_of(run: Path) -> dict[str, dict]:
    """Output rows by query id; fails on a repeated one."""
    rows = list(read_rows(str(run / "data"), pq.read_schema(next((run / "data").glob("*.parquet"))).names))
    by_id = {row["query_id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def undisturbed(source: str, settings: LabelSettings) -> dict[str, dict]:
    """What the same stage gives in a bare loop, without Ray."""
    table = pa.Table.from_pylist(list(read_rows(source, CANDIDATES.names)), schema=CANDIDATES)
    return {row["query_id"]: row for row in RankStage(settings.teacher, "labels")(table).to_pylist()}


def test_every_row_once_and_equal_to_the_bare_loop(make_candidates, tmp_path, console):
    source = make_candidates(150)
    settings = label_settings(source)
    jobs.label(settings, str(tmp_path / "run"), console)
    assert rows_of(tmp_path / "run") == undisturbed(source, settings)
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert state["state"] == "done"
    assert state["counts"]["rows"] == state["counts"]["ok"] == 150
    assert state["counts"]["pairs"] == state["counts"]["usage"]["calls"] == 750
    for path in (tmp_path / "run" / "data").glob("*.parquet"):
        assert pq.read_schema(path).equals(LABELS)


def test_replicas_get_equal_batches_whatever_the_row_groups(make_candidates, tmp_path, console):
    """Two replicas, at most four rows a batch: 22 rows are three batches for each, of four rows and one of two."""
    source = make_candidates(22)
    (file,) = Path(source).glob("*.parquet")
    pq.write_table(pq.read_table(file), file, row_group_size=22)
    settings = label_settings(source)
    jobs.label(settings, str(tmp_path / "run"), console)
    files = (tmp_path / "run" / "data").glob("*.parquet")
    assert sorted(pq.read_metadata(f).num_rows for f in files) == [2, 4, 4, 4, 4, 4]
    assert rows_of(tmp_path / "run") == undisturbed(source, settings)


def test_a_folders_name_is_no_column(make_candidates, tmp_path, console):
    """Readers of Hive partitions would put "expanded" in the place of every query."""
    source = shutil.copytree(make_candidates(8), tmp_path / "query=expanded" / "candidates=100")
    settings = label_settings(str(source))
    jobs.label(settings, str(tmp_path / "run"), console)
    assert rows_of(tmp_path / "run") == undisturbed(str(source), settings)


def test_a_second_start_is_a_no_op_and_another_config_is_refused(make_candidates, tmp_path, console):
    source, run = make_candidates(8), tmp_path / "run"
    jobs.label(label_settings(source), str(run), console)
    files = {p: p.stat().st_mtime_ns for p in (run / "data").glob("*")}
    jobs.label(label_settings(source), str(run), console)
    assert {p: p.stat().st_mtime_ns for p in (run / "data").glob("*")} == files
    with pytest.raises(RunError, match=r"teacher\.model\.seed: 0 -> 1"):
        jobs.label(label_settings(source, seed=1), str(run), console)


def test_a_job_that_finishes_nothing_ends_and_is_resumed(make_candidates, tmp_path, console):
    """A block takes longer than the limit: the first start ends there, and names the settings that help."""
    source, run = make_candidates(4), tmp_path / "run"
    settings = label_settings(source, seconds_per_call=0.2)
    impatient = settings.execution.model_copy(update={"no_progress_timeout_s": 1})
    with pytest.raises(RunError, match=r"no block of rows was finished in 1 s.*execution\.no_progress_timeout_s"):
        jobs.label(settings.model_copy(update={"execution": impatient}), str(run), console)
    jobs.label(settings, str(run), console)
    assert rows_of(run) == undisturbed(source, settings)


@pytest.mark.timeout(900)  # four jobs, three with a Ray of their own
def test_killed_driver_resumes_to_an_undisturbed_run(make_candidates, tmp_path):
    """`kill -9` twice in the middle; the third start ends with every query exactly once."""
    source, run = make_candidates(96), tmp_path / "run"
    settings = label_settings(source, seconds_per_call=0.02)
    file = tmp_path / "label.yaml"
    file.write_text(config.dump(settings))
    for committed in (1, 3):
        driver = start_driver(file, run)
        wait_for(lambda n=committed: len(list((run / "checkpoint").glob("[!.]*.parquet"))) >= n, driver)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    done_before = sum(pq.read_metadata(p).num_rows for p in (run / "checkpoint").glob("*.parquet"))
    assert 0 < done_before < 96
    assert start_driver(file, run).wait(timeout=240) == 0
    assert rows_of(run) == undisturbed(source, settings)
    assert json.loads((run / "run.json").read_text())["starts"] == 3


def start_driver(file: Path, run: Path) -> subprocess.Popen:
    """A label job in its own process, with its own Ray."""
    command = [sys.executable, "-m", "rerank_ray.cli", "label", str(file), "--run", str(run)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, driver: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline, "nothing was committed in time"
        time.sleep(0.05)


def test_a_row_that_kills_its_process_becomes_an_error_and_its_neighbours_do_not(make_candidates, tmp_path, console):
    source = make_candidates(12)
    settings = label_settings(source, crash_on="passage 7 ")
    settings = LabelSettings.model_validate(settings.model_dump() | {"limits": {"max_error_rate": 0.5}})
    jobs.label(settings, str(tmp_path / "run"), console)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 12
    assert "ended its worker's process 2 times" in rows["q0007"]["error"]
    assert [r for r in rows.values() if r["error"]] == [rows["q0007"]]


def test_bad_rows_become_rows_with_error_and_a_bound_fails_the_job(tmp_path, console):
    """Each kind of bad row, beside a good one with emoji, right-to-left text and a 200,000-character document."""
    source, run = str(tmp_path / "candidates"), tmp_path / "run"
    good = {"doc_id": "d", "title": None, "text": "x", "score": 1.0, "label": None}
    bad = {
        "empty-list": [],
        "null-list": None,
        "repeated-doc": [good, good],
        "null-text": [good | {"text": None}],
        "nan-score": [good | {"score": float("nan")}],
        "no-doc-id": [good | {"doc_id": ""}],
    }
    fine = [good | {"text": "🦀 שלום עולם " * 3}, good | {"doc_id": "long", "text": "word " * 40_000}]
    rows = [
        {"query_id": name, "query": "q", "instruction": None, "candidates": c}
        for name, c in (bad | {"fine": fine}).items()
    ]
    write_rows(
        [*rows, {"query_id": "no-query", "query": None, "instruction": None, "candidates": [good]}], source, CANDIDATES
    )
    with pytest.raises(RunError, match=r"error rate 0\.8750 is above limits\.max_error_rate"):
        jobs.label(label_settings(source), str(run), console)
    written = rows_of(run)
    assert {i for i, r in written.items() if r["error"] is None} == {"fine"}
    assert "doc_id 'd' is both candidate 0 and candidate 1" in written["repeated-doc"]["error"]
    assert "'score' is NaN" in written["nan-score"]["error"]
    assert written["no-query"]["scores"] is None
    assert json.loads((run / "run.json").read_text())["state"] == "failed"


def test_retry_errors_does_only_the_failed_rows_again(make_candidates, tmp_path, console):
    """The teacher fails on eleven queries, and again when they are tried again."""
    source, run = make_candidates(40), tmp_path / "run"
    settings = label_settings(source, fail_on="passage 3")
    settings = LabelSettings.model_validate(settings.model_dump() | {"limits": {"max_error_rate": 1.0}})
    jobs.label(settings, str(run), console)
    before = rows_of(run)
    failed = {i for i, r in before.items() if r["error"]}
    assert failed == {"q0003", *(f"q00{n}" for n in range(30, 40))}
    calls_before = json.loads((run / "run.json").read_text())["counts"]["usage"]["calls"]
    jobs.label(settings, str(run), console, retry_errors=True)
    after = rows_of(run)
    assert after == before
    state = json.loads((run / "run.json").read_text())
    assert state["starts"] == 1
    assert state["counts"]["usage"]["calls"] == calls_before
    assert state["timings"]["rows_this_start"] == len(failed)


def test_output_that_was_lost_or_doubled_is_mended(make_candidates, tmp_path, console):
    """A file is gone, which the next start finds at once. Then one is gone and another is there twice, as after a write
    that outlived its driver: that is found when the rows are counted, and mended by the start after that."""
    source, run = make_candidates(40), tmp_path / "run"
    settings = label_settings(source)
    jobs.label(settings, str(run), console)
    before = rows_of(run)
    RunFolder(uri=str(run)).update(state="running")
    min((run / "data").iterdir()).unlink()
    jobs.label(settings, str(run), console)
    assert rows_of(run) == before
    RunFolder(uri=str(run)).update(state="running")
    first, second, *_ = sorted((run / "data").iterdir())
    shutil.copy(second, run / "data" / "other.parquet")
    first.unlink()
    with pytest.raises(RunError, match=r"40 rows of 36 queries for 40 input rows: start the run again"):
        jobs.label(settings, str(run), console)
    jobs.label(settings, str(run), console)
    assert rows_of(run) == before
    state = RunFolder(uri=str(run)).state()
    assert (state["state"], state["timings"]["rows_this_start"]) == ("done", 4)


def test_a_raised_limit_accepts_a_failed_run_and_keeps_its_figures(make_candidates, tmp_path, console):
    source, run = make_candidates(40), tmp_path / "run"
    settings = label_settings(source, fail_on="passage 3")
    with pytest.raises(RunError, match=r"raise the bound"):
        jobs.label(settings, str(run), console)
    before = json.loads((run / "run.json").read_text())
    written = {file: file.stat().st_mtime_ns for file in (run / "data").iterdir()}
    raised = LabelSettings.model_validate(settings.model_dump() | {"limits": {"max_error_rate": 1.0}})
    jobs.label(raised, str(run), console)
    after = json.loads((run / "run.json").read_text())
    assert (before["state"], after["state"]) == ("failed", "done")
    assert after["timings"] == before["timings"]
    assert after["timings"]["rows_this_start"] == 40
    assert written == {file: file.stat().st_mtime_ns for file in (run / "data").iterdir()}


def test_a_run_does_not_go_on_with_another_prompt(make_candidates, tmp_path, console):
    """The config says the same; what is in the file that it names does not."""
    source, run, prompt = make_candidates(8), tmp_path / "run", tmp_path / "mine.yaml"
    prompt.write_text((resources.files("rerank_ray.prompts") / "templates" / "yes_no.yaml").read_text())
    settings = label_settings(source)
    teacher = settings.teacher.model_copy(update={"prompt": str(prompt)})
    settings = settings.model_copy(update={"teacher": teacher})
    jobs.label(settings, str(run), console)
    prompt.write_text(prompt.read_text().replace("Answer Yes or No", "Say Yes or No"))
    with pytest.raises(RunError, match=rf"content of input prompt {prompt}: '\w+' -> '\w+'"):
        jobs.label(settings, str(run), console)


def test_relative_paths_are_those_of_the_jobs_folder(make_candidates, tmp_path, monkeypatch, console):
    """Ray's workers run where Ray was started; the label store must not lie there."""
    source = make_candidates(8)
    monkeypatch.chdir(tmp_path)
    settings = LabelSettings.model_validate(label_settings(source).model_dump() | {"store": {"uri": "store"}})
    jobs.label(settings, "run", console)
    assert len(list((tmp_path / "store").rglob("*.parquet"))) > 0
    assert not (tmp_path / "run" / "attempts").exists()


def test_rerank_writes_rankings_and_a_trec_run(make_candidates, tmp_path, console):
    source, run = make_candidates(20), tmp_path / "run"
    content = {"input": source, "ranker": {"method": "first_stage"}}
    jobs.rerank(config.validate(RerankSettings, content, "test"), str(run), console)
    rows = rows_of(run)
    assert rows["q0000"]["doc_ids"] == ["d0", "d1", "d2", "d3", "d4"]
    assert rows["q0000"]["scores"] == [5.0, 4.0, 3.0, 2.0, 1.0]
    lines = (run / "run.trec").read_text().splitlines()
    assert len(lines) == 100
    assert next(line.split()[:4] for line in lines if line.startswith("q0019 ")) == ["q0019", "Q0", "d0", "1"]


def test_the_share_of_padding_is_told(make_candidates, tmp_path, console):
    """Pairs of fewer than 16 tokens are computed at 16 positions."""
    model = {"kind": "cross_encoder", "path": str(tiny_cross_encoder_folder(tmp_path / "model"))}
    content = {"input": make_candidates(4), "ranker": {"method": "cross_encoder", "model": model}}
    jobs.rerank(config.validate(RerankSettings, content, "test"), str(tmp_path / "run"), console)
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    tokens = state["counts"]["usage"]["prompt_tokens"]
    positions = tokens / (1 - state["timings"]["padding_share"])
    assert round(positions) % 16 == 0
    assert positions > tokens


def test_a_trec_run_may_be_asked_for_afterwards(make_candidates, tmp_path, console):
    """It is made of the rankings that are there, and none of them is made again."""
    source, run = make_candidates(20), tmp_path / "run"
    content = {"input": source, "ranker": {"method": "first_stage"}}
    jobs.rerank(config.validate(RerankSettings, content | {"trec_run": False}, "test"), str(run), console)
    assert not (run / "run.trec").exists()
    before = json.loads((run / "run.json").read_text())
    jobs.rerank(config.validate(RerankSettings, content, "test"), str(run), console)
    after = json.loads((run / "run.json").read_text())
    assert len((run / "run.trec").read_text().splitlines()) == 100
    assert (after["state"], after["timings"]) == ("done", before["timings"])


def test_a_rerank_run_is_done_when_its_trec_run_is_there(make_candidates, tmp_path, console, monkeypatch):
    """Stopped while it is written, the next start writes it, and ranks nothing again."""
    source, run = make_candidates(20), tmp_path / "run"
    settings = config.validate(RerankSettings, {"input": source, "ranker": {"method": "first_stage"}}, "test")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "ranking_from_row", lambda row: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            jobs.rerank(settings, str(run), console)
    assert json.loads((run / "run.json").read_text())["state"] == "running"
    assert not (run / "run.trec").exists()
    jobs.rerank(settings, str(run), console)
    assert json.loads((run / "run.json").read_text())["state"] == "done"
    assert len((run / "run.trec").read_text().splitlines()) == 100


def test_limits_of_a_rerank_job_count_defects(make_candidates, tmp_path, console):
    """Of forty queries eleven have a passage that can't be scored."""
    content = {
        "input": make_candidates(40),
        "ranker": {"method": "cross_encoder", "model": {"kind": "fake", "fail_on": "passage 3 "}},
    }
    settings = config.validate(RerankSettings, content, "test")
    with pytest.raises(RunError, match=r"rate 0\.\d+ is above limits"):
        jobs.rerank(settings, str(tmp_path / "run"), console)
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert state["counts"]["defects"]["unscored"] > 0
    assert state["counts"]["usage"]["calls"] > 0


def test_an_ensemble_teacher_labels_with_its_disagreement_and_a_bound_for_one_kind_fails_it(
    make_candidates, tmp_path, console
):
    """One of three teachers can score nothing of eleven queries: they are errors, and their defects count by kind."""
    source, run = make_candidates(40), tmp_path / "run"
    weak, strong = ({"kind": "fake", "seed": seed} for seed in (1, 2))
    ensemble = {
        "method": "ensemble",
        "rankers": [
            {"method": "cross_encoder", "model": weak},
            {"method": "cascade", "stages": [{"ranker": {"method": "cross_encoder", "model": strong}, "keep": 3}]},
            {"method": "yes_no", "model": strong | {"fail_on": "passage 3"}},
        ],
    }
    content = {"input": source, "teacher": ensemble, "execution": {"rows_per_batch": 4, "rows_per_block": 16}}
    limits = {"max_error_rate": 1.0, "max_defect_rate": 1.0, "max_defect_rates": {"unscored": 0.2}}
    settings = config.validate(LabelSettings, content | {"limits": limits}, source="test")
    with pytest.raises(
        RunError, match=r"rows with unscored defects 0\.2750 is above limits\.max_defect_rates\.unscored"
    ):
        jobs.label(settings, str(run), console)
    rows = rows_of(run)
    assert rows == undisturbed(source, settings)
    failed = {i for i, r in rows.items() if r["error"]}
    assert failed == {"q0003", *(f"q00{n}" for n in range(30, 40))}
    assert all(r["error"].startswith("rankers.2: no candidate could be scored") for r in rows.values() if r["error"])
    good = [r for r in rows.values() if not r["error"]]
    assert all(len(r["uncertainty"]) == 5 and max(r["uncertainty"]) > 0 for r in good)
    assert {r["usage"]["calls"] for r in good} == {13}
    state = json.loads((run / "run.json").read_text())
    assert state["state"] == "failed"
    assert state["rates"]["defects"]["unscored"] == {"per_row": 55 / 40, "rows_affected": 0.275}
    assert audit(str(run))["counts"]["errors"] == 11


def test_a_second_run_over_the_same_rows_asks_the_model_nothing(make_candidates, tmp_path):
    """With 5 % new rows, only those are asked; neither changes a score, and the counts say so."""
    store, printed = {"uri": str(tmp_path / "store")}, []

    def run(rows: int, name: str, store: dict | None) -> tuple[dict, dict]:
        source = make_candidates(rows, name=f"candidates-{rows}")
        content = label_settings(source).model_dump(mode="json") | {"store": store}
        console = Console(width=200, record=True, file=io.StringIO())
        jobs.label(config.validate(LabelSettings, content, source="test"), str(tmp_path / name), console)
        printed.append(" ".join(console.export_text().split()))
        state = json.loads((tmp_path / name / "run.json").read_text())
        return {i: row["scores"] for i, row in rows_of(tmp_path / name).items()}, state

    plain, state = run(42, "plain", None)
    assert state["timings"]["label_store"] is None
    assert state["timings"]["padding_share"] is None  # no model ran here
    for rows, name, calls, hits in ((40, "first", 200, 0), (40, "second", 0, 200), (42, "third", 10, 200)):
        scores, state = run(rows, name, store)
        assert scores == {i: plain[i] for i in scores}
        assert len(scores) == rows
        assert state["counts"]["usage"]["calls"] == calls
        assert state["timings"]["label_store"] == {
            "hits": hits,
            "misses": calls,
            "corrupt_segments": 0,
            "failed_reads": 0,
            "failed_writes": 0,
            "not_stored": 0,
            "hit_rate": hits / (hits + calls),
        }
        assert f"label store │ {hits} of {hits + calls} calls ({hits / (hits + calls):.1%})" in printed[-1]
    assert "label store" not in printed[0]


@pytest.mark.parametrize("name", ["what?", "query_id=1"])
def test_a_folder_that_ray_could_not_read_below_is_refused(make_candidates, tmp_path, console, name):
    """A resume would not find the checkpoint there."""
    with pytest.raises(InputError, match="with '\\?' or 'query_id=' in its name: rename it"):
        jobs.label(label_settings(make_candidates(2)), str(tmp_path / name / "run"), console)
    assert not (tmp_path / name).exists()


def test_a_finished_job_is_compared_with_its_plan(make_candidates, tmp_path, console):
    """All prompts have the same number of words, so that a sample tells the whole."""
    settings, run = label_settings(make_candidates(40)), str(tmp_path / "run")
    plan(settings, run, sample=4)
    jobs.label(settings, run, console)
    compared = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    assert compared["rows"] == 40
    assert compared["predicted"]["calls"] == compared["actual"]["calls"] == 200
    assert compared["predicted"]["tokens"] == compared["actual"]["tokens"] > 0
    assert compared["actual"]["replica_seconds"] > 0


def test_a_resumed_run_may_change_its_store(make_candidates, tmp_path, console):
    source, run = make_candidates(8), str(tmp_path / "run")
    jobs.label(label_settings(source), run, console)
    content = label_settings(source).model_dump(mode="json") | {"store": {"uri": str(tmp_path / "store")}}
    jobs.label(config.validate(LabelSettings, content, source="test"), run, console)
