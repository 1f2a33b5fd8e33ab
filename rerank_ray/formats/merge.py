"""Candidate Parquet of several first stages to one candidate list a query.

Queries are matched by id through an index of where each row lies (16 bytes a query), so memory holds neither texts nor
lists but a few row groups of each source, whatever the collections' size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from rerank_ray import storage
from rerank_ray.errors import InputError
from rerank_ray.parquet import id_hash, inspect_input, open_parquet, read_candidates, record_of
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.schema import CANDIDATES, candidate_list_from_row

RRF_K = 60
_ROW_GROUPS_HELD = 16


def read_merged(sources: Sequence[str], method: str) -> Iterator[tuple[Query, tuple[Candidate, ...]]]:
    """Stream each query of any source with the candidates that any of them found, in the order of the first source;
    queries that a later source adds come after. The files are checked at once.

    A document that several found is one candidate, with the text of the source that ranks it highest; its gain is
    whichever is known.

    Args:
        sources: candidate Parquet files or folders, the most trusted first.
        method: interleave takes the sources' first candidates, then their second ones, and so on, and leaves `score`
            null, since scores of different stages do not compare. rrf orders by Σ 1/(60 + rank) (Cormack et al. 2009),
            which becomes the `score`; ties keep the interleaved order.

    Raises:
        InputError: a source is no candidate Parquet, or two of them disagree on a query's text or a document's gain.
        RowError: a row breaks the contract.
    """
    return _merged(sources, [_Index(uri) for uri in sources], method)


def _merged(
    sources: Sequence[str], indexes: Sequence[_Index], method: str
) -> Iterator[tuple[Query, tuple[Candidate, ...]]]:
    for number, source in enumerate(sources):
        for first in read_candidates(source):
            query_id = first.query.query_id
            if any(query_id in index for index in indexes[:number]):
                continue
            others = zip(sources[number + 1 :], indexes[number + 1 :], strict=True)
            found = [(source, first), *((uri, index.find(query_id)) for uri, index in others if query_id in index)]
            yield _merged_query(found), _merged_candidates(found, method)


def _merged_query(found: Sequence[tuple[str, CandidateList]]) -> Query:
    source, first = found[0]
    for uri, other in found[1:]:
        if other.query != first.query:
            raise InputError(
                f"{uri}: query {first.query.query_id!r} is {other.query.text!r} with instruction "
                f"{other.query.instruction!r}, but {first.query.text!r} with {first.query.instruction!r} in {source}: "
                "merge first stages over the same queries"
            )
    return first.query


def _merged_candidates(found: Sequence[tuple[str, CandidateList]], method: str) -> tuple[Candidate, ...]:
    merged: dict[str, Candidate] = {}
    fused: dict[str, float] = {}
    # Rank by rank over all sources: the order in which documents are met is the interleaved one.
    for rank, row in enumerate(zip_longest(*(c.candidates for _, c in found)), start=1):
        for (uri, candidate_list), candidate in zip(found, row, strict=True):
            if candidate is not None:
                query_id = candidate_list.query.query_id
                merged[candidate.doc_id] = _with_known_gain(merged.get(candidate.doc_id), candidate, uri, query_id)
                fused[candidate.doc_id] = fused.get(candidate.doc_id, 0.0) + 1 / (RRF_K + rank)
    if method == "interleave":
        return tuple(replace(c, score=None) for c in merged.values())
    best_first = sorted(merged.values(), key=lambda c: -fused[c.doc_id])
    return tuple(replace(c, score=fused[c.doc_id]) for c in best_first)


def _with_known_gain(earlier: Candidate | None, candidate: Candidate, uri: str, query_id: str) -> Candidate:
    if earlier is None or (earlier.label is None and candidate.label is None):
        return earlier or candidate
    if earlier.label is None:
        return replace(earlier, label=candidate.label)
    if candidate.label is not None and candidate.label != earlier.label:
        raise InputError(
            f"{uri}: query {query_id!r}: {candidate.doc_id!r} has gain {candidate.label:g}, but {earlier.label:g} in "
            "an earlier source: ingest all of them with the same qrels"
        )
    return earlier


class _Index:
    """Finds a source's row by query id."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        files = inspect_input(uri, CANDIDATES).files
        self._fs, _ = storage.open_filesystem(uri)
        self._groups: list[tuple[str, int]] = []
        hashes, positions = [np.empty(0, dtype=np.uint64)], [np.empty((0, 2), dtype=np.int32)]
        for path in files:
            with open_parquet(self._fs, path) as file:
                for group in range(file.num_row_groups):
                    ids = file.read_row_group(group, columns=["query_id"])["query_id"].to_pylist()
                    hashes.append(np.array([id_hash(i) for i in ids], dtype=np.uint64))
                    places = [(len(self._groups), row) for row in range(len(ids))]
                    positions.append(np.array(places, dtype=np.int32).reshape(-1, 2))
                    self._groups.append((path, group))
        unsorted = np.concatenate(hashes)
        order = np.argsort(unsorted)
        self._hashes, self._positions = unsorted[order], np.concatenate(positions)[order]
        self._rows = functools.lru_cache(maxsize=_ROW_GROUPS_HELD)(self._read_group)

    def __contains__(self, query_id: str) -> bool:
        place = self._place(query_id)
        return place < len(self._hashes) and int(self._hashes[place]) == id_hash(query_id)

    def find(self, query_id: str) -> CandidateList:
        """The candidate list of a query that the source has."""
        group, row = self._positions[self._place(query_id)]
        return record_of(self._rows(int(group))[int(row)], candidate_list_from_row, self._uri)

    def _place(self, query_id: str) -> int:
        return int(np.searchsorted(self._hashes, np.uint64(id_hash(query_id))))

    def _read_group(self, number: int) -> list[dict]:
        path, group = self._groups[number]
        with open_parquet(self._fs, path) as file:
            return file.read_row_group(group, columns=CANDIDATES.names).to_pylist()
