"""The Parquet contract, version 1: Arrow schemas, conversion to and from records, and validation.

Every table has one row per query. File-level faults (a truncated file, a column of another type, a repeated query id)
are found by `inspect_input` before anything expensive starts; faults inside one row raise `RowError` from
`candidate_list_from_row`, which jobs turn into an output row with `error`.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank_ray import storage
from rerank_ray.errors import InputError, RowError
from rerank_ray.records import Candidate, CandidateList, Defect, Labels, Query, Ranking, Scores, Usage, storable

Record = TypeVar("Record")

VERSION = 1
ROWS_PER_GROUP = 16
ROWS_PER_FILE = 4096
_READ_BYTES = 4 << 20
_SCORED_ROWS = 1024

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


_MAKERS = {"candidates": "ingest", "labels": "label"}
"""Which command writes a table that users give to others."""


# Rows to records


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


def labels_from_row(row: dict) -> Labels:
    """Build labels from a row of the `labels` columns.

    Raises:
        RowError: the row has `error`, its candidate columns break the contract, or its scores do not align with them.
    """
    if row["error"] is not None:
        raise RowError(f"query {row['query_id']!r} was not labelled: {row['error']}")
    candidate_list = candidate_list_from_row(row)
    where = f"query {row['query_id']!r}"
    for field in ("scores", "uncertainty"):
        if row[field] is not None and len(row[field]) != len(candidate_list):
            raise RowError(f"{where}: '{field}' has {len(row[field])} entries for {len(candidate_list)} candidates")
    if row["scores"] is None:
        raise RowError(f"{where}: 'scores' is null although 'error' is null")
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


def record_of(row: dict, parse: Callable[[dict], Record], uri: str) -> Record:
    """`parse` of a row that was read from `uri`, which a `RowError` then names."""
    try:
        return parse(row)
    except RowError as error:
        raise RowError(f"{uri}: {error}") from error


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


# Files


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSummary:
    """A checked Parquet input: its files, its row count, and a fingerprint that changes when the files do."""

    files: tuple[str, ...]
    rows: int
    fingerprint: str
    id_hashes: np.ndarray
    """A 64-bit hash of each row's query id, sorted."""


def inspect_input(uri: str, expected: pa.Schema) -> InputSummary:
    """Check a Parquet file or folder against a schema without decoding its documents.

    Opens every footer, compares column types, reads the `query_id` column (ids are present and unique), and digests the
    files' bytes, which is one sequential read. One 64-bit hash per row is held in memory (8 bytes a query).

    Raises:
        InputError: naming the file, the column or row, and the fix.
    """
    fs, _ = storage.open_filesystem(uri)
    paths = storage.list_files(uri, ".parquet")
    if paths and not paths[0].endswith(".parquet"):
        raise InputError(f"{uri}: a job reads files that are called *.parquet; rename it")
    if not paths:
        found = "holds no .parquet file" if storage.exists(uri) else "does not exist"
        maker = "label CONFIG --run" if expected is LABELS else "ingest … --out"
        raise InputError(f"{uri}: the input {found}; `rerank-ray {maker} {uri}` writes one")
    digest = hashlib.sha256()
    hashes: list[np.ndarray] = []
    for path in paths:
        with open_parquet(fs, path) as file:
            check_columns(file.schema_arrow, expected, path)
            digest.update(f"{posixpath.basename(path)}:{fs.get_file_info(path).size}:".encode())
            digest.update(_content_digest(fs, path))
            hashes.append(_query_id_hashes(file, path))
    id_hashes = np.sort(np.concatenate(hashes))
    if (id_hashes[1:] == id_hashes[:-1]).any():
        _raise_first_duplicate(fs, paths)
    return InputSummary(
        files=tuple(paths), rows=len(id_hashes), fingerprint=digest.hexdigest()[:16], id_hashes=id_hashes
    )


def doc_id_path(file: pq.ParquetFile, path: str) -> str:
    """The Parquet path of the candidates' doc ids, to read them without the texts.

    The group inside a list is called 'element' by the Parquet specification and 'item' by older writers.
    """
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    ids = [leaf for leaf in leaves if re.fullmatch(r"candidates\.\w+\.\w+\.doc_id", leaf)]
    if not ids:
        raise InputError(f"{path}: 'candidates' is not a list of structs with a 'doc_id'")
    return ids[0]


def read_scored(uri: str) -> Iterator[dict]:
    """Stream label rows with `query_id`, `teacher`, `scores`, `error`, and of `candidates` just `doc_id` and `label`.

    Texts are most of a label file, and are not decoded.
    """
    fs, _ = storage.open_filesystem(uri)
    for path in storage.list_files(uri, ".parquet"):
        with open_parquet(fs, path) as file:
            ids = doc_id_path(file, path)
            columns = ["query_id", "teacher", "scores", "error", ids, ids.removesuffix("doc_id") + "label"]
            with reading(path):
                for batch in file.iter_batches(batch_size=_SCORED_ROWS, columns=columns):
                    yield from batch.to_pylist()


def open_parquet(fs: pa.fs.FileSystem, path: str) -> pq.ParquetFile:
    """Open a Parquet file; one that can't be read is an `InputError` that names it."""
    try:
        return pq.ParquetFile(path, filesystem=fs)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}): it is truncated or was not written "
            "completely; delete it and write it again"
        ) from error


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Inside, rows of a Parquet file are read: data that is damaged behind a whole footer is an `InputError` that names
    the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: its rows can't be read ({str(error).splitlines()[0]}): unless its place is out of reach, it is "
            "damaged; write it again"
        ) from error


def check_columns(actual: pa.Schema, expected: pa.Schema, path: str) -> None:
    """Compare a file's columns with a schema, reporting every difference at once; further columns are allowed."""
    faults = []
    for field in expected:
        index = actual.get_field_index(field.name)
        if index < 0:
            faults.append(f"column '{field.name}' is missing")
        elif not _same_type(actual.field(index).type, field.type):
            faults.append(f"column '{field.name}' is {actual.field(index).type}, not {field.type}")
    if faults:
        name = expected.metadata[b"rerank_ray.schema"].decode()
        fix = f": `rerank-ray {_MAKERS[name]}` writes such files" if name in _MAKERS else ""
        raise InputError(f"{path}: does not follow the '{name}' schema (version {VERSION}): {'; '.join(faults)}{fix}")


def _same_type(a: pa.DataType, b: pa.DataType) -> bool:
    """Equal up to the names that writers give to list items."""
    if pa.types.is_list(a) and pa.types.is_list(b):
        return _same_type(a.value_type, b.value_type)
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        return [f.name for f in a] == [f.name for f in b] and all(
            _same_type(x.type, y.type) for x, y in zip(a, b, strict=True)
        )
    return a.equals(b)


def _content_digest(fs: pa.fs.FileSystem, path: str) -> bytes:
    digest = hashlib.sha256()
    with fs.open_input_stream(path) as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.digest()


def _query_id_hashes(file: pq.ParquetFile, path: str) -> np.ndarray:
    hashes = np.empty(file.metadata.num_rows, dtype=np.uint64)
    for row, query_id in _query_ids(file, path):
        if not query_id:
            fault = "null" if query_id is None else "empty"
            raise InputError(
                f"{path}: row {row}: 'query_id' is {fault}; ids are how a run resumes without losing or repeating "
                "rows: give every row one"
            )
        hashes[row] = id_hash(query_id)
    return hashes


def id_hash(query_id: str) -> int:
    """A 64-bit hash of a query id, the same in every process."""
    return int.from_bytes(hashlib.blake2b(query_id.encode(), digest_size=8).digest(), "little")


def _query_ids(file: pq.ParquetFile, path: str) -> Iterator[tuple[int, str | None]]:
    row = 0
    with reading(path):
        for batch in file.iter_batches(batch_size=8192, columns=["query_id"]):
            for query_id in batch.column(0).to_pylist():
                yield row, query_id
                row += 1


def _raise_first_duplicate(fs: pa.fs.FileSystem, paths: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        with open_parquet(fs, path) as file:
            for row, query_id in _query_ids(file, path):
                place = f"{path}: row {row}"
                if query_id in seen:
                    raise InputError(
                        f"{place}: 'query_id' {query_id!r} is already used at {seen[query_id]}; a run would write one "
                        "of the two: make the ids unique"
                    )
                seen[query_id] = place


def read_rows(uri: str, columns: Sequence[str]) -> Iterator[dict]:
    """Stream the rows of a Parquet file or folder, in file order, as dicts of the given columns.

    Raises:
        InputError: a file is truncated or damaged, or lacks a column.
    """
    fs, _ = storage.open_filesystem(uri)
    for path in storage.list_files(uri, ".parquet"):
        with open_parquet(fs, path) as file:
            missing = [c for c in columns if file.schema_arrow.get_field_index(c) < 0]
            if missing:
                raise InputError(f"{path}: column {missing[0]!r} is missing")
            with reading(path):
                for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=list(columns)):
                    yield from batch.to_pylist()


def read_candidates(uri: str) -> Iterator[CandidateList]:
    """Stream candidate lists; a row that breaks the contract raises `RowError`, which names `uri`."""
    return (record_of(row, candidate_list_from_row, uri) for row in read_rows(uri, CANDIDATES.names))


def write_rows(
    rows: Iterable[dict],
    uri: str,
    schema: pa.Schema,
    *,
    rows_per_file: int = ROWS_PER_FILE,
    suffix: str = "",
) -> int:
    """Stream rows to `uri`/part-00000.parquet and on, in small row groups; returns the number written.

    Files with a further `suffix` are not read as the folder's data until they are renamed.

    Raises:
        RunError: a file can't be written.
    """
    storage.make_directory(uri)
    fs, folder = storage.open_filesystem(uri)
    total, part, path, writer, buffer = 0, 0, "", None, []

    def flush() -> None:
        nonlocal path, writer, part
        if not buffer:
            return
        table = pa.Table.from_pylist(buffer, schema=schema)
        buffer.clear()
        if writer is None:
            path = posixpath.join(folder, f"part-{part:05d}.parquet{suffix}")
            part += 1
        with storage.writing(path):
            writer = writer or pq.ParquetWriter(path, schema, filesystem=fs)
            writer.write_table(table)

    def close() -> None:
        nonlocal writer
        if writer is not None:
            with storage.writing(path):
                writer.close()
            writer = None

    try:
        for row in rows:
            buffer.append(row)
            total += 1
            if len(buffer) == ROWS_PER_GROUP:
                flush()
            if total % rows_per_file == 0:
                flush()
                close()
        flush()
    finally:
        close()
    return total


def write_candidates(lists: Iterable[CandidateList], uri: str, *, rows_per_file: int = ROWS_PER_FILE) -> int:
    """Write candidate lists to a folder of Parquet files with small row groups; returns the number of rows."""
    return write_rows((candidate_row(c) for c in lists), uri, CANDIDATES, rows_per_file=rows_per_file)
