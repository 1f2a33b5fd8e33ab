from __future__ import annotations

import io
import json
import math
import os
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.full_disk import full_disk
from rich.console import Console

from rerank_ray import cli, parquet, schema
from rerank_ray.errors import ConfigError, InputError, RunError
from rerank_ray.evaluate import SourceKind, evaluate_sources, load_rankings, print_report
from rerank_ray.execution import pipeline
from rerank_ray.settings.jobs import EvaluateSettings

DOCS = ("a", "b", "c")


def candidate_row(query_id: str, doc_ids: tuple[str, ...] = DOCS) -> dict:
    return {
        "query_id": query_id,
        "query": "what",
        "instruction": None,
        "candidates": [{"doc_id": d, "title": None, "text": "t", "score": 1.0, "label": 1.0} for d in doc_ids],
    }


def labels_row(query_id: str, scores: list[float] | None, error: str | None = None) -> dict:
    return {**candidate_row(query_id), "teacher": "t", "scores": scores, "defects": [], "error": error}


def ranking_row(query_id: str, doc_ids: list[str], error: str | None = None) -> dict:
    return {"query_id": query_id, "doc_ids": doc_ids, "scores": None, "model": "m", "error": error}


@pytest.fixture
def qrels(tmp_path: Path) -> str:
    path = tmp_path / "qrels.txt"
    path.write_text("q1 0 c 1\nq2 0 a 1\nq3 0 a 1\n")
    return str(path)


def write_run(folder: Path, rows: list[dict], layout: object) -> str:
    parquet.write_rows(rows, str(folder / "data"), layout, rows_per_file=2)
    (folder / "run.json").write_text('{"kind": "label", "state": "done"}')
    return str(folder)


def test_every_kind_of_source(tmp_path: Path, qrels: str) -> None:
    """c is relevant for q1, a for q2 and q3.

    first stage: a b c for q1 and q2 -> MRR (1/3 + 1 + 0) / 3. Labels: q1 by scores 1, NaN, 2 -> c a b, RR 1; q2 has
    `error`; q3 ties, so first-stage order, RR 1 -> (1 + 0 + 1) / 3. Rankings: q1 c first, q2 a second -> (1 + 1/2) / 3.
    The TREC run's rank column says c a for q1 although a stands first -> 1/3.
    """
    candidates = tmp_path / "candidates"
    parquet.write_rows(
        [candidate_row("q1"), candidate_row("q2"), candidate_row("q8")], str(candidates), schema.CANDIDATES
    )
    labels = write_run(
        tmp_path / "labels",
        [labels_row("q1", [1.0, math.nan, 2.0]), labels_row("q2", None, "boom"), labels_row("q3", [5.0, 5.0, 5.0])],
        schema.LABELS,
    )
    ranked = write_run(
        tmp_path / "ranked", [ranking_row("q1", ["c", "a"]), ranking_row("q2", ["b", "a"])], schema.RANKINGS
    )
    run = tmp_path / "bm25.trec"
    run.write_text("q1 Q0 a 2 9.0 x\nq1 Q0 c 1 9.0 x\n")
    report = evaluate_sources(
        [str(candidates), labels, f"student={ranked}", str(run)], qrels=qrels, metrics=["mrr@10", "RR@10"]
    )
    means = {name: s.result.means["mrr@10"] for name, s in report.systems.items()}
    assert means == {
        "candidates": pytest.approx((1 / 3 + 1) / 3),
        "labels": pytest.approx(2 / 3),
        "student": pytest.approx(1.5 / 3),
        "bm25": pytest.approx(1 / 3),
    }
    assert [s.kind for s in report.systems.values()] == [
        SourceKind.CANDIDATES,
        SourceKind.LABELS,
        SourceKind.RANKINGS,
        SourceKind.RUN_FILE,
    ]
    assert [s.rows_with_error for s in report.systems.values()] == [0, 1, 0, 0]
    assert report.systems["candidates"].result.rankings_without_qrels == 1
    assert len(report.metrics) == 1
    assert len(report.comparisons) == 6

    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["systems"]["labels"]["counts"]["queries_without_ranking"] == 1
    assert stored["systems"]["labels"]["per_query"]["mrr@10"] == {"q1": 1.0, "q2": 0.0, "q3": 1.0}
    assert "1 / rank" in stored["metrics"]["mrr@10"]
    assert {"first", "second", "p_randomisation_holm", "p_t_holm"} <= stored["significance"][0].keys()

    output = io.StringIO()
    print_report(report, Console(file=output, width=160))
    assert "0.6667" in output.getvalue()
    assert "rows_with_error" in output.getvalue()


def test_beir_qrels(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq1\tb\t1\n")
    folder = tmp_path / "first"
    parquet.write_rows([candidate_row("q1")], str(folder), schema.CANDIDATES)
    report = evaluate_sources([str(folder)], qrels=str(path), metrics=["mrr"])
    assert report.systems["first"].result.means == {"mrr": 0.5}


def test_lists_named_item_and_texts_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older writers name the list's group 'item'; in both layouts just the ids are decoded."""
    parquet.write_rows([candidate_row("q1")], str(tmp_path / "new"), schema.CANDIDATES)
    table = pq.read_table(tmp_path / "new" / "part-00000.parquet")
    item_type = schema.CANDIDATES.field("candidates").type.value_field.with_name("item")
    index = table.schema.get_field_index("candidates")
    cast = table.column(index).cast(pa.list_(item_type))
    old = tmp_path / "old.parquet"
    pq.write_table(table.set_column(index, "candidates", cast), old, use_compliant_nested_type=False)
    leaves = [pq.ParquetFile(old).schema.column(i).path for i in range(8)]
    assert "candidates.list.item.doc_id" in leaves

    asked: list[list[str]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, **kwargs: object) -> object:
        asked.append(kwargs["columns"])
        return original(self, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    assert load_rankings(str(old)).rankings == load_rankings(str(tmp_path / "new")).rankings == {"q1": DOCS}
    assert asked == [
        ["query_id", "candidates.list.item.doc_id"],
        ["query_id", "candidates.list.element.doc_id"],
    ]


def test_refusals_name_the_fix(tmp_path: Path, qrels: str) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        load_rankings(str(tmp_path / "absent"))
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "run.json").write_text('{"kind": "distill", "state": "done"}')
    with pytest.raises(InputError, match="wrote no rows"):
        load_rankings(str(trained))
    twice = write_run(tmp_path / "twice", [ranking_row("q1", ["a"])] * 3, schema.RANKINGS)
    with pytest.raises(InputError, match="'q1' appears twice"):
        load_rankings(twice)
    misaligned = write_run(tmp_path / "misaligned", [labels_row("q1", [1.0])], schema.LABELS)
    with pytest.raises(InputError, match="1 entries for 3 candidates"):
        load_rankings(misaligned)
    unscored = write_run(tmp_path / "unscored", [labels_row("q1", None)], schema.LABELS)
    with pytest.raises(InputError, match="although 'error' is null"):
        load_rankings(unscored)
    null = {"query_id": "q1", "query": "q", "candidates": [{"doc_id": "a", "text": "a"}, None]}
    with pytest.raises(InputError, match="'q1': candidate 1 is null"):
        load_rankings(write_run(tmp_path / "null", [null], schema.CANDIDATES))
    other = write_run(tmp_path / "other", [ranking_row("z", ["a"])], schema.RANKINGS)
    with pytest.raises(InputError, match="another set's qrels"):
        evaluate_sources([other], qrels=qrels)
    with pytest.raises(ConfigError, match="NAME=PATH"):
        evaluate_sources([other, other], qrels=qrels)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        load_rankings(str(tmp_path / "broken.parquet"))


def test_qrels_of_another_collection_are_refused(tmp_path: Path, qrels: str) -> None:
    """Query ids are numbers from 1 in many collections: every measure would be 0. Of errors alone nothing is known."""
    other = write_run(tmp_path / "other", [ranking_row("q9", ["a"]), ranking_row("q1", ["A", "B"])], schema.RANKINGS)
    message = r"other: .*qrels\.txt judges none of its documents \(query 'q1': it ranks 'A', they judge 'c'\)"
    with pytest.raises(InputError, match=message):
        evaluate_sources([other], qrels=qrels)
    one = write_run(tmp_path / "one", [ranking_row("q1", ["A"]), ranking_row("q3", ["b", "a"])], schema.RANKINGS)
    failed = write_run(tmp_path / "failed", [ranking_row("q1", [], error="boom")], schema.RANKINGS)
    report = evaluate_sources([one, failed], qrels=qrels, metrics=["mrr"])
    assert report.systems["one"].result.means["mrr"] == pytest.approx(0.5 / 3)


def test_doc_ids_of_queries_that_nobody_judged_are_not_kept(tmp_path: Path, qrels: str) -> None:
    """A run may be of millions of queries, and the qrels of some thousand; the others are counted."""
    path = write_run(tmp_path / "run", [ranking_row("q1", ["c"]), ranking_row("z", ["a", "b"])], schema.RANKINGS)
    assert load_rankings(path, wanted={"q1"}).rankings == {"q1": ("c",), "z": ()}
    result = evaluate_sources([path], qrels=qrels, metrics=["mrr"]).systems["run"].result
    assert result.rankings_without_qrels == 1
    assert result.per_query["mrr"]["q1"] == 1.0


def test_systems_that_differ_are_compared_on_a_single_query(tmp_path: Path) -> None:
    path = tmp_path / "one.qrels"
    path.write_text("q1 0 a 1\n")
    systems = [write_run(tmp_path / "-".join(ids), [ranking_row("q1", ids)], schema.RANKINGS) for ids in ("ab", "ba")]
    (c,) = evaluate_sources(systems, qrels=str(path), metrics=["mrr"]).comparisons
    assert (c.difference, c.p_randomisation, c.p_t) == (0.5, 1.0, 1.0)


def test_names(tmp_path: Path) -> None:
    """An existing path with '=' in it is a path, not a name."""
    folder = tmp_path / "date=2020"
    parquet.write_rows([candidate_row("q1")], str(folder), schema.CANDIDATES)
    assert load_rankings(str(folder)).name == "date=2020"
    assert load_rankings(f"{folder}/part-00000.parquet").name == "part-00000"


def test_names_of_sources(tmp_path: Path, qrels: str) -> None:
    """`NAME=PATH` of a command, and any name at all of a config; a URI has its own `:` and `/`."""
    folder = tmp_path / "date=2020"
    parquet.write_rows([candidate_row("q1")], str(folder), schema.CANDIDATES)
    given = [str(folder), f"bm25={folder}", f"remote={folder.as_uri()}"]
    assert list(evaluate_sources(given, qrels=qrels).systems) == ["date=2020", "bm25", "remote"]
    named = {"BM25: tuned": str(folder), "student (k=10)": folder.as_uri()}
    assert list(evaluate_sources(named, qrels=qrels).systems) == list(named)


@pytest.mark.parametrize(("state", "refused"), [("running", True), ("failed", False), ("done", False)])
def test_a_run_that_has_not_ended_is_not_evaluated(tmp_path: Path, state: str, refused: bool) -> None:
    run = write_run(tmp_path / "run", [ranking_row("q1", ["a"])], schema.RANKINGS)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"kind": "rerank", "state": state}))
    with pytest.raises(RunError, match="this rerank run is running") if refused else nullcontext():
        assert load_rankings(run).rankings == {"q1": ("a",)}


def test_every_querys_values_as_a_table(tmp_path: Path, qrels: str) -> None:
    """One system ranks c, of q1, first and a, of q2, second; the other a first; neither has q3."""
    one = write_run(tmp_path / "one", [ranking_row("q1", ["c"]), ranking_row("q2", ["b", "a"])], schema.RANKINGS)
    two = write_run(tmp_path / "two", [ranking_row("q2", ["a"])], schema.RANKINGS)
    expected = (
        "query_id\tmetric\tone\ttwo\n"
        "q1\tmrr\t1.0\t0.0\nq2\tmrr\t0.5\t1.0\nq3\tmrr\t0.0\t0.0\n"
        "q1\trecall@1\t1.0\t0.0\nq2\trecall@1\t0.0\t1.0\nq3\trecall@1\t0.0\t0.0\n"
    )
    settings = EvaluateSettings(rankings={"one": one, "two": two}, qrels=qrels, metrics=("mrr", "recall@1"))
    pipeline.evaluate(settings, str(tmp_path / "run"), Console(quiet=True))
    assert (tmp_path / "run" / "per_query.tsv").read_text() == expected
    command = ["evaluate", one, two, "--qrels", qrels, "--metrics", "mrr,recall@1"]
    assert cli.main([*command, "--per-query", str(tmp_path / "new" / "out.tsv")]) == 0
    assert (tmp_path / "new" / "out.tsv").read_text() == expected


@pytest.mark.parametrize("option", ["--json", "--per-query"])
@pytest.mark.parametrize("place", ["out", "qrels.txt/out", "folder", "pipe"])
def test_a_file_that_can_not_be_written_is_one_line(
    tmp_path: Path, qrels: str, option: str, place: str, capsys
) -> None:
    """On a full disk; below a file, or where a folder or a pipe is, which is known before anything is evaluated."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    run = write_run(tmp_path / "run", [ranking_row("q1", ["c"])], schema.RANKINGS)
    with full_disk(20):
        assert cli.main(["evaluate", run, "--qrels", qrels, option, str(tmp_path / place)]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    said = {"folder": "is a folder", "pipe": "is no plain file"}.get(place, "can't be written")
    assert line.startswith(f"error: {tmp_path / place}: {said}")
    assert bool(captured.out) == (place == "out")


def test_one_file_can_not_hold_two_reports(tmp_path: Path, qrels: str, capsys) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["evaluate", "run", "--qrels", qrels, "--json", out, "--per-query", out]) == 1
    assert capsys.readouterr().err == f"error: {out}: --json and --per-query name one file: name two\n"


def test_a_refusal_of_the_system_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Whatever it is that can't be opened."""
    monkeypatch.setattr("rerank_ray.evaluate.evaluate_sources", lambda *_, **__: (tmp_path / "locked").read_text())
    assert cli.main(["evaluate", "run", "--qrels", "qrels"]) == 1
    assert capsys.readouterr().err == f"error: [Errno 2] No such file or directory: '{tmp_path / 'locked'}'\n"
