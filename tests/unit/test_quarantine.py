"""A row that kills its process: the guard's attempts are counted in files, here over restarts that a test simulates."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from rerank_ray.quarantine import CrashGuard


class Died(BaseException):
    """The process ending: nothing after it runs, not even `except Exception`."""


class Doubler:
    """A stage that doubles `value` and dies of the rows in `poison`; `seen` keeps the batches it was given."""

    def __init__(self, poison: set[str], seen: list[list[str]]) -> None:
        self.poison, self.seen = poison, seen

    def __call__(self, table: pa.Table) -> pa.Table:
        ids = table["query_id"].to_pylist()
        self.seen.append(ids)
        if self.poison & set(ids):
            raise Died
        return output(ids, [2 * v for v in table["value"].to_pylist()], [None] * len(ids))

    def failed(self, table: pa.Table, error: str) -> pa.Table:
        ids = table["query_id"].to_pylist()
        return output(ids, [None] * len(ids), [error] * len(ids))


def output(ids: list[str], values: list[int | None], errors: list[str | None]) -> pa.Table:
    schema = pa.schema([("query_id", pa.string()), ("value", pa.int64()), ("error", pa.string())])
    return pa.table({"query_id": ids, "value": values, "error": errors}, schema=schema)


def rows(*ids: str) -> pa.Table:
    return pa.table({"query_id": list(ids), "value": list(range(len(ids)))})


def run_until_done(table: pa.Table, poison: set[str], attempts: Path, max_crashes: int) -> tuple[pa.Table, int, list]:
    """Restart a fresh guard on the same batch after every crash, as Ray restarts an actor.

    Returns:
        Its output, the number of crashes, and the batches that the stage was given.
    """
    seen: list[list[str]] = []
    for crashes in range(1000):
        guard = CrashGuard(Doubler(poison, seen), str(attempts), max_crashes)
        try:
            return guard(table), crashes, seen
        except Died:
            continue
    pytest.fail("the guard lets its process die for ever")


@pytest.mark.parametrize("max_crashes", [1, 2, 3])
def test_one_poison_row_among_four(tmp_path: Path, max_crashes: int):
    """`max_crashes` as a batch, then as many alone; its neighbours keep their results, in their places."""
    result, crashes, _ = run_until_done(rows("a", "b", "bad", "c"), {"bad"}, tmp_path, max_crashes)
    assert crashes == 2 * max_crashes
    error = f"ended its worker's process {max_crashes} times (out of memory, or a native crash)"
    assert result.to_pylist() == [
        {"query_id": "a", "value": 0, "error": None},
        {"query_id": "b", "value": 2, "error": None},
        {"query_id": "bad", "value": None, "error": error},
        {"query_id": "c", "value": 6, "error": None},
    ]


def test_two_poison_rows(tmp_path: Path):
    """Two crashes as a batch and two for each bad row."""
    result, crashes, _ = run_until_done(rows("x", "a", "y"), {"x", "y"}, tmp_path, 2)
    assert crashes == 6
    assert [r is None for r in result["error"].to_pylist()] == [False, True, False]


def test_a_batch_of_one_row_is_not_tried_twice_over(tmp_path: Path):
    """The batch is the row: `max_crashes` in all."""
    result, crashes, _ = run_until_done(rows("bad"), {"bad"}, tmp_path, 2)
    assert crashes == 2
    assert result["error"].to_pylist() != [None]


def test_without_a_crash_the_batch_is_done_at_once_and_no_marker_stays(tmp_path: Path):
    result, crashes, seen = run_until_done(rows("a", "b"), set(), tmp_path, 2)
    assert (crashes, seen) == (0, [["a", "b"]])
    assert result["value"].to_pylist() == [0, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_crash_that_is_not_the_rows_fault(tmp_path: Path):
    """One crash (a lost node), then success: the batch is done whole, and its marker is gone."""
    seen: list[list[str]] = []
    with pytest.raises(Died):
        CrashGuard(Doubler({"a"}, seen), str(tmp_path), 2)(rows("a", "b"))
    assert len(list(tmp_path.iterdir())) == 1
    result = CrashGuard(Doubler(set(), seen), str(tmp_path), 2)(rows("a", "b"))
    assert result["error"].to_pylist() == [None, None]
    assert seen == [["a", "b"]] * 2
    assert list(tmp_path.iterdir()) == []


def test_good_rows_of_a_bad_batch_leave_no_marker(tmp_path: Path):
    """What stays are the two of the batch and the two of the bad row, so that both are known if they come again."""
    run_until_done(rows("a", "bad", "c"), {"bad"}, tmp_path, 2)
    assert sorted(p.name.split("-")[1] for p in tmp_path.iterdir()) == ["1.0", "1.1", "3.0", "3.1"]


def test_other_batches_are_counted_apart(tmp_path: Path):
    """A crash of (a, b) says nothing about (b, a), (a) or (a, b, c)."""
    guard = CrashGuard(Doubler({"a"}, []), str(tmp_path), 2)
    with pytest.raises(Died):
        guard(rows("a", "b"))
    for ids in (("b", "a"), ("a",), ("a", "b", "c")):
        seen: list[list[str]] = []
        CrashGuard(Doubler(set(), seen), str(tmp_path), 1)(rows(*ids))
        assert seen == [list(ids)]


def test_an_empty_batch_is_passed_on(tmp_path: Path):
    assert CrashGuard(Doubler(set(), []), str(tmp_path / "new"), 2)(rows()).num_rows == 0
    assert (tmp_path / "new").is_dir()
