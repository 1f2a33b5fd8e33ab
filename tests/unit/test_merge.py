"""Candidates of several first stages: which come first, what they keep, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rerank_ray.errors import InputError, RowError
from rerank_ray.formats.merge import read_merged
from rerank_ray.ingest import ingest_merge
from rerank_ray.parquet import read_candidates, write_candidates
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.schema import CANDIDATES


def a_list(query_id: str, *doc_ids: str, gains: dict[str, float] | None = None) -> CandidateList:
    """A query with these documents; their scores fall from 10."""
    candidates = tuple(
        Candidate(doc_id=d, text=f"text of {d}", score=10.0 - n, label=(gains or {}).get(d))
        for n, d in enumerate(doc_ids)
    )
    return CandidateList(
        query=Query(query_id=query_id, text=f"text of {query_id}", instruction="find"), candidates=candidates
    )


def write(folder: Path, *lists: CandidateList, **options) -> str:
    write_candidates(lists, str(folder), **options)
    return str(folder)


def doc_ids(source: str) -> dict[str, list[str]]:
    return {c.query.query_id: [x.doc_id for x in c.candidates] for c in read_candidates(source)}


def test_both_orders_by_hand(tmp_path: Path):
    """A finds a b c, B finds c d: interleaved a c b d; by RRF c = 1/63 + 1/61, then a = 1/61, then b and d, tied at
    1/62, in the interleaved order."""
    inputs = [write(tmp_path / "a", a_list("q", "a", "b", "c")), write(tmp_path / "b", a_list("q", "c", "d"))]
    for method, expected in {"interleave": "acbd", "rrf": "cabd"}.items():
        ingest_merge(inputs, out=str(tmp_path / method), method=method)
        assert doc_ids(str(tmp_path / method)) == {"q": list(expected)}
    (fused,) = read_candidates(str(tmp_path / "rrf"))
    assert [c.score for c in fused.candidates] == pytest.approx([1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62])
    (interleaved,) = read_candidates(str(tmp_path / "interleave"))
    assert {c.score for c in interleaved.candidates} == {None}
    assert fused.query == interleaved.query == a_list("q").query
    assert {c.text for c in fused.candidates} == {f"text of {d}" for d in "abcd"}


def test_queries_of_any_source_once(tmp_path: Path):
    """The first source's come first and in its order; the ones that only later sources know follow."""
    inputs = [
        write(tmp_path / "a", a_list("q2", "a"), a_list("q1", "b")),
        write(tmp_path / "b", a_list("q1", "c"), a_list("q3", "d")),
        write(tmp_path / "c", a_list("q4", "e"), a_list("q3", "f"), a_list("q2", "g")),
    ]
    ingest_merge(inputs, out=str(tmp_path / "out"), method="interleave")
    merged = doc_ids(str(tmp_path / "out"))
    assert merged == {"q2": ["a", "g"], "q1": ["b", "c"], "q3": ["d", "f"], "q4": ["e"]}
    assert list(merged) == ["q2", "q1", "q3", "q4"]


def test_a_file_without_rows_is_merged(tmp_path: Path):
    """As others may write it: one group of no rows."""
    inputs = [write(tmp_path / "a", a_list("q", "a")), write(tmp_path / "b", a_list("q", "b"))]
    empty = CANDIDATES.empty_table()
    pq.write_table(empty, tmp_path / "b" / "empty.parquet")
    ingest_merge(inputs, out=str(tmp_path / "out"), method="interleave")
    assert doc_ids(str(tmp_path / "out")) == {"q": ["a", "b"]}


def test_a_gain_that_any_source_knows_is_kept(tmp_path: Path):
    inputs = [write(tmp_path / "a", a_list("q", "a", "b")), write(tmp_path / "b", a_list("q", "b", gains={"b": 2.0}))]
    summary = ingest_merge(inputs, out=str(tmp_path / "out"), depth=1)
    (row,) = read_candidates(str(tmp_path / "out"))
    assert [(c.doc_id, c.label) for c in row.candidates] == [("b", 2.0)]
    assert (summary.kind, summary.rows, summary.candidates, summary.labelled_pairs) == ("merge", 1, 1, 1)
    assert summary.parameters["depth"] == 1


def test_sources_that_disagree(tmp_path: Path):
    first = write(tmp_path / "a", a_list("q", "a", gains={"a": 1.0}))
    gain = write(tmp_path / "b", a_list("q", "a", gains={"a": 3.0}))
    with pytest.raises(InputError, match="'a' has gain 3, but 1 in an earlier source"):
        ingest_merge([first, gain], out=str(tmp_path / "out"))
    other = a_list("q", "a")
    text = write(tmp_path / "c", replace(other, query=replace(other.query, text="another text")))
    with pytest.raises(InputError, match=r"c: query 'q' is 'another text' .* merge first stages over the same queries"):
        ingest_merge([first, text], out=str(tmp_path / "out"), overwrite=True)


def test_a_row_that_breaks_the_contract_is_named_with_its_source(tmp_path: Path):
    """Whether it comes in its source's order, or is looked up for an earlier source's query."""
    broken = replace(a_list("q2", "a"), candidates=(replace(a_list("q2", "a").candidates[0], text=None),))
    good, bad = write(tmp_path / "a", a_list("q1", "a"), a_list("q2", "b")), write(tmp_path / "b", broken)
    for inputs in ([good, bad], [bad, good]):
        with pytest.raises(RowError, match=f"^{bad}: query 'q2': candidate 0 .'a'.: 'text' is null"):
            list(read_merged(inputs, "rrf"))


def test_an_input_is_not_overwritten(tmp_path: Path):
    inputs = [write(tmp_path / "a", a_list("q", "a")), write(tmp_path / "b", a_list("q", "b"))]
    with pytest.raises(InputError, match="the input would be lost"):
        ingest_merge(inputs, out=f"{tmp_path}/b/", overwrite=True)
    with pytest.raises(InputError, match="the input does not exist"):
        ingest_merge([inputs[0], str(tmp_path / "none")], out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


lists_of = st.dictionaries(
    st.integers(0, 60).map(str), st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True), max_size=60
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(lists_of.filter(bool), min_size=1, max_size=3), shuffled=st.randoms(use_true_random=False))
def test_merging_equals_its_plain_twin(tmp_path_factory, found: list[dict], shuffled: random.Random):
    """Sources in any order of queries, over several row groups and files; a dictionary in memory is the twin."""
    folder = tmp_path_factory.mktemp("merge")
    sources = []
    for number, lists in enumerate(found):
        order = list(lists)
        shuffled.shuffle(order)
        rows = [a_list(query_id, *lists[query_id]) for query_id in order]
        sources.append(write(folder / str(number), *rows, rows_per_file=32))
    merged = {q.query_id: [c.doc_id for c in candidates] for q, candidates in read_merged(sources, "interleave")}
    expected = {}
    for query_id in {q for lists in found for q in lists}:
        columns = [lists.get(query_id, []) for lists in found]
        in_turn = [column[rank] for rank in range(8) for column in columns if rank < len(column)]
        expected[query_id] = list(dict.fromkeys(in_turn))
    assert merged == expected
