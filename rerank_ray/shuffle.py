"""Candidate lists in another order: what a position-biased teacher scores differently (`rerank-ray shuffle`)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rerank_ray.errors import ConfigError
from rerank_ray.formats.lines import BadLines
from rerank_ray.ingest import check_apart, check_out, write_ingest
from rerank_ray.parquet import id_hash, inspect_input, read_rows
from rerank_ray.runs import resolve_input
from rerank_ray.schema import CANDIDATES


def shuffle(source: str, out: str, seed: int = 0, *, overwrite: bool = False) -> int:
    """Write `source` with each row's candidates in random order, everything else unchanged; returns the rows written.

    The order is a function of seed and query id alone. Rows that break the contract are kept: jobs report them. As
    with ingests, `out/ingest.json` is written last, and until then jobs refuse the folder.

    Args:
        source: candidate Parquet, or a run folder with candidate columns.
        out: a folder without Parquet files, or with those of a shuffle or ingest that did not end.
        overwrite: replace those of one that did.

    Raises:
        InputError: `source` holds no candidates, or `out` is `source`, or holds data already.
        ConfigError: the seed is negative.
        RunError: another process writes to `out`.
    """
    if seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more")
    data = resolve_input(source)
    inspect_input(data, CANDIDATES)
    check_out(out, overwrite)
    check_apart(source, data, out)
    return write_ingest(
        _shuffled(data, seed),
        CANDIDATES,
        out,
        kind="shuffle",
        sources=[source],
        without=(),
        bad=BadLines(),
        parameters={"seed": seed},
        overwrite=overwrite,
    ).rows


def _shuffled(data: str, seed: int) -> Iterator[dict]:
    for row in read_rows(data, CANDIDATES.names):
        candidates = row["candidates"] or []
        order = np.random.default_rng([seed, id_hash(row["query_id"])]).permutation(len(candidates))
        yield row | {"candidates": row["candidates"] and [candidates[i] for i in order]}
