"""Arrow table to Arrow table: one output row for each input row, whatever is wrong with it."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
from fixtures.rows import make_list

from rerank_ray.ranking.rankers import Ranker
from rerank_ray.schema import CANDIDATES, LABELS, RANKINGS, candidate_row, labels_from_row, ranking_from_row
from rerank_ray.settings.models import FakeSettings
from rerank_ray.settings.rankers import CrossEncoderRankerSettings
from rerank_ray.stages import RankStage

BAD_ROWS = {
    "empty query": {"query": " "},
    "no candidates": {"candidates": []},
    "null text": {"candidates": [{"doc_id": "d", "title": None, "text": None, "score": None, "label": None}]},
}


def stage_input() -> pa.Table:
    rows = [candidate_row(make_list(f"good{i}")) for i in range(3)]
    rows[1:1] = [candidate_row(make_list(name)) | change for name, change in BAD_ROWS.items()]
    rows.append(candidate_row(make_list("fails", text="unanswerable")))
    table = pa.Table.from_pylist(rows, schema=CANDIDATES)
    return table.append_column("mine", pa.array(range(len(rows))))


ITEM = CANDIDATES.field("candidates").type.value_type
FAILING = CrossEncoderRankerSettings(model=FakeSettings(fail_on="unanswerable"))


def in_latin_1(value):
    """What `candidate_row` gives, with bytes in the place of text."""
    if isinstance(value, str):
        return value.encode("latin-1")
    if isinstance(value, list):
        return [in_latin_1(item) for item in value]
    return {name: in_latin_1(item) for name, item in value.items()} if isinstance(value, dict) else value


def latin_1_table() -> pa.Table:
    """Candidate rows, of which two aren't UTF-8, as Arrow takes them from a Parquet file: without looking."""
    text = make_list("text")
    text = replace(text, candidates=(*text.candidates[:2], replace(text.candidates[2], text="café")))
    query = make_list("query")
    query = replace(query, query=replace(query.query, text="¿qué?"))
    item = pa.struct([(f.name, pa.binary() if pa.types.is_string(f.type) else f.type) for f in ITEM])
    binary = [(name, pa.list_(item) if name == "candidates" else pa.binary()) for name in CANDIDATES.names]
    rows = [in_latin_1(candidate_row(c)) for c in (make_list("good"), text, query)]
    return pa.Table.from_pylist(rows, schema=pa.schema(binary)).cast(CANDIDATES, safe=False)


@pytest.mark.parametrize("output", ["labels", "rankings"])
def test_a_row_that_is_not_utf8_becomes_a_row_with_an_error(output):
    """It, and not the job, fails; what is written can be read."""
    table = latin_1_table()
    stage = RankStage(CrossEncoderRankerSettings(model=FakeSettings()), output)
    for result in (stage(table), stage.failed(table, "not tried")):
        result.validate(full=True)
        assert result["query_id"].to_pylist() == ["good", "text", "query"]
    good, text, query = stage(table)["error"].to_pylist()
    assert good is None
    assert text == (
        "query 'text': candidate 2: 'text' is not UTF-8 (unexpected end of data at byte 3): write the input again in "
        "UTF-8"
    )
    assert query.startswith("query 'query': 'query' is not UTF-8 (invalid start byte at byte 0)")
    if output == "labels":
        written = stage(table).to_pylist()
        assert written[1]["candidates"][2]["text"] == "caf\N{REPLACEMENT CHARACTER}"
        assert labels_from_row(written[0]).candidate_list == make_list("good")


def test_a_label_stage_gives_one_row_for_each():
    """In their order, bad rows with their error and their candidates as they came; further columns are dropped."""
    table = stage_input()
    stage = RankStage(FAILING, "labels")
    result = stage(table)
    assert result.schema.equals(LABELS, check_metadata=True)
    rows = result.to_pylist()
    assert [r["query_id"] for r in rows] == table["query_id"].to_pylist()
    for row, before in zip(rows, table.to_pylist(), strict=True):
        assert row["candidates"] == before["candidates"]
        assert row["teacher"] == stage.ranker.name
        if row["query_id"].startswith("good"):
            labels = labels_from_row(row)
            assert row["usage"]["calls"] == 3
            expected = Ranker(FAILING).rank([labels.candidate_list])[0].scores.scores
            assert labels.scores == pytest.approx(expected, rel=1e-6)
        else:
            assert row["scores"] is None
    errors = {r["query_id"]: r["error"] for r in rows if r["error"]}
    assert set(errors) == {*BAD_ROWS, "fails"}
    assert "'query' is empty" in errors["empty query"]
    assert "'text' is null" in errors["null text"]
    assert errors["fails"].startswith("no candidate could be scored")
    defects = {r["query_id"]: r["defects"] for r in rows if r["error"]}
    assert len(defects.pop("fails")) == 3
    assert not any(defects.values())


def test_a_ranking_stage_gives_one_row_for_each():
    table = stage_input()
    result = RankStage(FAILING, "rankings")(table)
    assert result.schema.equals(RANKINGS, check_metadata=True)
    rankings = [ranking_from_row(r) for r in result.to_pylist()]
    assert [r.query_id for r in rankings] == table["query_id"].to_pylist()
    for ranking in rankings:
        if ranking.query_id.startswith("good"):
            assert sorted(ranking.doc_ids) == ["d0", "d1", "d2"]
            assert list(ranking.scores) == sorted(ranking.scores, reverse=True)
        else:
            assert ranking.error
            assert ranking.doc_ids == ()


@pytest.mark.parametrize(("output", "schema"), [("labels", LABELS), ("rankings", RANKINGS)])
def test_rows_that_are_not_tried(output: str, schema: pa.Schema):
    result = RankStage(FAILING, output).failed(stage_input(), "gave up")
    assert result.schema.equals(schema, check_metadata=True)
    assert set(result["error"].to_pylist()) == {"gave up"}
    assert result.num_rows == 7


def test_a_stage_passes_an_empty_table_through():
    result = RankStage(FAILING, "labels")(pa.Table.from_pylist([], schema=CANDIDATES))
    assert result.num_rows == 0
    assert result.schema.equals(LABELS)


def test_outcomes_are_the_same_in_one_batch_and_row_by_row():
    table = stage_input()
    stage = RankStage(FAILING, "rankings")
    row_by_row = pa.concat_tables([stage(table.slice(i, 1)) for i in range(table.num_rows)])
    assert stage(table).to_pylist() == row_by_row.to_pylist()
