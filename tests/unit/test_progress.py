"""What a job's display says of its speed."""

from __future__ import annotations

from rerank_ray.execution.progress import rates
from rerank_ray.records import Computed


def totals(rows: int, tokens: int, computed: int) -> dict:
    return {"rows": rows, "pairs": 10 * rows, "tokens": tokens, "computed": Computed(tokens=computed)}


def test_nothing_is_said_before_a_model_has_computed():
    assert rates(totals(0, 0, 0), rows=100, under_way=16, elapsed=9.0) == "starting"
    assert rates(totals(0, 0, 900), rows=100, under_way=16, elapsed=9.0) == "first batch, 100.0 tokens/s"


def test_finished_rows_tell_the_time_left():
    """20 rows in 10 s: 80 others take 40 s. Servers and embeddings at hand compute nothing here."""
    said = "2.0 rows/s, 20.0 pairs/s, 100.0 tokens/s, 0:00:40 left"
    for computed in (0, 400, 1000):
        assert rates(totals(20, 1000, computed), rows=100, under_way=16, elapsed=10.0) == said


def test_a_batch_under_way_counts_in_proportion():
    """Half as much again as the 20 finished rows took is computed: 30 rows in 10 s, and 70 take 23 s."""
    said = "3.0 rows/s, 30.0 pairs/s, 150.0 tokens/s, 0:00:23 left"
    assert rates(totals(20, 1000, 1500), rows=100, under_way=16, elapsed=10.0) == said


def test_last_batches_that_are_longer_than_the_others_are_under_way_when_the_estimate_is_used_up():
    """9000 tokens are those of 180 rows like the finished ones, and 30 rows are all there is."""
    for elapsed in (10.0, 1000.0):
        said = rates(totals(20, 1000, 9000), rows=30, under_way=16, elapsed=elapsed)
        assert said.endswith(" tokens/s, the last batches are under way")
    assert rates(totals(30, 9000, 9000), rows=30, under_way=16, elapsed=10.0).endswith(", 0:00:00 left")


def test_no_more_rows_are_under_way_than_replicas_hold():
    """19 of 20 rows were in a store; a batch of 16 that was not is computed to its half, or was by a replica that
    crashed."""
    said = "3.6 rows/s, 36.0 pairs/s, 18.0 tokens/s, 0:00:18 left"
    assert rates(totals(20, 100, 900), rows=100, under_way=16, elapsed=10.0) == said


def test_rows_that_cost_no_token_are_counted():
    assert rates(totals(20, 0, 0), rows=100, under_way=16, elapsed=10.0).startswith(
        "2.0 rows/s, 20.0 pairs/s, 0.0 tokens/s, 0:00:40"
    )
