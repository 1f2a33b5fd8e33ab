"""The Parquet contract: what survives a round trip, and what each broken row is told."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fixtures.rows import label_row, make_list
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rerank_ray import parquet, schema
from rerank_ray.errors import RowError
from rerank_ray.parquet import inspect_input
from rerank_ray.records import Candidate, CandidateList, Defect, DefectKind, Query, Ranking, Scores, Usage
from rerank_ray.schema import CANDIDATES, LABELS, RANKINGS

# Round trips

texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["😀👩‍👩‍👧‍👦🏳️‍🌈", "שלום עולם", "مرحبا بالعالم", "x" * 200_000, "ab\u202ecd", "\0", "a\nb\tc"]),
)
ids = st.text(min_size=1, max_size=12)
numbers = st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False)
queries = st.builds(
    Query, query_id=ids, text=st.text(min_size=1, max_size=40).filter(str.strip), instruction=st.none() | texts
)
candidate_lists = st.builds(
    CandidateList,
    query=queries,
    candidates=st.lists(
        st.builds(Candidate, doc_id=ids, text=texts, title=st.none() | texts, score=numbers, label=numbers),
        min_size=1,
        max_size=5,
        unique_by=lambda c: c.doc_id,
    ).map(tuple),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lists=st.lists(candidate_lists, max_size=4))
def test_candidate_lists_survive_arrow(lists: list[CandidateList]):
    """The record that is written is the record that is read: Arrow holds float32, so the scores drawn are float32."""
    table = pa.Table.from_pylist([schema.candidate_row(c) for c in lists], schema=CANDIDATES)
    assert [schema.candidate_list_from_row(row) for row in table.to_pylist()] == lists


def test_candidate_lists_survive_files(tmp_path: Path):
    """The same through Parquet, over several files: 50 rows in files of 20 are three files, in order."""
    lists = [make_list(f"q{i}", 1 + i % 3, text="שאלה 😀") for i in range(50)]
    lists[7] = CandidateList(
        query=Query(query_id="long", text="q", instruction="find"),
        candidates=(Candidate(doc_id="d", text="ص" * 200_000, title="😀", score=0.5, label=2.0),),
    )
    assert parquet.write_candidates(lists, str(tmp_path / "out"), rows_per_file=20) == 50
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert list(parquet.read_candidates(str(tmp_path / "out"))) == lists
    assert inspect_input(str(tmp_path / "out"), CANDIDATES).rows == 50


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(width=32, allow_infinity=False), min_size=3, max_size=3),
    rationale=texts,
    usage=st.builds(Usage, calls=st.integers(0, 9), prompt_tokens=st.integers(0, 2**40)),
)
def test_labels_survive_arrow(scores: list[float], rationale: str, usage: Usage):
    """NaN (no score) stays NaN in its place; defects come back as the text `kind: detail`."""
    given_scores = Scores(
        scores=tuple(scores),
        uncertainty=(0.0, 0.5, 1.0),
        rationales=(rationale, "", "b"),
        defects=(Defect(kind=DefectKind.UNSCORED, detail="d1: why"),),
    )
    row = schema.candidate_row(make_list()) | schema.label_columns("t", given_scores, usage)
    (back,) = pa.Table.from_pylist([row], schema=LABELS).to_pylist()
    labels = schema.labels_from_row(back)
    assert labels.candidate_list == make_list()
    np.testing.assert_array_equal(labels.scores, scores)
    assert (labels.uncertainty, labels.rationales) == ((0.0, 0.5, 1.0), (rationale, "", "b"))
    assert labels.teacher == "t"
    assert (back["defects"], Usage(**back["usage"])) == (["unscored: d1: why"], usage)


@pytest.mark.parametrize(
    "ranking",
    [
        Ranking(query_id="q", doc_ids=("b", "a"), scores=(2.0, -1.0), model="m", exit_layer=3),
        Ranking(query_id="q", doc_ids=(), scores=None, model="m", error="no candidate could be scored"),
    ],
)
def test_rankings_survive_arrow(ranking: Ranking):
    (row,) = pa.Table.from_pylist([schema.ranking_row(ranking)], schema=RANKINGS).to_pylist()
    assert schema.ranking_from_row(row) == ranking


# Rows that break the contract

GOOD_CANDIDATE = {"doc_id": "d1", "title": None, "text": "t", "score": 1.0, "label": None}
GOOD_ROW = {"query_id": "q1", "query": "what", "instruction": None, "candidates": [GOOD_CANDIDATE]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query_id": None}, "'query_id' is null"),
        ({"query_id": ""}, "'query_id' is empty"),
        ({"query": None}, "query 'q1': 'query' is null"),
        ({"query": " \n"}, "query 'q1': 'query' is empty"),
        ({"candidates": None}, "query 'q1': 'candidates' is null"),
        ({"candidates": []}, "query 'q1': 'candidates' is empty"),
        ({"candidates": [GOOD_CANDIDATE, None]}, "query 'q1': candidate 1 is null"),
        ({"candidates": [GOOD_CANDIDATE | {"doc_id": None}]}, "query 'q1': candidate 0 has no 'doc_id'"),
        ({"candidates": [GOOD_CANDIDATE | {"doc_id": ""}]}, "query 'q1': candidate 0 has no 'doc_id'"),
        ({"candidates": [GOOD_CANDIDATE | {"text": None}]}, "query 'q1': candidate 0 ('d1'): 'text' is null"),
        ({"candidates": [GOOD_CANDIDATE | {"score": math.nan}]}, "query 'q1': candidate 0 ('d1'): 'score' is NaN"),
        ({"candidates": [GOOD_CANDIDATE | {"label": math.nan}]}, "query 'q1': candidate 0 ('d1'): 'label' is NaN"),
        ({"candidates": [GOOD_CANDIDATE] * 2}, "query 'q1': doc_id 'd1' is both candidate 0 and candidate 1"),
    ],
)
def test_a_bad_row_names_the_query_and_the_fault(change: dict, said: str):
    with pytest.raises(RowError) as caught:
        schema.candidate_list_from_row(GOOD_ROW | change)
    assert str(caught.value).startswith(said)


def test_an_empty_text_is_a_text():
    """An empty document can be scored (and ranked last); a null text means that nobody looked it up."""
    row = GOOD_ROW | {"candidates": [GOOD_CANDIDATE | {"text": ""}]}
    assert schema.candidate_list_from_row(row).candidates[0].contents == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"error": "out of memory"}, "query 'q1' was not labelled: out of memory"),
        ({"scores": None}, "query 'q1': 'scores' is null although 'error' is null"),
        ({"scores": [1.0, 2.0]}, "query 'q1': 'scores' has 2 entries for 3 candidates"),
        ({"uncertainty": [1.0]}, "query 'q1': 'uncertainty' has 1 entries for 3 candidates"),
    ],
)
def test_bad_labels_name_the_query_and_the_fault(change: dict, said: str):
    with pytest.raises(RowError) as caught:
        schema.labels_from_row(label_row(make_list(), [1.0, 2.0, 3.0]) | change)
    assert str(caught.value) == said


def test_a_null_teacher_score_is_no_score():
    scores = schema.labels_from_row(label_row(make_list(), [1.0, None, 3.0])).scores
    np.testing.assert_array_equal(scores, [1.0, math.nan, 3.0])


def test_a_ranking_with_too_few_scores():
    row = {"query_id": "q1", "doc_ids": ["a", "b"], "scores": [1.0], "exit_layer": None, "model": "m", "error": None}
    with pytest.raises(RowError, match="query 'q1': 'scores' has 1 entries for 2 doc ids"):
        schema.ranking_from_row(row)
