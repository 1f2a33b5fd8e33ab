"""Stages of a job: picklable callables from Arrow table to Arrow table, one output row for each input row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import pyarrow as pa

from rerank_ray.errors import RowError
from rerank_ray.label_store import LabelStore, StoredBackend
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.ranking.write_query import passage_of
from rerank_ray.records import CandidateList, Ranking, Usage, ranking_of, storable
from rerank_ray.schema import (
    CANDIDATES,
    LABELS,
    PASSAGES,
    RANKINGS,
    WRITTEN_QUERIES,
    candidate_list_from_row,
    label_columns,
    ranking_row,
    with_readable_texts,
)
from rerank_ray.settings.rankers import RankerSettings
from rerank_ray.settings.synthesize import QueryWriterSettings


class _Stage:
    """A ranker over Arrow tables; `usage` is that of all rows so far."""

    def __init__(self, ranker: RankerSettings | QueryWriterSettings, store: LabelStore | None = None) -> None:
        self.ranker = Ranker(ranker, wrap=None if store is None else partial(StoredBackend, store=store))
        self.usage = Usage()

    def _rank(self, requests: Sequence[CandidateList]) -> list[Outcome]:
        outcomes = self.ranker.rank(requests)
        self.usage = sum((o.usage for o in outcomes), start=self.usage)
        return outcomes

    def _columns(self, result: Outcome | str) -> dict:
        """The columns that `labels` adds, of a row that was ranked or of one with this error."""
        if isinstance(result, str):
            return label_columns(self.ranker.name, None, error=result)
        return label_columns(self.ranker.name, result.scores, result.usage, result.error, result.defects)


class RankStage(_Stage):
    """Ranks candidate rows and writes `labels` or `rankings` rows.

    A row that breaks the contract, or that the ranker can't score, becomes a row with `error`; nothing is dropped.
    """

    def __init__(
        self, ranker: RankerSettings, output: Literal["labels", "rankings"], store: LabelStore | None = None
    ) -> None:
        super().__init__(ranker, store)
        self._to_table = {"labels": self._labels, "rankings": self._rankings}[output]

    def __call__(self, table: pa.Table) -> pa.Table:
        table, unreadable = with_readable_texts(table.select(CANDIDATES.names))
        parsed = [unreadable.get(number) or _parse(row) for number, row in enumerate(table.to_pylist())]
        good = [p for p in parsed if isinstance(p, CandidateList)]
        outcomes = iter(self._rank(good))
        results = [next(outcomes) if isinstance(p, CandidateList) else str(p) for p in parsed]
        return self._to_table(table, results)

    def failed(self, table: pa.Table, error: str) -> pa.Table:
        """Output rows that say why none of these rows was tried."""
        table, _ = with_readable_texts(table.select(CANDIDATES.names))
        return self._to_table(table, [error] * table.num_rows)

    def _labels(self, table: pa.Table, results: Sequence[Outcome | str]) -> pa.Table:
        rows = [self._columns(result) for result in results]
        added = pa.Table.from_pylist(rows, schema=pa.schema([f for f in LABELS if f.name not in CANDIDATES.names]))
        for name in added.column_names:
            table = table.append_column(LABELS.field(name), added[name])
        return table.cast(LABELS)

    def _rankings(self, table: pa.Table, results: Sequence[Outcome | str]) -> pa.Table:
        rows = [
            ranking_row(self._ranking_of(query_id, result))
            for query_id, result in zip(table["query_id"].to_pylist(), results, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema=RANKINGS)

    def _ranking_of(self, query_id: str, result: Outcome | str) -> Ranking:
        nothing = Ranking(query_id=query_id, doc_ids=(), scores=None, model=self.ranker.name)
        if isinstance(result, str):
            return replace(nothing, error=result)
        if result.scores is None:
            ranking = replace(nothing, error=result.error)
        else:
            ranking = ranking_of(result.request, result.scores, self.ranker.name)
            ranking = replace(ranking, exit_layer=self.ranker.exit_layer)
        return replace(ranking, defects=tuple(map(str, result.all_defects)), usage=result.usage)


class WriteStage(_Stage):
    """Writes queries for passages: `passages` rows to `written_queries` rows.

    A passage that the model wrote no query for becomes a row with `error`; nothing is dropped.
    """

    def __call__(self, table: pa.Table) -> pa.Table:
        table = table.select(PASSAGES.names)
        return self._to_table(table, self._rank([passage_of(row) for row in table.to_pylist()]))

    def failed(self, table: pa.Table, error: str) -> pa.Table:
        """Output rows that say why none of these rows was tried."""
        return self._to_table(table.select(PASSAGES.names), [error] * table.num_rows)

    def _to_table(self, table: pa.Table, results: Sequence[Outcome | str]) -> pa.Table:
        rows = []
        for row, result in zip(table.to_pylist(), results, strict=True):
            scores = None if isinstance(result, str) else result.scores
            query = scores.rationales[0] if scores else None
            rows.append(row | {"query": storable(query)} | self._columns(result))
        return pa.Table.from_pylist(rows, schema=WRITTEN_QUERIES)


def _parse(row: dict) -> CandidateList | RowError:
    try:
        return candidate_list_from_row(row)
    except RowError as error:
        return error
