"""How a job's rows are shared out between its replicas."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rerank_ray.settings.jobs import ExecutionSettings

_BLOCKS_OF_A_REPLICA = 8
"""At least so many, where there are batches enough: what a replica may be late by at the end is a block."""
_BLOCKS_OF_A_LONG_JOB = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Rows of a batch, rows of a block, and the blocks that a replica has been given at a time."""

    batch: int
    block: int
    in_flight: int


def share_out(rows: int, execution: ExecutionSettings) -> Shares:
    """Batches and blocks of a job over `rows` rows, so that its replicas are through at the same time.

    Every replica gets the same number of batches, all of one size: 43 rows on two replicas, at most 16 a batch, are
    11, 11, 11 and 10 and not 16, 16 and 11; on eight replicas they are 6 for each, and not the same three batches. A
    block, which is what a replica takes at a time, is several batches where there are many.

    A block beside the one that a replica works on spares it the wait for the next. In a short job that may be a block
    that another replica could have begun with: there each gets one at a time.
    """
    rows_of_replica = ceil(max(rows, 1) / execution.actors)
    batches = ceil(rows_of_replica / min(execution.rows_per_batch, execution.block_rows))
    batch = ceil(rows_of_replica / batches)
    batches_of_block = max(1, min(execution.block_rows // batch, batches // _BLOCKS_OF_A_REPLICA))
    is_long = batches // batches_of_block >= _BLOCKS_OF_A_LONG_JOB
    return Shares(batch=batch, block=batch * batches_of_block, in_flight=2 if is_long else 1)
