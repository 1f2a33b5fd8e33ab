"""How rows are shared out between replicas."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.settings.jobs import ExecutionSettings
from rerank_ray.shares import Shares, share_out

numbers = st.integers(1, 80)


@pytest.mark.parametrize(
    ("rows", "actors", "batch", "block", "expected"),
    [
        (43, 2, 16, 32, Shares(batch=11, block=11, in_flight=1)),
        (43, 8, 16, 32, Shares(batch=6, block=6, in_flight=1)),
        (20, 2, 8, 32, Shares(batch=5, block=5, in_flight=1)),
        (5, 8, 16, 32, Shares(batch=1, block=1, in_flight=1)),
        (100_000, 8, 16, 32, Shares(batch=16, block=32, in_flight=2)),
        (100_000, 8, 16, 8, Shares(batch=8, block=8, in_flight=2)),
        (100_000, 8, 16, None, Shares(batch=16, block=32, in_flight=2)),
        (100_000, 8, 64, None, Shares(batch=64, block=64, in_flight=2)),
        (0, 2, 16, 32, Shares(batch=1, block=1, in_flight=1)),
    ],
)
def test_shares(rows, actors, batch, block, expected):
    assert share_out(rows, ExecutionSettings(actors=actors, rows_per_batch=batch, rows_per_block=block)) == expected


@given(rows=st.integers(1, 20_000), actors=st.integers(1, 40), batch=numbers, block=numbers)
def test_replicas_are_through_together(rows, actors, batch, block):
    execution = ExecutionSettings(actors=actors, rows_per_batch=batch, rows_per_block=block)
    shares = share_out(rows, execution)
    assert 1 <= shares.batch <= batch
    assert shares.batch <= shares.block <= block
    assert shares.block % shares.batch == 0
    blocks = [shares.block] * (rows // shares.block) + [rows % shares.block]
    loads = [0] * actors
    for size in blocks:
        heapq.heapreplace(loads, loads[0] + size)
    fair = -(-rows // actors)
    assert max(loads) <= max(fair * 9 / 8, fair + batch - 1)
    if shares.block == shares.batch:
        # Not a batch late: at most a row for each batch that a replica gets.
        assert max(loads) < fair + -(-fair // shares.batch)
