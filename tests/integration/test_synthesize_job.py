"""`rerank-ray synthesize` on Ray Data: what the model wrote is kept whatever dies, and the rest follows from it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.stub_server import Exchange, chat_reply, serving

from rerank_ray import config
from rerank_ray.errors import InputError, RunError
from rerank_ray.execution.pipeline import run_pipeline
from rerank_ray.execution.synthesis_job import synthesize
from rerank_ray.parquet import inspect_input, read_candidates, read_rows
from rerank_ray.schema import CANDIDATES, PASSAGES, WRITTEN_QUERIES
from rerank_ray.settings.pipeline import PipelineSettings
from rerank_ray.settings.synthesize import SynthesizeSettings
from rerank_ray.stages import RankStage, WriteStage
from rerank_ray.synthesize import draw_passages

pytestmark = pytest.mark.usefixtures("ray_session")

CROSS_ENCODER = {"method": "cross_encoder", "model": {"kind": "fake"}}


def settings_of(tmp_path: Path, documents: int = 40, **content) -> SynthesizeSettings:
    """Passages of six words, of which each shares some with others; the writer takes four of them."""
    corpus = tmp_path / "corpus.jsonl"
    if not corpus.exists():
        words = ["alpha", "beta", "gamma", "delta", "kappa", "zeta", "theta"]
        texts = [" ".join([f"number{n}", *(words[(n * k) % 7] for k in range(1, 6))]) for n in range(documents)]
        corpus.write_text("".join(json.dumps({"_id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(texts)))
    writer = {"model": {"kind": "fake", "writes": "queries", **content.pop("model", {})}}
    execution = {"actors": 2, "rows_per_batch": 4, "rows_per_block": 8, "cpus_per_actor": 1}
    full = {"corpus": str(corpus), "writer": writer, "depth": 10, "max_copied_words": None, "execution": execution}
    return config.validate(SynthesizeSettings, full | content, "test")


def by_id(rows) -> dict[str, dict]:
    found = list(rows)
    assert len({row["query_id"] for row in found}) == len(found)
    return {row["query_id"]: row for row in found}


def undisturbed(settings: SynthesizeSettings) -> dict[str, dict]:
    """What the stage writes in a bare loop, without Ray."""
    table = pa.Table.from_pylist(list(draw_passages(settings)), schema=PASSAGES)
    return by_id(WriteStage(settings.writer)(table).to_pylist())


def test_every_query_is_kept_or_counted_and_can_be_labelled(tmp_path, console):
    """Passages with number3 fail; a fake cross-encoder finds some of the others back among their candidates."""
    settings = settings_of(
        tmp_path,
        model={"fail_on": "number3"},
        limits={"max_error_rate": 0.5},
        round_trip={"ranker": CROSS_ENCODER, "top": 3},
    )
    run = tmp_path / "run"
    synthesize(settings, str(run), console)
    assert by_id(read_rows(str(run / "written" / "data"), WRITTEN_QUERIES.names)) == undisturbed(settings)
    state = json.loads((run / "run.json").read_text())
    counts = state["counts"]
    assert counts["queries"] == 40
    assert counts["queries"] == counts["rows"] + sum(counts["left_out"].values())
    assert counts["left_out"]["not_written"] == counts["defects"]["unscored"] == 11
    assert counts["left_out"]["not_found_by_round_trip"] > 0
    lists = list(read_candidates(str(run / "data")))
    assert len(lists) == counts["rows"] > 0
    ranked = by_id(read_rows(str(run / "round_trip" / "data"), ["query_id", "scores", "candidates"]))
    for c in lists:
        doc_id = c.query.query_id.split("-")[1]
        assert [x.doc_id for x in c.candidates if x.label == 1.0] == [doc_id]
        row = ranked[c.query.query_id]
        scores = dict(zip((x["doc_id"] for x in row["candidates"]), row["scores"], strict=True))
        assert sum(score > scores[doc_id] for score in scores.values()) < 3
    assert inspect_input(str(run / "data"), CANDIDATES).rows == len(lists)
    table = pa.Table.from_pylist(list(read_rows(str(run / "data"), CANDIDATES.names)), schema=CANDIDATES)
    assert set(RankStage(settings.round_trip.ranker, "labels")(table)["error"].to_pylist()) == {None}


def test_a_second_start_is_a_no_op_another_config_is_refused_and_so_is_a_run_without_queries(tmp_path, console):
    run = tmp_path / "run"
    synthesize(settings_of(tmp_path, passages=8), str(run), console)
    files = {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")}
    synthesize(settings_of(tmp_path, passages=8), str(run), console)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")} == files
    with pytest.raises(RunError, match="passages: 8 -> 9"):
        synthesize(settings_of(tmp_path, passages=9), str(run), console)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text() + '{"_id": "new", "text": "another"}\n')
    with pytest.raises(RunError, match="content of input"):
        synthesize(settings_of(tmp_path, passages=8), str(run), console)
    (tmp_path / "empty").mkdir()
    gone = settings_of(tmp_path).model_copy(update={"corpus": str(tmp_path / "empty")})
    with pytest.raises(InputError, match=r"empty: the input holds no \.parquet file"):
        synthesize(gone, str(tmp_path / "gone"), console)
    failing = settings_of(tmp_path, passages=8, model={"fail_on": "number"}, limits={"max_error_rate": 1.0})
    with pytest.raises(RunError, match="no query is left"):
        synthesize(failing, str(tmp_path / "none"), console)
    assert json.loads((tmp_path / "none" / "run.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_killed_driver_resumes_to_an_undisturbed_run(tmp_path, console):
    """`kill -9` while the model writes; the next start writes only what is missing, and ends as if nothing had been."""
    settings = settings_of(tmp_path, documents=64, model={"seconds_per_call": 0.2})
    file, run = tmp_path / "synthesize.yaml", tmp_path / "run"
    file.write_text(config.dump(settings))
    driver = start_driver(file, run)
    checkpoint = run / "written" / "checkpoint"
    deadline = time.monotonic() + 200
    while not list(checkpoint.glob("[!.]*.parquet")):
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline, "nothing was committed in time"
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = sum(pq.read_metadata(p).num_rows for p in checkpoint.glob("[!.]*.parquet"))
    assert 0 < done < 64
    assert start_driver(file, run).wait(timeout=250) == 0
    assert by_id(read_rows(str(run / "written" / "data"), WRITTEN_QUERIES.names)) == undisturbed(settings)
    again = json.loads((run / "written" / "run.json").read_text())
    assert again["timings"]["rows_this_start"] == 64 - done
    synthesize(settings, str(tmp_path / "other"), console)
    assert list(read_candidates(str(run / "data"))) == list(read_candidates(str(tmp_path / "other" / "data")))


def start_driver(file: Path, run: Path) -> subprocess.Popen:
    """A job in its own process, with its own Ray."""
    command = [sys.executable, "-m", "rerank_ray.cli", "synthesize", str(file), "--run", str(run)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_pipeline_does_the_failed_rows_of_the_step_that_ended_it_again(tmp_path, console):
    """A server refuses eleven of forty passages, for a while; what it answered is not asked again."""
    refused = "number3"
    asked: list[str] = []

    def behave(exchange: Exchange) -> None:
        words = re.findall(r"number\d+(?: \w+)+", exchange.body["messages"][-1]["content"])
        asked.extend(words)  # none in the question that a replica tries the server with
        if refused and words and words[0].startswith(refused):
            exchange.send({"error": {"message": "not now"}}, status=400)
        else:
            exchange.send(chat_reply(" ".join("".join(words).split()[:4])))

    with serving(behave) as stub:
        model = {"kind": "openai_http", "url": stub.url, "model": "stub"}
        settings = settings_of(tmp_path).model_dump(mode="json") | {"writer": {"model": model}}
        pipeline = PipelineSettings.model_validate({"steps": [{"name": "queries", "synthesize": settings}]})
        run = tmp_path / "run"
        for retry_errors in (False, False, True):
            with pytest.raises(RunError, match="use --retry-errors"):
                run_pipeline(pipeline, str(run), console, retry_errors=retry_errors)
        assert len(asked) == 40 + 11
        refused = ""
        run_pipeline(pipeline, str(run), console, retry_errors=True)
        assert len(asked) == 40 + 11 + 11
        run_pipeline(pipeline, str(run), console, retry_errors=True)
        assert len(asked) == 40 + 11 + 11
    counts = json.loads((run / "queries" / "run.json").read_text())["counts"]
    assert counts["queries"] == 40
    assert counts["left_out"]["not_written"] == 0
