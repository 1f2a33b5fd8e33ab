"""Hits files: RankGPT's and RankLLM's entries, arrays and lines, and the TREC Deep Learning files."""

from __future__ import annotations

import copy
import gzip
import json

import pytest

from rerank_ray.errors import InputError
from rerank_ray.formats.hits import read_hits
from rerank_ray.formats.lines import BadLines
from rerank_ray.records import Candidate, CandidateList, Query

RANKGPT = {
    "query": "what is a flea 🐜",
    "hits": [
        {"content": "second", "qid": 7, "docid": 12, "rank": 2, "score": 1.5},
        {"content": "first", "qid": 7, "docid": "d11", "rank": 1, "score": 2},
    ],
}
RANKLLM = {
    "query": {"text": "what is a flea 🐜", "qid": "7"},
    "candidates": [
        {"docid": "d11", "score": 2.0, "doc": {"contents": "first"}},
        {"docid": 12, "score": 1.5, "doc": {"title": "", "segment": "second"}},
    ],
}
EXPECTED = CandidateList(
    query=Query(query_id="7", text="what is a flea 🐜"),
    candidates=(
        Candidate(doc_id="d11", text="first", score=2.0),
        Candidate(doc_id="12", text="second", score=1.5),
    ),
)


@pytest.mark.parametrize("entry", [RANKGPT, RANKLLM], ids=["rankgpt", "rankllm"])
def test_both_forms_as_array_or_lines_plain_or_gzipped_give_the_same_list(tmp_path, entry):
    texts = [json.dumps([entry], indent=2), json.dumps(entry), "\ufeff \r\n" + json.dumps([entry], ensure_ascii=False)]
    for i, text in enumerate(texts):
        plain, packed = tmp_path / f"{i}.json", tmp_path / f"{i}.json.gz"
        plain.write_text(text)
        packed.write_bytes(gzip.compress(text.encode()))
        assert list(read_hits(str(plain), BadLines())) == [EXPECTED]
        assert list(read_hits(str(packed), BadLines())) == [EXPECTED]


def test_without_ranks_the_order_of_the_file_holds_and_scores_may_be_missing(tmp_path):
    hits = [{"content": c, "qid": "q", "docid": c} for c in "ba"]
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps({"query": "x", "hits": hits}))
    (read,) = read_hits(str(path), BadLines())
    assert [(c.doc_id, c.score) for c in read.candidates] == [("b", None), ("a", None)]


def broken(**change: object) -> dict:
    """RankGPT's entry with fields of the entry, or `hit` fields of its second hit, replaced (None: removed)."""
    entry = copy.deepcopy(RANKGPT)
    target = entry["hits"][1] if change.pop("hit", False) else entry
    for name, value in change.items():
        target.pop(name)
        if value is not None:
            target[name] = value
    return entry


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([1], "not a JSON object"),
        (broken(query=" "), "the query's text is empty"),
        (broken(query=None), "'query' is missing"),
        (broken(query={"text": "x"}), "'query' is a JSON object, not a string"),
        (broken(hits=[]), "'hits' is missing, empty or no array"),
        (broken(hits=None), "'hits' is missing, empty or no array"),
        (broken(hits=["text"]), "'hits' holds something that is not an object"),
        (broken(hit=True, qid=8), "hits of 2 query ids (7, 8)"),
        (broken(hit=True, docid="12"), "doc id '12' is already used on hit 1"),
        (broken(hit=True, content=None), "'content' is missing"),
        (broken(hit=True, rank=None), "a hit's 'rank' is missing"),
        (broken(hit=True, rank="1"), "a hit's 'rank' is missing or no integer"),
        (broken(hit=True, score=float("nan")), "score nan is not a finite"),
        (broken(hit=True, score=10**400), "score 1000"),
        (broken(hit=True, score="2"), "'score' is a JSON string"),
        ({**RANKLLM, "query": "flea"}, "'query' is missing or no object"),
        ({**RANKLLM, "candidates": [{"docid": "a", "doc": "text"}]}, "a candidate's 'doc' is missing"),
        (RANKGPT, "query id '7' is already used on entry 1"),
    ],
)
def test_a_bad_entry_of_an_array_is_named_by_its_number_and_left_out_whole(tmp_path, entry, reason):
    path = tmp_path / "h.json"
    path.write_text(json.dumps([RANKGPT, entry]))
    with pytest.raises(InputError) as error:
        list(read_hits(str(path), BadLines()))
    assert str(error.value).removeprefix(str(path)).startswith(f": entry 2: {reason}")
    bad = BadLines(skip=True)
    assert list(read_hits(str(path), bad)) == [EXPECTED]
    assert bad.count == 1


def test_a_bad_entry_of_a_jsonl_file_is_named_by_its_line(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(RANKGPT) + "\n\n" + json.dumps(broken(query="")) + "\n")
    with pytest.raises(InputError, match=r"h\.jsonl:3: the query's text is empty"):
        list(read_hits(str(path), BadLines()))


def test_a_torn_array_is_refused_even_when_skipping(tmp_path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps([RANKGPT], indent=1)[:-20])
    with pytest.raises(InputError, match=r"h\.json:\d+: not JSON"):
        list(read_hits(str(path), BadLines(skip=True)))


@pytest.mark.parametrize(
    ("name", "queries"),
    [("bm25_dl19", 43), ("bm25_dl21", 53), ("bm25_dl22", 76), ("splade_dl21", 53), ("splade_dl22", 76)],
)
def test_the_trec_deep_learning_files_are_read_whole(collections, name, queries):
    """Counts from the collection's README."""
    lists = list(read_hits(str(collections / "trec-dl" / f"{name}.json.gz"), BadLines()))
    assert len({c.query.query_id for c in lists}) == queries
    assert {len(c) for c in lists} == {100}
