"""Parquet files of rows that follow the contract: checked before anything expensive starts, streamed in and out.

Faults of files (a truncated one, a column of another type, a repeated query id) are found by `inspect_input`.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank_ray import storage
from rerank_ray.errors import InputError, RowError
from rerank_ray.records import CandidateList
from rerank_ray.schema import CANDIDATES, LABELS, VERSION, candidate_list_from_row, candidate_row

Record = TypeVar("Record")

ROWS_PER_GROUP = 16
ROWS_PER_FILE = 4096
_READ_BYTES = 4 << 20
_SCORED_ROWS = 1024
_MAKERS = {"candidates": "ingest", "labels": "label"}
"""Which command writes a table that users give to others."""


# Reading


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

    def look(path: str) -> tuple[int, bytes, np.ndarray]:
        with open_parquet(fs, path) as file:
            check_columns(file.schema_arrow, expected, path)
            return fs.get_file_info(path).size, _content_digest(fs, path), _query_id_hashes(file, path)

    digest = hashlib.sha256()
    hashes: list[np.ndarray] = []
    for path, (size, content, of_file) in zip(paths, storage.of_each_file(look, paths), strict=True):
        digest.update(f"{posixpath.basename(path)}:{size}:".encode())
        digest.update(content)
        hashes.append(of_file)
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


def read_scored(uri: str, wanted: Container[str] | None = None) -> Iterator[dict]:
    """Stream label rows with `query_id`, `teacher`, `scores`, `error`, and of `candidates` just `doc_id` and `label`.

    Texts are most of a label file, and are not decoded. Of rows of other queries than `wanted` no Python objects are
    made, and files that hold no others are not decoded.
    """
    fs, _ = storage.open_filesystem(uri)
    for path in storage.list_files(uri, ".parquet"):
        with open_parquet(fs, path) as file:
            if wanted is not None and not any(query_id in wanted for _, query_id in _query_ids(file)):
                continue
            ids = doc_id_path(file, path)
            columns = ["query_id", "teacher", "scores", "error", ids, ids.removesuffix("doc_id") + "label"]
            for batch in file.iter_batches(batch_size=_SCORED_ROWS, columns=columns):
                if wanted is not None:
                    batch = batch.filter(pa.array([i in wanted for i in batch["query_id"].to_pylist()], pa.bool_()))
                yield from batch.to_pylist()


@contextmanager
def open_parquet(fs: pa.fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, whose rows are read inside.

    Raises:
        InputError: it can't be opened, or its data is damaged behind a whole footer.
    """
    try:
        file = pq.ParquetFile(path, filesystem=fs)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}): it is truncated or was not written "
            "completely; delete it and write it again"
        ) from error
    with file:
        try:
            yield file
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: its rows can't be read ({str(error).splitlines()[0]}): unless its place is out of reach, it "
                "is damaged; write it again"
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
    for row, query_id in _query_ids(file):
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


def _query_ids(file: pq.ParquetFile) -> Iterator[tuple[int, str | None]]:
    row = 0
    for batch in file.iter_batches(batch_size=8192, columns=["query_id"]):
        for query_id in batch.column(0).to_pylist():
            yield row, query_id
            row += 1


def _raise_first_duplicate(fs: pa.fs.FileSystem, paths: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        with open_parquet(fs, path) as file:
            for row, query_id in _query_ids(file):
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
            for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=list(columns)):
                yield from batch.to_pylist()


def record_of(row: dict, parse: Callable[[dict], Record], uri: str) -> Record:
    """`parse` of a row that was read from `uri`, which a `RowError` then names."""
    try:
        return parse(row)
    except RowError as error:
        raise RowError(f"{uri}: {error}") from error


def read_candidates(uri: str) -> Iterator[CandidateList]:
    """Stream candidate lists; a row that breaks the contract raises `RowError`, which names `uri`."""
    return (record_of(row, candidate_list_from_row, uri) for row in read_rows(uri, CANDIDATES.names))


# Writing


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
    rows, total = iter(rows), 0
    for part in itertools.count():
        groups = _row_groups(itertools.islice(rows, rows_per_file), schema)
        first = next(groups, None)
        if first is None:
            break
        path = posixpath.join(folder, f"part-{part:05d}.parquet{suffix}")
        # Only around the writing: what reading the rows raises is not the file's fault.
        with storage.writing(path):
            writer = pq.ParquetWriter(path, schema, filesystem=fs)
        try:
            for group in itertools.chain([first], groups):
                with storage.writing(path):
                    writer.write_table(group)
                total += group.num_rows
        finally:
            with storage.writing(path):
                writer.close()
    return total


def _row_groups(rows: Iterator[dict], schema: pa.Schema) -> Iterator[pa.Table]:
    while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
        yield pa.Table.from_pylist(group, schema=schema)


def write_candidates(lists: Iterable[CandidateList], uri: str, *, rows_per_file: int = ROWS_PER_FILE) -> int:
    """Write candidate lists to a folder of Parquet files with small row groups; returns the number of rows."""
    return write_rows((candidate_row(c) for c in lists), uri, CANDIDATES, rows_per_file=rows_per_file)
