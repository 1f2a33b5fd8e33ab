"""Keeps a row that kills its process from killing the run: counted attempts, then one row at a time, then an error."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

from rerank_ray import storage


class Stage(Protocol):
    def __call__(self, table: pa.Table) -> pa.Table: ...

    def failed(self, table: pa.Table, error: str) -> pa.Table:
        """Output rows with this error for rows that are not tried."""
        ...


class CrashGuard:
    """Runs a stage over batches and notes each attempt in a file that outlives the process.

    Ray restarts an actor whose process died and gives it the same batch again, for ever. A batch found with as many
    unfinished attempts as `max_crashes` is done row by row, and a row with as many of its own becomes a row with
    `error`. Attempts are counted within one start of the run, so killing the driver blames no row.
    """

    def __init__(self, stage: Stage, attempts_uri: str, max_crashes: int) -> None:
        self._stage, self._uri, self._max_crashes = stage, attempts_uri, max_crashes
        storage.make_directory(attempts_uri)

    def __call__(self, table: pa.Table) -> pa.Table:
        if table.num_rows == 0:
            return self._stage(table)
        crashes = self._crashes(table)
        if crashes < self._max_crashes:
            return self._attempt(table, crashes)
        if table.num_rows == 1:
            return self._stage.failed(
                table, f"ended its worker's process {crashes} times (out of memory, or a native crash)"
            )
        return pa.concat_tables([self(table.slice(i, 1)) for i in range(table.num_rows)])

    def _attempt(self, table: pa.Table, crashes: int) -> pa.Table:
        storage.write_text(self._marker(table, crashes), "")
        result = self._stage(table)
        for n in range(crashes + 1):
            storage.delete_file(self._marker(table, n))
        return result

    def _crashes(self, table: pa.Table) -> int:
        count = 0
        while storage.exists(self._marker(table, count)):
            count += 1
        return count

    def _marker(self, table: pa.Table, attempt: int) -> str:
        return storage.join(self._uri, f"{_key(table['query_id'].to_pylist())}-{table.num_rows}.{attempt}")


def _key(query_ids: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(query_ids).encode(), digest_size=12).hexdigest()
