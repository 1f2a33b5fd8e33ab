"""Candidate lists in another order: what a position-biased teacher scores differently (`rerank-ray shuffle`)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rerank_ray import storage
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.runs import resolve_input
from rerank_ray.schema import CANDIDATES, id_hash, inspect_input, read_rows, write_rows


def shuffle(source: str, out: str, seed: int = 0) -> int:
    """Write `source` with each row's candidates in random order, everything else unchanged; returns the rows written.

    The order is a function of seed and query id alone. Rows that break the contract are kept: jobs report them.

    Args:
        source: candidate Parquet, or a run folder with candidate columns.
        out: a folder without Parquet files.

    Raises:
        InputError: `source` holds no candidates, or `out` is not empty.
        ConfigError: the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more")
    data = resolve_input(source)
    inspect_input(data, CANDIDATES)
    if storage.exists(out) and (not storage.is_directory(out) or storage.list_files(out, ".parquet")):
        raise InputError(f"{out}: already holds data: name another folder, or delete it")
    return write_rows(_shuffled(data, seed), out, CANDIDATES)


def _shuffled(data: str, seed: int) -> Iterator[dict]:
    for row in read_rows(data, CANDIDATES.names):
        candidates = row["candidates"] or []
        order = np.random.default_rng([seed, id_hash(row["query_id"])]).permutation(len(candidates))
        yield row | {"candidates": row["candidates"] and [candidates[i] for i in order]}
