"""Parquet files of rows: what each broken one is told, fingerprints, and full disks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.full_disk import full_disk
from fixtures.rows import label_row, make_list, write_labels

from rerank_ray import parquet, schema
from rerank_ray.errors import InputError, RunError
from rerank_ray.parquet import inspect_input, read_candidates, write_candidates, write_rows
from rerank_ray.prompts.parse.scores import parse_score_rows
from rerank_ray.records import CandidateList, Query, Ranking, Scores
from rerank_ray.schema import CANDIDATES, LABELS, RANKINGS, candidate_row, label_columns, ranking_row

# Files that break the contract


def write_ids(path: Path, query_ids: list[str | None]) -> str:
    rows = [schema.candidate_row(make_list("q")) | {"query_id": i} for i in query_ids]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=CANDIDATES), path)
    return str(path)


@pytest.mark.parametrize(("bad", "fault"), [(None, "null"), ("", "empty")])
def test_a_missing_query_id_names_file_and_row(tmp_path: Path, bad: str | None, fault: str):
    path = write_ids(tmp_path / "a.parquet", ["q0", "q1", bad])
    with pytest.raises(InputError) as caught:
        inspect_input(path, CANDIDATES)
    assert str(caught.value).startswith(f"{path}: row 2: 'query_id' is {fault};")


def test_a_repeated_query_id_names_both_places(tmp_path: Path):
    first = write_ids(tmp_path / "in" / "a.parquet", ["q0", "q1", "q2"])
    second = write_ids(tmp_path / "in" / "b.parquet", ["q3", "q1"])
    with pytest.raises(InputError) as caught:
        inspect_input(str(tmp_path / "in"), CANDIDATES)
    assert str(caught.value).startswith(f"{second}: row 1: 'query_id' 'q1' is already used at {first}: row 1;")


@pytest.mark.parametrize("kept", [0, 3, 200, -1])
def test_a_truncated_file(tmp_path: Path, kept: int):
    path = tmp_path / "a.parquet"
    write_ids(path, ["q0"])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=f"{path}: not a readable Parquet file"):
        inspect_input(str(path), CANDIDATES)


def test_a_file_that_is_cut_inside_a_page(tmp_path: Path):
    """The footer is whole, but the ids' page, or that of a title, is overwritten: only reading it finds out."""
    path = tmp_path / "a.parquet"
    write_ids(path, [f"q{i}" for i in range(200)])
    overwrite_page(path, 0)
    with pytest.raises(InputError, match=f"{path}: its rows can't be read"):
        inspect_input(str(path), CANDIDATES)
    write_candidates([make_list()], str(tmp_path))
    path = tmp_path / "part-00000.parquet"
    overwrite_page(path, 4)
    inspect_input(str(path), CANDIDATES)
    with pytest.raises(InputError, match=f"{path}: its rows can't be read .*, it is damaged; write it again"):
        list(read_candidates(str(path)))


def overwrite_page(path: Path, number: int) -> None:
    """Damage the first page of a file's column."""
    column = pq.ParquetFile(path).metadata.row_group(0).column(number)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(bytes(content))


def test_every_fault_of_the_columns_at_once(tmp_path: Path):
    """query is an integer, instruction is missing, a candidate's score is text: three faults in one message."""
    candidate = pa.struct(
        [("doc_id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("score", pa.string()),
         ("label", pa.float32())]
    )  # fmt: skip
    table = pa.table(
        {"query_id": ["q"], "query": [1], "candidates": pa.array([[]], type=pa.list_(candidate))},
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError) as caught:
        inspect_input(str(tmp_path), CANDIDATES)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'a.parquet'}: does not follow the 'candidates' schema (version 1): ")
    assert "column 'query' is int64, not string" in said
    assert "column 'instruction' is missing" in said
    assert "column 'candidates' is list<" in said
    assert said.endswith(": `rerank-ray ingest` writes such files")


def test_further_columns_and_other_item_names_are_allowed(tmp_path: Path):
    """Ray and Spark call a list's items `element`, and a file may carry columns of its own."""
    rows = [schema.candidate_row(make_list("q1"))]
    table = pa.Table.from_pylist(rows, schema=CANDIDATES)
    renamed = pa.list_(pa.field("element", CANDIDATES.field("candidates").type.value_type))
    table = table.set_column(3, "candidates", table["candidates"].cast(renamed)).append_column("mine", pa.array([1]))
    pq.write_table(table, tmp_path / "a.parquet")
    assert inspect_input(str(tmp_path), CANDIDATES).rows == 1
    assert list(parquet.read_candidates(str(tmp_path))) == [make_list("q1")]


def test_a_file_that_a_job_would_not_read(tmp_path: Path):
    """Ray Data reads files called *.parquet alone."""
    write_rows([candidate_row(make_list("q1"))], str(tmp_path), CANDIDATES)
    (file,) = tmp_path.glob("*.parquet")
    other = file.rename(tmp_path / "lists.pq")
    with pytest.raises(InputError, match=r"lists\.pq: a job reads files that are called \*\.parquet; rename it"):
        inspect_input(str(other), CANDIDATES)


def test_words_that_no_file_takes():
    """A model's JSON may name a passage with half of a surrogate pair; its batch can be written all the same."""
    defects = parse_score_rows('{"1": 7, "\\ud83d": 3}', ["1"], [(0, 10)]).defects
    assert "\ud83d" in str(defects[0])
    scores = Scores(scores=(1.0, 2.0, 3.0), rationales=("so \udc00",), defects=defects)
    labelled = candidate_row(make_list("q1")) | label_columns("test", scores, error="no \ud83d")
    (row,) = pa.Table.from_pylist([labelled], schema=LABELS).to_pylist()
    assert (row["defects"], row["rationales"], row["error"]) == (["out_of_range: ?"], ["so ?"], "no ?")
    ranking = Ranking(query_id="q1", doc_ids=(), scores=None, model="m", defects=tuple(map(str, defects)))
    (row,) = pa.Table.from_pylist([ranking_row(replace(ranking, error="no \ud83d"))], schema=RANKINGS).to_pylist()
    assert (row["defects"], row["error"]) == (["out_of_range: ?"], "no ?")


def test_no_input_and_an_empty_folder(tmp_path: Path):
    with pytest.raises(InputError, match="the input does not exist"):
        inspect_input(str(tmp_path / "nothing"), CANDIDATES)
    with pytest.raises(InputError, match=r"holds no \.parquet file"):
        inspect_input(str(tmp_path), CANDIDATES)


def test_reading_a_column_that_is_not_there(tmp_path: Path):
    parquet.write_candidates([make_list()], str(tmp_path))
    with pytest.raises(InputError, match=r"part-00000.parquet: column 'teacher' is missing"):
        list(parquet.read_rows(str(tmp_path), ["query_id", "teacher"]))


# Fingerprints


def test_the_fingerprint_is_the_contents(tmp_path: Path):
    """The same rows written elsewhere have the same fingerprint: a copied input does not stop a resume."""
    lists = [make_list(f"q{i}") for i in range(5)]
    for name in ("a", "b"):
        parquet.write_candidates(lists, str(tmp_path / name))
    a, b = (inspect_input(str(tmp_path / name), CANDIDATES) for name in ("a", "b"))
    assert a.fingerprint == b.fingerprint
    np.testing.assert_array_equal(a.id_hashes, b.id_hashes)
    assert list(a.id_hashes) == sorted(parquet.id_hash(f"q{i}") for i in range(5))


def with_text(candidate_list: CandidateList, text: str) -> CandidateList:
    """The list with another text for its second candidate."""
    first, second, *rest = candidate_list.candidates
    return replace(candidate_list, candidates=(first, replace(second, text=text), *rest))


CHANGES = {
    "another id": lambda lists: [*lists[:2], replace(lists[2], query=Query(query_id="r2", text="query")), *lists[3:]],
    "another query": lambda lists: [*lists[:2], replace(lists[2], query=Query(query_id="q2", text="z")), *lists[3:]],
    "a longer text": lambda lists: [*lists[:2], with_text(lists[2], "beta document 1 of q2 and more"), *lists[3:]],
    "another score": lambda lists: [*lists[:2], make_list("q2", scores=[1.0, 2.5, 3.0]), *lists[3:]],
    "a row more": lambda lists: [*lists, make_list("q9")],
    "a row less": lambda lists: lists[:-1],
    "one letter": lambda lists: [*lists[:2], with_text(lists[2], lists[2].candidates[1].text[:-1] + "0"), *lists[3:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_changes_with_the_contents(tmp_path: Path, change: str):
    """Also with what the footer (sizes, smallest and largest value of a column) does not show: the last one."""
    lists = [
        with_text(make_list(f"q{i}", scores=[1.0, 2.0, 3.0]), hashlib.sha256(b"%d" % i).hexdigest()) for i in range(6)
    ]
    parquet.write_candidates(lists, str(tmp_path / "a"))
    parquet.write_candidates(CHANGES[change](lists), str(tmp_path / "b"))
    a, b = (inspect_input(str(tmp_path / name), CANDIDATES) for name in ("a", "b"))
    assert a.fingerprint != b.fingerprint


def test_id_hash_is_the_same_in_every_process():
    """The first eight bytes of BLAKE2b with an eight-byte digest, little-endian, as `b2sum -l 64` prints them."""
    assert parquet.id_hash("q1").to_bytes(8, "little").hex() == "e7837aa50ee28068"


def test_labels_of_another_schema_are_refused(tmp_path: Path):
    folder = write_labels(tmp_path / "labels", [label_row(make_list(), [1.0, 2.0, 3.0])])
    assert inspect_input(folder, CANDIDATES).rows == 1
    with pytest.raises(InputError, match="'rankings' schema"):
        inspect_input(folder, RANKINGS)


@pytest.mark.parametrize("file_bytes", [0, 1000, 20_000])
def test_rows_for_which_there_is_no_room(tmp_path: Path, file_bytes: int):
    """At the first byte, at the footer, and between two row groups."""
    rows = (label_row(make_list(f"q{i}", 60), [0.0] * 60) for i in range(200))
    part = r"part-00000\.parquet: can't be written \(.*File too large"
    with full_disk(file_bytes), pytest.raises(RunError, match=part):
        write_labels(tmp_path / "labels", rows)


def test_rows_that_can_not_be_read_are_no_failure_to_write(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write_labels(tmp_path / "labels", (json.loads(Path(tmp_path / name).read_text()) for name in ("gone", "too")))
