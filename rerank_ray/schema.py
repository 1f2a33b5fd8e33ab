"""The Parquet contract, version 1: Arrow schemas, and rows to and from records.

Every table has one row per query. Faults inside one row raise `RowError` from `candidate_list_from_row`, which jobs
turn into an output row with `error`; those of files are found by `rerank_ray.parquet`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa

from rerank_ray.errors import RowError
from rerank_ray.records import Candidate, CandidateList, Defect, Labels, Query, Ranking, Scores, Usage, storable

VERSION = 1

_CANDIDATE = pa.struct(
    [
        pa.field("doc_id", pa.string()),
        pa.field("title", pa.string()),
        pa.field("text", pa.string()),
        pa.field("score", pa.float32()),
        pa.field("label", pa.float32()),
    ]
)
_USAGE = pa.struct(
    [
        pa.field("calls", pa.int32()),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("cached_tokens", pa.int64()),
        pa.field("output_tokens", pa.int64()),
    ]
)
_CANDIDATE_COLUMNS = [
    pa.field("query_id", pa.string()),
    pa.field("query", pa.string()),
    pa.field("instruction", pa.string()),
    pa.field("candidates", pa.list_(_CANDIDATE)),
]


def _versioned(name: str, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={"rerank_ray.schema": name, "rerank_ray.version": str(VERSION)})


CANDIDATES = _versioned("candidates", _CANDIDATE_COLUMNS)
LABELS = _versioned(
    "labels",
    [
        *_CANDIDATE_COLUMNS,
        pa.field("teacher", pa.string()),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("uncertainty", pa.list_(pa.float32())),
        pa.field("rationales", pa.list_(pa.string())),
        pa.field("defects", pa.list_(pa.string())),
        pa.field("usage", _USAGE),
        pa.field("error", pa.string()),
    ],
)
RANKINGS = _versioned(
    "rankings",
    [
        pa.field("query_id", pa.string()),
        pa.field("doc_ids", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("exit_layer", pa.int16()),
        pa.field("model", pa.string()),
        pa.field("defects", pa.list_(pa.string())),
        pa.field("usage", _USAGE),
        pa.field("error", pa.string()),
    ],
)
_PASSAGE_COLUMNS = [pa.field(name, pa.string()) for name in ("query_id", "doc_id", "title", "text")]
# What `rerank-ray synthesize` keeps between its stages: passages to write a query for, and the queries.
PASSAGES = _versioned("passages", _PASSAGE_COLUMNS)
WRITTEN_QUERIES = _versioned(
    "written_queries",
    [
        *_PASSAGE_COLUMNS,
        pa.field("query", pa.string()),
        *(LABELS.field(name) for name in ("teacher", "scores", "defects", "usage", "error")),
    ],
)


# Rows to records


def with_readable_texts(table: pa.Table) -> tuple[pa.Table, dict[int, RowError]]:
    """The table, and a fault for each row that holds a string which is not UTF-8.

    Parquet files of other writers can, and Arrow reads them without looking. Such a row comes back with U+FFFD in the
    place of what is none.
    """
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:
        raw = table.cast(pa.schema([field.with_type(_as_bytes(field.type)) for field in table.schema])).to_pylist()
        faults = {row: fault for row, columns in enumerate(raw) if (fault := _unreadable(columns))}
        table = pa.Table.from_pylist([_decoded(columns) for columns in raw], schema=table.schema)
        return table, faults
    return table, {}


def _as_bytes(of: pa.DataType) -> pa.DataType:
    """The same type with bytes in the place of strings."""
    if pa.types.is_string(of):
        return pa.binary()
    if pa.types.is_list(of):
        return pa.list_(of.value_field.with_type(_as_bytes(of.value_type)))
    if pa.types.is_struct(of):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in of])
    return of


def _decoded(value: object) -> object:
    """A row, or what one holds, with text in the place of bytes."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    return value


def _unreadable(row: dict) -> RowError | None:
    """What is wrong with the first string of a row of bytes that is not UTF-8."""
    places = {f"'{name}'": value for name, value in row.items()}
    for number, candidate in enumerate(row.get("candidates") or ()):
        places |= {f"candidate {number}: '{name}'": value for name, value in (candidate or {}).items()}
    for place, value in places.items():
        if isinstance(value, bytes):
            try:
                value.decode()
            except UnicodeDecodeError as error:
                query_id = _decoded(row["query_id"])
                return RowError(
                    f"query {query_id!r}: {place} is not UTF-8 ({error.reason} at byte {error.start}): write the "
                    "input again in UTF-8"
                )
    return None


def candidate_list_from_row(row: dict) -> CandidateList:
    """Build a candidate list from a row of the `candidates` columns, checking everything the contract promises.

    Raises:
        RowError: naming the query and the field that breaks the contract.
    """
    query_id = row["query_id"]
    where = f"query {query_id!r}"
    if not query_id:
        raise RowError(f"'query_id' is {'null' if query_id is None else 'empty'}: every row needs one")
    if not row["query"] or not row["query"].strip():
        raise RowError(f"{where}: 'query' is {'null' if row['query'] is None else 'empty'}")
    if not row["candidates"]:
        raise RowError(f"{where}: 'candidates' is {'null' if row['candidates'] is None else 'empty'}: nothing to rank")
    candidates = tuple(_candidate(c, i, where) for i, c in enumerate(row["candidates"]))
    seen: dict[str, int] = {}
    for i, c in enumerate(candidates):
        if c.doc_id in seen:
            raise RowError(f"{where}: doc_id {c.doc_id!r} is both candidate {seen[c.doc_id]} and candidate {i}")
        seen[c.doc_id] = i
    query = Query(query_id=query_id, text=row["query"], instruction=row["instruction"])
    return CandidateList(query=query, candidates=candidates)


def _candidate(item: dict | None, index: int, where: str) -> Candidate:
    if item is None:
        raise RowError(f"{where}: candidate {index} is null")
    if not item["doc_id"]:
        raise RowError(f"{where}: candidate {index} has no 'doc_id'")
    here = f"{where}: candidate {index} ({item['doc_id']!r})"
    if item["text"] is None:
        raise RowError(f"{here}: 'text' is null: hydrate the document ids with their texts first")
    for field in ("score", "label"):
        if item[field] is not None and not math.isfinite(item[field]):
            value = "NaN" if math.isnan(item[field]) else "infinite"
            raise RowError(f"{here}: '{field}' is {value}: leave it null when there is none")
    return Candidate(**item)


def check_scores(row: dict) -> None:
    """Raise `RowError` where scores, if there are any, are not as many as candidates, or one is infinite."""
    scores, count = row["scores"], len(row["candidates"] or ())
    if scores is not None and len(scores) != count:
        raise RowError(f"query {row['query_id']!r}: 'scores' has {len(scores)} entries for {count} candidates")
    if any(score is not None and math.isinf(score) for score in scores or ()):
        raise RowError(f"query {row['query_id']!r}: a score is infinite: a candidate that has none is null or NaN")


def check_scored(row: dict) -> None:
    """As `check_scores`, of a row without `error`, which has scores."""
    check_scores(row)
    if row["scores"] is None:
        raise RowError(f"query {row['query_id']!r}: 'scores' is null although 'error' is null")


def labels_from_row(row: dict) -> Labels:
    """Build labels from a row of the `labels` columns.

    Raises:
        RowError: the row has `error`, its candidate columns break the contract, or its scores do not align with them.
    """
    if row["error"] is not None:
        raise RowError(f"query {row['query_id']!r} was not labelled: {row['error']}")
    candidate_list = candidate_list_from_row(row)
    where = f"query {row['query_id']!r}"
    check_scored(row)
    if row["uncertainty"] is not None and len(row["uncertainty"]) != len(candidate_list):
        given = len(row["uncertainty"])
        raise RowError(f"{where}: 'uncertainty' has {given} entries for {len(candidate_list)} candidates")
    return Labels(
        candidate_list=candidate_list,
        teacher=row["teacher"],
        scores=tuple(math.nan if s is None else s for s in row["scores"]),
        uncertainty=_tuple_or_none(row["uncertainty"]),
        rationales=_tuple_or_none(row["rationales"]),
    )


def ranking_from_row(row: dict) -> Ranking:
    """Build a ranking from a row of the `rankings` columns."""
    doc_ids = tuple(row["doc_ids"] or ())
    scores = _tuple_or_none(row["scores"])
    if scores is not None and len(scores) != len(doc_ids):
        raise RowError(f"query {row['query_id']!r}: 'scores' has {len(scores)} entries for {len(doc_ids)} doc ids")
    return Ranking(
        query_id=row["query_id"],
        doc_ids=doc_ids,
        scores=scores,
        exit_layer=row["exit_layer"],
        model=row["model"],
        defects=tuple(row.get("defects") or ()),
        usage=Usage(**(row.get("usage") or {})),
        error=row["error"],
    )


def _tuple_or_none(values: Sequence | None) -> tuple | None:
    return None if values is None else tuple(values)


# Records to rows


def candidate_row(candidate_list: CandidateList) -> dict:
    query = candidate_list.query
    return {
        "query_id": query.query_id,
        "query": query.text,
        "instruction": query.instruction,
        "candidates": [
            {"doc_id": c.doc_id, "title": c.title, "text": c.text, "score": c.score, "label": c.label}
            for c in candidate_list.candidates
        ],
    }


def label_columns(
    teacher: str,
    scores: Scores | None,
    usage: Usage | None = None,
    error: str | None = None,
    defects: Sequence[Defect] = (),
) -> dict:
    """The columns that `labels` adds to the candidate columns; `defects` are those of a row without scores."""
    usage = usage or Usage()
    return {
        "teacher": teacher,
        "scores": scores and scores.scores,
        "uncertainty": scores and scores.uncertainty,
        "rationales": scores and scores.rationales and [storable(text) for text in scores.rationales],
        "defects": [storable(str(d)) for d in (scores.defects if scores else defects)],
        "usage": asdict(usage),
        "error": storable(error),
    }


def ranking_row(ranking: Ranking) -> dict:
    return {
        "query_id": ranking.query_id,
        "doc_ids": ranking.doc_ids,
        "scores": ranking.scores,
        "exit_layer": ranking.exit_layer,
        "model": ranking.model,
        "defects": [storable(defect) for defect in ranking.defects],
        "usage": asdict(ranking.usage),
        "error": storable(ranking.error),
    }
