"""BM25 against the formula computed by hand and by a plain twin; texts for a run's doc ids."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_ray.errors import ConfigError, InputError
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.trec import RunEntry
from rerank_ray.records import Candidate
from rerank_ray.retrieval.bm25 import BM25Index
from rerank_ray.retrieval.hydrate import fetch, hydrate

DOCS = [("d1", "Cat sat"), ("d2", "cat cat dog"), ("d3", "the bird"), ("d4", "")]


def lucene_bm25(query: str, docs: list[tuple[str, str]], k1: float, b: float) -> list[float]:
    """The formula in plain Python, without stop words: the twin of `BM25Index`."""
    bags = [Counter(re.findall(r"\b\w\w+\b", text.lower())) for _, text in docs]
    average = sum(bag.total() for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        score = 0.0
        for token in re.findall(r"\b\w\w+\b", query.lower()):
            df = sum(token in other for other in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            if bag[token]:
                score += idf * bag[token] / (bag[token] + k1 * (1 - b + b * bag.total() / average))
        scores.append(score)
    return scores


def test_scores_are_lucenes_formula():
    """By hand: N = 4, "the" is a stop word, lengths 2, 3, 1, 0, average 1.5; k1 = 0.9, b = 0.4.

    cat: df = 2, idf = ln(1 + 2.5/2.5) = ln 2; dog: df = 1, idf = ln(1 + 3.5/1.5) = ln(10/3).
    d1: length norm 0.9 · (0.6 + 0.4 · 2/1.5) = 1.02, so ln 2 · 1/2.02.
    d2: length norm 0.9 · (0.6 + 0.4 · 3/1.5) = 1.26, so ln 2 · 2/3.26 + ln(10/3) · 1/2.26.
    """
    index = BM25Index.build(DOCS)
    d1, d2 = math.log(2) / 2.02, math.log(2) * 2 / 3.26 + math.log(10 / 3) / 2.26
    assert index.scores("Cat, dog?", ["d1", "d2", "d3", "d4"]) == pytest.approx([d1, d2, 0.0, 0.0], rel=1e-6)
    (found,) = index.search(["Cat, dog?"], 10)
    assert found == [("d2", pytest.approx(d2, rel=1e-6)), ("d1", pytest.approx(d1, rel=1e-6))]


def test_words_of_scripts_with_vowel_signs_are_whole():
    """Hindi `pānī` (water) and `mem` (in) have no two letters side by side: a pattern of letters finds no word there.
    A mark that is written apart, as in `e` with an accent, belongs to its letter too."""
    docs = [("water", "नदी में पानी"), ("mountain", "बड़ा पहाड़"), ("accent", "cafe\u0301s"), ("plain", "cafes")]
    index = BM25Index.build(docs)
    found = index.search(["पानी?", "पहाड़", "पहाड", "Cafe\u0301s"], 4)
    assert [[doc_id for doc_id, _ in ranking] for ranking in found] == [["water"], ["mountain"], [], ["accent"]]


words = st.lists(st.sampled_from(["aa", "bb", "cc", "dd", "ee", "x"]), max_size=8).map(" ".join)


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(words, min_size=1, max_size=8),
    query=words,
    depth=st.integers(1, 9),
    k1=st.floats(0, 3),
    b=st.floats(0, 1),
)
def test_search_agrees_with_the_plain_formula_sorted_stably(texts, query, depth, k1, b):
    docs = [(f"d{i}", text) for i, text in enumerate(texts)]
    index = BM25Index.build(docs, k1=k1, b=b)
    expected = lucene_bm25(query, docs, k1, b)
    every_score = index.scores(query, [doc_id for doc_id, _ in docs])
    assert every_score == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ranked = sorted((i for i, s in enumerate(every_score) if s > 0), key=lambda i: -every_score[i])[:depth]
    assert index.search([query], depth) == [[(f"d{i}", every_score[i]) for i in ranked]]


def test_equal_scores_keep_corpus_order_also_at_the_cut():
    index = BM25Index.build([(f"d{i}", "same words") for i in range(50)] + [("best", "same same same words")])
    (found,) = index.search(["same"], 4)
    assert [doc_id for doc_id, _ in found] == ["best", "d0", "d1", "d2"]


def test_a_document_without_a_common_token_is_not_retrieved():
    index = BM25Index.build(DOCS)
    assert index.search(["zebra", "the", "", "🚀"], 10) == [[], [], [], []]
    assert [doc_id for doc_id, _ in index.search(["the"], 10)[0]] == []


def test_a_repeated_query_token_counts_twice():
    once, twice = (BM25Index.build(DOCS).scores(query, ["d1"])[0] for query in ("cat", "cat cat"))
    assert twice == pytest.approx(2 * once)


def test_a_doc_id_outside_the_collection_has_no_score():
    known, unknown = BM25Index.build(DOCS).scores("cat", ["d3", "nowhere"])
    assert known == 0.0
    assert math.isnan(unknown)


def test_a_collection_without_any_token_finds_nothing_and_one_without_documents_is_refused():
    index = BM25Index.build([("d1", ""), ("d2", "the")])
    assert index.search(["the cat"], 3) == [[]]
    assert index.scores("cat", ["d1"]) == [0.0]
    with pytest.raises(InputError, match="no documents"):
        BM25Index.build([])


@pytest.mark.parametrize("parameters", [{"k1": -1.0}, {"k1": math.nan}, {"b": 1.5}, {"b": math.nan}])
def test_parameters_out_of_range_are_refused(parameters):
    name = next(iter(parameters))
    with pytest.raises(ConfigError, match=f"^{name}="):
        BM25Index.build(DOCS, **parameters)
    with pytest.raises(ConfigError, match=r"^depth=0"):
        BM25Index.build(DOCS).search(["cat"], 0)


def test_positions_and_scores_are_compact_arrays():
    positions, scores = BM25Index.build(DOCS).top("cat", 5)
    assert (positions.dtype, scores.dtype, positions.tolist()) == (np.int32, np.float32, [1, 0])


def entry(doc_id: str, line_number: int) -> RunEntry:
    return RunEntry(doc_id=doc_id, rank=line_number, score=10.0 - line_number, line_number=line_number)


def test_texts_are_joined_in_the_runs_order_and_a_missing_one_names_the_runs_line():
    stream = (Candidate(doc_id=d, text=d.upper(), title="T") for d in "abcd")
    documents = fetch({"b", "d", "z"}, stream)
    assert set(documents) == {"b", "d"}
    entries = [entry("d", 1), entry("z", 2), entry("b", 3)]
    with pytest.raises(InputError, match=r"^run\.txt:2: doc id 'z' is not in the collection"):
        list(hydrate(entries, documents, "run.txt", BadLines()))
    bad = BadLines(skip=True)
    assert list(hydrate(entries, documents, "run.txt", bad)) == [
        Candidate(doc_id="d", text="D", title="T", score=9.0),
        Candidate(doc_id="b", text="B", title="T", score=7.0),
    ]
    assert bad.count == 1
