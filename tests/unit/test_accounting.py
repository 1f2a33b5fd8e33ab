"""What a run's output adds up to, and taking errors out of it so that a resume does those rows again."""

from __future__ import annotations

import shutil
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.rows import label_row, make_list, write_labels

from rerank_ray import parquet, schema, storage
from rerank_ray.accounting import (
    Counts,
    count_output,
    count_rows,
    delete_uncommitted,
    passed_bounds,
    rebuild_checkpoint,
)
from rerank_ray.config import validate
from rerank_ray.errors import ConfigError, RunError
from rerank_ray.execution.jobs import finish
from rerank_ray.records import Defect, DefectKind, Ranking, Scores, Usage
from rerank_ray.runs import RunFolder
from rerank_ray.schema import LABELS, RANKINGS
from rerank_ray.settings.jobs import LimitSettings


def good(query_id: str) -> dict:
    return label_row(make_list(query_id), [1.0, 2.0, 3.0])


def bad(query_id: str, error: str = "boom") -> dict:
    return label_row(make_list(query_id), None, error=error)


def ids_in(folder: Path) -> list[str]:
    return [row["query_id"] for row in parquet.read_rows(str(folder), ["query_id"])]


# Counting


def test_counts_of_labels(tmp_path: Path):
    """Three rows of three candidates: one with two defects and usage, one without, one with an error."""
    scores = Scores(
        scores=(1.0, float("nan"), float("nan")),
        defects=(
            Defect(kind=DefectKind.UNSCORED, detail="d1: a: b"),
            Defect(kind=DefectKind.NOT_IN_RUN, detail="d2"),
        ),
    )
    usage = Usage(calls=3, prompt_tokens=30, cached_tokens=5, output_tokens=2)
    costly = schema.candidate_row(make_list("q1")) | schema.label_columns("t", scores, usage)
    write_labels(tmp_path, [costly, good("q2"), bad("q3", "out of luck")], rows_per_file=2)
    assert count_output(str(tmp_path), 3).to_dict() == {
        "rows": 3,
        "ok": 2,
        "errors": 1,
        "rows_with_defects": 1,
        "rows_with_parse_failures": 0,
        "rows_without_calls": 1,
        "pairs": 6,
        "defects": {"unscored": 1, "not_in_run": 1},
        "rows_by_defect": {"unscored": 1, "not_in_run": 1},
        "examples": ["q3: out of luck"],
        "usage": {"calls": 3, "prompt_tokens": 30, "cached_tokens": 5, "output_tokens": 2},
    }


def test_rates_and_bounds_by_hand(tmp_path: Path):
    """Four rows, twenty calls: two refusals and a repair in one, a refusal in an error's row, two clean."""
    refusal, repair = (Defect(kind=k, detail="x") for k in (DefectKind.REFUSAL, DefectKind.MISSING))
    scored = Scores(scores=(1.0, 2.0, float("nan")), defects=(refusal, refusal, repair))
    clean = Scores(scores=(1.0, 2.0, 3.0))
    rows = [
        schema.candidate_row(make_list("q1")) | schema.label_columns("t", scored, Usage(calls=9)),
        schema.candidate_row(make_list("q2")) | schema.label_columns("t", None, Usage(calls=1), "none", [refusal]),
        schema.candidate_row(make_list("q3")) | schema.label_columns("t", clean, Usage(calls=5)),
        schema.candidate_row(make_list("q4")) | schema.label_columns("t", clean, Usage(calls=5)),
    ]
    write_labels(tmp_path, rows)
    counts = count_output(str(tmp_path), 4)
    assert counts.rates() == {
        "error": 0.25,
        "defect": 0.25,
        "defects": {
            "refusal": {"per_row": 0.75, "rows_affected": 0.5},
            "missing": {"per_row": 0.25, "rows_affected": 0.25},
        },
        "parse_failure": {"per_call": 0.15, "rows_affected": 0.5},
    }
    at_the_bound = {"max_error_rate": 0.25, "max_defect_rate": 0.25, "max_defect_rates": {"refusal": 0.5}}
    assert passed_bounds(counts, LimitSettings(**at_the_bound)) == []
    below = {"max_error_rate": 0.2, "max_defect_rate": 0.1, "max_defect_rates": {"refusal": 0.4, "empty": 0.0}}
    assert passed_bounds(counts, LimitSettings(**below)) == [
        "error rate 0.2500 is above limits.max_error_rate 0.2",
        "defect rate 0.2500 is above limits.max_defect_rate 0.1",
        "rate of rows with refusal defects 0.5000 is above limits.max_defect_rates.refusal 0.4",
    ]


def test_a_defect_that_stands_for_several_counts_as_they_do(tmp_path: Path):
    """Seven unreadable answers of twenty, five of them told as one by a ranker that a composition holds."""
    several = Defect(kind=DefectKind.REFUSAL, detail="stages.1.ranker: d0, d1: no", count=5)
    assert str(several) == "refusal: 5×, first of stages.1.ranker: d0, d1: no"
    one, two = (Defect(kind=k, detail="7×, they say") for k in (DefectKind.REFUSAL, DefectKind.UNPARSED))
    scored = Scores(scores=(1.0, 2.0, 3.0), defects=(several, one, two))
    write_labels(tmp_path, [schema.candidate_row(make_list()) | schema.label_columns("t", scored, Usage(calls=20))])
    counts = count_output(str(tmp_path), 1)
    assert (counts.defects, counts.rows_by_defect) == ({"refusal": 6, "unparsed": 1}, {"refusal": 1, "unparsed": 1})
    assert counts.rates()["parse_failure"] == {"per_call": 0.35, "rows_affected": 1.0}


def test_only_errors_are_ranked_again(tmp_path: Path):
    """A run whose defects pass the bound stays as it is with --retry-errors."""
    run, limits = RunFolder(uri=str(tmp_path)), LimitSettings(max_error_rate=0.0, max_defect_rate=0.0)
    with pytest.raises(RunError, match=r"or mend the cause and rank anew in another --run folder\."):
        finish(run, Counts(rows=2, ok=2, rows_with_defects=1), limits, {})
    with pytest.raises(RunError, match=r"or mend the cause and use --retry-errors\."):
        finish(run, Counts(rows=2, ok=1, errors=1), limits, {})
    assert run.state()["state"] == "failed"


def test_a_bound_for_a_kind_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"max_defect_rates\.refusals.*'refusal'"):
        validate(LimitSettings, {"max_defect_rates": {"refusals": 0.1}}, "limits")


def test_counts_of_rankings(tmp_path: Path):
    """A reranking job's bounds act as a label job's do: its rows have defects and usage too."""
    paid = Usage(calls=3, prompt_tokens=50, output_tokens=4)
    rankings = [
        Ranking(query_id="q1", doc_ids=("a", "b"), scores=(2.0, 1.0), model="m", defects=("missing: b",), usage=paid),
        Ranking(query_id="q2", doc_ids=(), scores=None, model="m", defects=("refusal: no",), usage=paid, error="boom"),
    ]
    parquet.write_rows(map(schema.ranking_row, rankings), str(tmp_path), RANKINGS)
    counts = count_output(str(tmp_path), 2)
    assert (counts.ok, counts.errors, counts.pairs, counts.examples) == (1, 1, 2, ["q2: boom"])
    assert counts.usage == asdict(paid + paid)
    assert (counts.rows_with_defects, counts.rows_by_defect) == (1, {"missing": 1, "refusal": 1})
    assert counts.rates()["parse_failure"]["per_call"] == 1 / 6


def test_failures_per_call_are_unknown_where_a_store_answered(tmp_path: Path):
    """Its answers are not counted as calls, but the unreadable ones among them are as defects."""
    paid = Ranking(query_id="q1", doc_ids=("a",), scores=(1.0,), model="m", usage=Usage(calls=1))
    stored = replace(paid, query_id="q2", defects=("unparsed: x", "unparsed: y"), usage=Usage())
    parquet.write_rows(map(schema.ranking_row, [paid, stored]), str(tmp_path), RANKINGS)
    counts = count_output(str(tmp_path), 2)
    assert counts.rows_without_calls == 1
    assert counts.rates()["parse_failure"] == {"per_call": None, "rows_affected": 0.5}


def test_examples_are_the_first_twenty(tmp_path: Path):
    write_labels(tmp_path, [bad(f"q{i}") for i in range(50)])
    counts = count_output(str(tmp_path), 50)
    assert counts.errors == 50
    assert counts.examples == [f"q{i}: boom" for i in range(20)]


@pytest.mark.parametrize(
    ("ids", "expected", "said"),
    [
        (["q1", "q2"], 3, "2 rows of 2 queries for 3 input rows"),
        (["q1", "q2", "q2"], 3, "3 rows of 2 queries for 3 input rows"),
        (["q1", "q2", "q2"], 2, "3 rows of 2 queries for 2 input rows"),
        (["q1", "q2", "q3"], 2, "3 rows of 3 queries for 2 input rows"),
        ([], 1, "0 rows of 0 queries for 1 input rows"),
    ],
)
def test_missing_and_repeated_rows_are_refused(tmp_path: Path, ids: list[str], expected: int, said: str):
    write_labels(tmp_path, [good(i) for i in ids])
    with pytest.raises(RunError, match=f"{tmp_path}: {said}"):
        count_output(str(tmp_path), expected)


def test_a_row_that_is_twice_in_different_files(tmp_path: Path):
    write_labels(tmp_path / "a", [good("q1"), good("q2")])
    write_labels(tmp_path / "b", [good("q2")])
    with pytest.raises(RunError, match="3 rows of 2 queries"):
        count_output(str(tmp_path), 2)


def test_files_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each of two waits until both are opened, as for a slow store's answers; the totals are those of one by one."""
    parquet.write_rows([good("q1"), bad("q2"), bad("q3"), good("q4")], str(tmp_path), LABELS, rows_per_file=2)
    both, real = threading.Barrier(2), pq.ParquetFile

    def waiting(path, **arguments):
        both.wait(timeout=10)
        return real(path, **arguments)

    monkeypatch.setattr(pq, "ParquetFile", waiting)
    counts = count_output(str(tmp_path), 4)
    assert (counts.rows, counts.ok, counts.errors) == (4, 2, 2)
    assert counts.examples == ["q2: boom", "q3: boom"]


# Dropping errors


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Path]:
    """Three data files (one with an error among good rows, one of errors alone, one without) and their checkpoint, with
    names as Ray's."""
    data, checkpoint = tmp_path / "data", tmp_path / "checkpoint"
    files = {"a": [good("q1"), bad("q2"), good("q3")], "b": [bad("q4"), bad("q5")], "c": [good("q6")]}
    for folder in (data, checkpoint):
        folder.mkdir()
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows, schema=LABELS), data / f"{name}_000000-0.parquet")
        ids = pa.table({"query_id": [r["query_id"] for r in rows]})
        pq.write_table(ids, checkpoint / f"{name}_000000.parquet")
    return data, checkpoint


def test_only_good_rows_stay_in_data_and_checkpoint(run: tuple[Path, Path]):
    data, checkpoint = run
    assert rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True) == 3
    assert sorted(ids_in(data)) == ["q1", "q3", "q6"]
    assert sorted(ids_in(checkpoint)) == ["q1", "q3", "q6"]
    assert sorted(p.name for p in data.iterdir()) == ["a_000000-0.parquet", "c_000000-0.parquet"]
    assert next(parquet.read_rows(str(data), LABELS.names))["scores"] == [1.0, 2.0, 3.0]


def test_a_second_call_changes_nothing(run: tuple[Path, Path]):
    data, checkpoint = run
    rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True)
    assert rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True) == 0
    assert sorted(ids_in(data)) == sorted(ids_in(checkpoint)) == ["q1", "q3", "q6"]
    assert len(list(checkpoint.iterdir())) == 1


def test_a_folder_may_be_called_as_the_files_are(run: tuple[Path, Path]):
    data, checkpoint = run
    checkpoint = checkpoint.rename(checkpoint.with_name("rebuilt-index"))
    assert rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True) == 3
    assert sorted(ids_in(checkpoint)) == ["q1", "q3", "q6"]


def test_what_was_never_committed_is_deleted_first(run: tuple[Path, Path]):
    """A pending checkpoint names the file that a crash may have left half written: both go, its rows are redone."""
    data, checkpoint = run
    (checkpoint / "c_000000.parquet").rename(checkpoint / "c_000000.pending.parquet")
    (data / "c_000000-0.parquet").write_bytes(b"PAR1 half a file")
    assert rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True) == 3
    assert sorted(ids_in(data)) == sorted(ids_in(checkpoint)) == ["q1", "q3"]
    assert not list(checkpoint.glob("*.pending.parquet"))


def test_what_was_committed_and_begun_again_is_done_again(run: tuple[Path, Path]):
    """A write is repeated where its result got lost on the way: its data may be half of the second time."""
    data, checkpoint = run
    (checkpoint / "c_000000.pending.parquet").write_bytes((checkpoint / "c_000000.parquet").read_bytes())
    before = set(ids_in(checkpoint))
    delete_uncommitted(str(data), str(checkpoint))
    left = set(ids_in(checkpoint))
    assert left < before
    assert left == set(ids_in(data))
    assert not list(checkpoint.glob("*.pending.parquet"))


def test_a_task_s_number_may_begin_as_another_s(run: tuple[Path, Path]):
    """From the millionth write on numbers have seven digits."""
    data, checkpoint = run
    for folder, ending in ((data, "-0.parquet"), (checkpoint, ".parquet")):
        (folder / f"c_000000{ending}").rename(folder / f"u_1000003{ending}")
    (checkpoint / "u_100000.pending.parquet").write_bytes(b"")
    (data / "u_100000-0.parquet").write_bytes(b"PAR1 half a file")
    delete_uncommitted(str(data), str(checkpoint))
    assert "q6" in ids_in(data)
    assert sorted(ids_in(data)) == sorted(ids_in(checkpoint))


class Killed(BaseException):
    """The process ending."""


@pytest.mark.parametrize("step", range(8))
def test_killed_at_any_step_and_called_again_it_ends_the_same(
    run: tuple[Path, Path], step: int, monkeypatch: pytest.MonkeyPatch
):
    """The process ends before its n-th change of a file (writes of Parquet, moves, deletions); then it starts again."""
    data, checkpoint = run
    changes = 0

    class DyingFilesystem:
        """The real filesystem, which dies before a change once enough were made."""

        def __init__(self, real) -> None:
            self.real = real

        def __getattr__(self, name: str):
            method = getattr(self.real, name)
            if name not in ("move", "delete_file"):
                return method

            def counted(*arguments):
                nonlocal changes
                if changes == step:
                    raise Killed
                changes += 1
                return method(*arguments)

            return counted

    real_open, real_write = storage.open_filesystem, pq.write_table

    def dying_open(uri):
        fs, path = real_open(uri)
        return DyingFilesystem(fs), path

    def dying_write(table, path, *, filesystem, **arguments):
        nonlocal changes
        if changes == step:
            raise Killed
        changes += 1
        real_write(table, path, filesystem=filesystem.real, **arguments)

    real_file = pq.ParquetFile
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_filesystem", dying_open)
        patch.setattr(pq, "write_table", dying_write)
        patch.setattr(pq, "ParquetFile", lambda path, filesystem: real_file(path, filesystem=filesystem.real))
        if step < 7:
            with pytest.raises(Killed):
                rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True)
        else:
            rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True)
    rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True)
    assert sorted(ids_in(data)) == sorted(ids_in(checkpoint)) == ["q1", "q3", "q6"]
    assert len(list(checkpoint.iterdir())) == 1


def test_a_checkpoint_is_made_anew_from_what_is_there(run: tuple[Path, Path]):
    """A file was lost and another is there twice, as after a write that outlived its driver; errors stay."""
    data, checkpoint = run
    (data / "c_000000-0.parquet").unlink()
    shutil.copy(data / "a_000000-0.parquet", data / "d_000000-0.parquet")
    assert rebuild_checkpoint(str(data), str(checkpoint), drop_errors=False) == 3
    assert sorted(ids_in(data)) == sorted(ids_in(checkpoint)) == ["q1", "q2", "q3", "q4", "q5"]


def test_a_damaged_file_is_named(run: tuple[Path, Path]):
    data, checkpoint = run
    (data / "b_000000-0.parquet").write_bytes(b"")
    for look in (
        lambda: rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True),
        lambda: count_output(str(data), 6),
        lambda: count_rows(str(data), storage.list_files(str(data), ".parquet")),
    ):
        with pytest.raises(
            RunError, match=r"b_000000-0.parquet: not a readable .*delete the file and start the run again"
        ):
            look()


def test_a_run_that_wrote_nothing(tmp_path: Path):
    assert rebuild_checkpoint(str(tmp_path / "data"), str(tmp_path / "checkpoint"), drop_errors=True) == 0


def test_ids_come_back_as_the_type_ray_compares(run: tuple[Path, Path]):
    """Ray matches ids of input and checkpoint by value and type: strings stay strings."""
    data, checkpoint = run
    rebuild_checkpoint(str(data), str(checkpoint), drop_errors=True)
    (file,) = checkpoint.iterdir()
    assert pq.read_schema(file).field("query_id").type == pa.string()
