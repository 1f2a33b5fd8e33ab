"""Readers of BEIR, TREC and hits files: what they yield, and how they name the line that is wrong."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fixtures.rows import make_list
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rerank_ray import parquet, schema
from rerank_ray.errors import InputError
from rerank_ray.formats import beir, hits, trec
from rerank_ray.formats.lines import LISTED_BAD_LINES, BadLines, text_lines
from rerank_ray.formats.qrels import read_qrels
from rerank_ray.records import Candidate, CandidateList, Query, Ranking

in_tmp_path = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def fault_of(read: Callable, path: str) -> str:
    """The message of reading strictly; and reading with skips must count exactly one bad line there."""
    with pytest.raises(InputError) as error:
        list(read(path, BadLines()))
    skipping = BadLines(skip=True)
    list(read(path, skipping))
    assert skipping.count == 1
    assert str(error.value).startswith(str(skipping.listed[0]))
    return str(error.value).removeprefix(path)


# Lines


def test_blank_lines_windows_ends_and_byte_order_mark_do_not_reach_the_records(tmp_path):
    path = write(tmp_path / "t.tsv", b"\xef\xbb\xbf1\tone\r\n\r\n  \n2\ttwo\r\n")
    assert list(trec.read_topics(path, BadLines())) == [
        Query(query_id="1", text="one"),
        Query(query_id="2", text="two"),
    ]
    assert [n for n, _ in text_lines(path, BadLines())] == [1, 4]


def test_gzip_of_two_members_is_read_to_the_end_and_a_torn_one_names_the_line(tmp_path):
    whole = gzip.compress(b"1\tone\n") + gzip.compress(b"2\ttwo\n")
    path = write(tmp_path / "t.tsv.gz", whole)
    assert [q.query_id for q in trec.read_topics(path, BadLines())] == ["1", "2"]
    torn = write(tmp_path / "torn.tsv.gz", gzip.compress(b"1\tone\n" * 1000)[:-12])
    with pytest.raises(InputError, match=r"torn\.tsv\.gz:\d+: can't be read"):
        list(text_lines(torn, BadLines(skip=True)))


@pytest.mark.parametrize(
    ("path", "fault"),
    [("no/such/file.jsonl", "can't be read"), ("nosuchscheme://bucket/file.jsonl", "no address of a file")],
)
def test_a_file_that_cannot_be_opened_is_an_input_error_that_skipping_does_not_hide(path, fault):
    for read in (beir.read_corpus, beir.read_queries, trec.read_run, trec.read_topics, hits.read_hits, read_qrels):
        with pytest.raises(InputError, match=fault):
            list(read(path, BadLines(skip=True)))


def test_a_local_file_uri_is_read_like_its_path(tmp_path):
    path = write(tmp_path / "t.tsv", "1\tone\n")
    assert list(trec.read_topics(f"file://{path}", BadLines())) == list(trec.read_topics(path, BadLines()))


def test_only_the_first_hundred_bad_lines_are_listed_but_all_are_counted():
    bad = BadLines(skip=True)
    for number in range(1, 251):
        bad.report("f", number, "wrong", "mend it")
    assert (bad.count, len(bad.listed)) == (250, LISTED_BAD_LINES)
    assert str(bad.listed[-1]) == "f:100: wrong"
    with pytest.raises(InputError, match=r"^f:7: wrong: mend it"):
        BadLines().report("f", 7, "wrong", "mend it")


# BEIR


def test_beir_documents_and_queries_keep_emoji_and_right_to_left_text(tmp_path):
    text = "مرحبا 🚀 שלום"
    corpus = [{"_id": "d1", "title": "", "text": text}, {"_id": 2, "title": "T", "text": "", "metadata": {}}]
    path = write(tmp_path / "corpus.jsonl", "\n".join(json.dumps(d, ensure_ascii=i == 0) for i, d in enumerate(corpus)))
    assert list(beir.read_corpus(path, BadLines())) == [
        Candidate(doc_id="d1", text=text),
        Candidate(doc_id="2", title="T", text=""),
    ]
    queries = write(tmp_path / "queries.jsonl", json.dumps({"_id": "q", "text": text}))
    assert list(beir.read_queries(queries, BadLines())) == [Query(query_id="q", text=text)]


GOOD_DOC = '{"_id": "d1", "title": "t", "text": "x"}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"_id": "d2", "text": ', "not JSON"),
        ('["d2", "x"]', "JSON array, not an object"),
        ("[" * 100_000, "not JSON"),
        ('{"text": "x"}', "'_id' is missing"),
        ('{"_id": " ", "text": "x"}', "'_id' is empty"),
        ('{"_id": true, "text": "x"}', "'_id' is a JSON boolean"),
        ('{"_id": 1.5, "text": "x"}', "'_id' is a JSON number, not a string"),
        ('{"_id": "d2"}', "'text' is missing"),
        ('{"_id": "d2", "text": null}', "'text' is a JSON null"),
        ('{"_id": "d2", "text": "x", "title": ["t"]}', "'title' is a JSON array"),
        ('{"_id": "d2", "text": "\\ud83d"}', "'text' holds half of a surrogate pair (\\ud83d)"),
        ('{"_id": "d1", "text": "other"}', "doc id 'd1' is already used on line 1"),
    ],
)
def test_a_bad_corpus_line_is_named(tmp_path, line, reason):
    path = write(tmp_path / "corpus.jsonl", GOOD_DOC + line + "\n")
    assert fault_of(beir.read_corpus, path).startswith(f":2: {reason}")


def test_a_line_that_is_not_utf8_is_a_bad_line_but_a_replacement_character_is_text(tmp_path):
    path = write(tmp_path / "corpus.jsonl", GOOD_DOC.encode() + b'{"_id": "d2", "text": "caf\xe9"}\n')
    assert fault_of(beir.read_corpus, path).startswith(":2: byte 27 of the line is not UTF-8")
    fine = write(tmp_path / "fine.jsonl", '{"_id": "d2", "text": "caf\ufffd"}\n')
    assert next(beir.read_corpus(fine, BadLines())).text == "caf\ufffd"


def test_a_gzip_file_without_the_suffix_is_no_bad_line(tmp_path):
    """It is told by its name alone, and its lines must not be left out one by one."""
    path = write(tmp_path / "corpus.jsonl", gzip.compress(GOOD_DOC.encode()))
    with pytest.raises(InputError, match=r"corpus\.jsonl: is gzip, .*: rename it, or unpack it$"):
        list(beir.read_corpus(path, BadLines(skip=True)))


def test_needed_ids_are_yielded_alone_and_only_theirs_are_checked_for_duplicates(tmp_path):
    lines = [{"_id": i, "text": t} for i, t in [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]]
    path = write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, lines)))
    assert [d.doc_id for d in beir.read_corpus(path, BadLines(), {"b", "c"})] == ["b", "c"]
    with pytest.raises(InputError, match=r":3: doc id 'a' is already used on line 1"):
        list(beir.read_corpus(path, BadLines(), {"a"}))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"_id": "q2", "text": " "}', "the query's text is empty"),
        ('{"_id": "q1", "text": "again"}', "query id 'q1' is already used on line 1"),
    ],
)
def test_a_bad_query_line_is_named(tmp_path, line, reason):
    path = write(tmp_path / "queries.jsonl", '{"_id": "q1", "text": "x"}\n' + line)
    assert fault_of(beir.read_queries, path).startswith(f":2: {reason}")


HEADER = "query-id\tcorpus-id\tscore\n"


def test_beir_qrels_are_gains_by_query_and_document(tmp_path):
    path = write(tmp_path / "test.tsv", HEADER + "q1\td1\t2\nq1\td2\t0\nq2\td1\t0.5\n")
    expected = {"q1": {"d1": 2.0, "d2": 0.0}, "q2": {"d1": 0.5}}
    assert beir.read_qrels(path, BadLines()) == expected
    padded = "query-id \t corpus-id \t score\nq1 \t d1 \t 2\nq1\td2\t0\n q2\td1\t0.5\n"
    path = write(tmp_path / "padded.tsv", padded)
    assert beir.read_qrels(path, BadLines()) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("q1\td2", "2 columns, not 3"),
        ("q1\t\t1", "an id is empty"),
        ("q1\td2\trelevant", "score 'relevant' is not a number"),
        ("q1\td2\tnan", "score nan is not a finite 32-bit number"),
        ("q1\td1\t1", "the pair of query and document 'q1 / d1' is already used on line 2"),
    ],
)
def test_a_bad_beir_judgment_is_named(tmp_path, line, reason):
    path = write(tmp_path / "test.tsv", HEADER + "q1\td1\t2\n" + line + "\n")
    assert fault_of(beir.read_qrels, path).startswith(f":3: {reason}")


def test_beir_qrels_without_their_header_are_refused_even_when_skipping(tmp_path):
    path = write(tmp_path / "test.tsv", "q1\td1\t2\n")
    with pytest.raises(InputError, match=r"test\.tsv:1: the first line is not the header"):
        beir.read_qrels(path, BadLines(skip=True))


def test_either_layout_of_qrels_is_recognised_by_its_first_line(tmp_path):
    expected = {"q1": {"d1": 2.0}}
    assert read_qrels(write(tmp_path / "a", HEADER + "q1\td1\t2\n"), BadLines()) == expected
    assert read_qrels(write(tmp_path / "b", "q1 Q0 d1 2\n"), BadLines()) == expected


def test_qrels_without_a_judgment_are_refused(tmp_path):
    """Empty ones, and those of which all lines are skipped: nothing would be labelled, without a word."""
    for content in ("", HEADER, "q1,0,d1,2\n"):
        with pytest.raises(InputError, match="a: holds no judgment that can be read"):
            read_qrels(write(tmp_path / "a", content), BadLines(skip=True))


# TREC


def test_a_run_is_ordered_by_its_rank_column_and_by_scores_where_ranks_repeat(tmp_path):
    """Scores run against q1's ranks, and the lines of q2, whose ranks are all 0, stand between those of q1.

    Of q3 two shards, ranked each for itself, were put into one file.
    """
    path = write(
        tmp_path / "run",
        "q1 Q0 b 2 9.0 t\nq2\tQ0\tx\t0\t-1.5\tt\nq1 Q0 a 1 3.0 t\nq2 Q0 w 0 7 t\n  q1  Q0  c 3 4.0 t  \n"
        "q3 Q0 a 1 9 t\nq3 Q0 b 2 8 t\nq3 Q0 c 1 5 t\nq3 Q0 d 2 8 t\n",
    )
    run = trec.read_run(path, BadLines())
    assert {q: [(e.doc_id, e.score, e.line_number) for e in entries] for q, entries in run.items()} == {
        "q1": [("a", 3.0, 3), ("b", 9.0, 1), ("c", 4.0, 5)],
        "q2": [("w", 7.0, 4), ("x", -1.5, 2)],
        "q3": [("a", 9.0, 6), ("b", 8.0, 7), ("d", 8.0, 9), ("c", 5.0, 8)],
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("q1 Q0 b 2 1.0", "5 columns, not 6"),
        ("q1 Q0 b 2 1.0 a tag", "7 columns, not 6"),
        ("q1 Q0 b 2 NaN t", "score nan is not a finite"),
        ("q1 Q0 b 2 1e400 t", "score inf is not a finite"),
        ("q1 Q0 b 2 high t", "score 'high' is not a number"),
        ("q1 Q0 b 2.5 1.0 t", "rank '2.5' is not an integer"),
        ("q1 Q0 a 2 1.0 t", "the pair of query and document 'q1 / a' is already used on line 1"),
    ],
)
def test_a_bad_run_line_is_named(tmp_path, line, reason):
    path = write(tmp_path / "run", "q1 Q0 a 1 2.0 t\n" + line + "\n")
    assert fault_of(trec.read_run, path).startswith(f":2: {reason}")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("q1 0 b", "3 columns, not 4"),
        ("q1 0 b yes", "gain 'yes' is not a number"),
        ("q1 0 a 0", "the pair of query and document 'q1 / a' is already used on line 1"),
    ],
)
def test_a_bad_qrels_line_is_named(tmp_path, line, reason):
    path = write(tmp_path / "qrels", "q1 0 a 1\n" + line + "\n")
    assert fault_of(trec.read_qrels, path).startswith(f":2: {reason}")


def test_a_no_break_space_belongs_to_the_id(tmp_path):
    path = write(tmp_path / "qrels", "q\u00a01 0 d\u30001 1\n")
    assert trec.read_qrels(path, BadLines()) == {"q\u00a01": {"d\u30001": 1.0}}


ids = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=" \t\n\v\f\r\ufeff"), min_size=1, max_size=6)
floats32 = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100, allow_nan=False)


@st.composite
def rankings(draw) -> list[Ranking]:
    result = []
    for query_id in draw(st.lists(ids, unique=True, max_size=3)):
        doc_ids = draw(st.lists(ids, unique=True, min_size=1, max_size=6))
        scored = draw(st.lists(floats32, max_size=len(doc_ids)))
        scores = (*sorted(scored, reverse=True), *[math.nan] * (len(doc_ids) - len(scored)))
        result.append(Ranking(query_id=query_id, doc_ids=tuple(doc_ids), scores=scores, model="a model"))
    return result


@in_tmp_path
@given(rankings())
def test_a_written_run_is_read_back_and_sorting_by_score_alone_keeps_its_order(tmp_path, originals):
    path = str(tmp_path / "run.trec")
    assert trec.write_run(originals, path) == len(originals)
    run = trec.read_run(path, BadLines())
    assert list(run) == [r.query_id for r in originals]
    for ranking in originals:
        entries = run[ranking.query_id]
        assert tuple(e.doc_id for e in entries) == ranking.doc_ids
        assert [e.rank for e in entries] == list(range(1, len(entries) + 1))
        scored = [s for s in ranking.scores if not math.isnan(s)]
        read = [e.score for e in entries[: len(scored)]]
        assert all(shown <= score for shown, score in zip(read, scored, strict=True))
        assert np.allclose(read, scored, rtol=1e-6, atol=1e-40)
        assert all(later < earlier for earlier, later in pairwise(np.float32([e.score for e in entries])))


def test_documents_of_one_score_are_written_a_float_apart(tmp_path):
    """trec_eval would put b before a, and reads 32 bits: 2 + 1e-9 is 2 there. Around 2 they are 2^-22 apart, below it
    2^-23; the 1.0 is far enough below."""
    doc_ids = ("c", "a", "b", "d")
    ranking = Ranking(query_id="q", doc_ids=doc_ids, scores=(2.0 + 1e-9, 2.0, 2.0, 1.0), model="m")
    trec.write_run([ranking], str(tmp_path / "run"))
    entries = trec.read_run(str(tmp_path / "run"), BadLines())["q"]
    assert [e.score for e in entries] == [2.0 + 1e-9, 2.0 - 2.0**-23, 2.0 - 2.0**-22, 1.0]
    by_score = sorted(entries, key=lambda e: (np.float32(e.score), e.doc_id), reverse=True)
    assert tuple(e.doc_id for e in by_score) == doc_ids


def test_a_ranking_with_an_error_has_no_lines_and_unscored_documents_move_to_the_end(tmp_path):
    """Lowest score 2.0, so the two unscored documents get 1.0 and 0.0."""
    ok = Ranking(query_id="q1", doc_ids=("n", "a", "b", "m"), scores=(math.nan, 2.5, 2.0, math.nan), model="bm 25")
    failed = Ranking(query_id="q2", doc_ids=(), scores=None, model="m", error="out of memory")
    path = tmp_path / "new" / "run"
    assert trec.write_run([ok, failed], str(path)) == 1
    assert path.read_text() == ("q1 Q0 a 1 2.5 bm_25\nq1 Q0 b 2 2.0 bm_25\nq1 Q0 n 3 1.0 bm_25\nq1 Q0 m 4 0.0 bm_25\n")


@pytest.mark.parametrize(
    ("doc_ids", "scores", "message"),
    [
        (("a b",), (1.0,), "'a b' is empty or has blanks"),
        (("a", "b"), (1.0, 2.0), "scores do not descend"),
        (("a",), (math.inf,), "a score is infinite"),
        (("a",), (-1e39,), "a score is infinite as a 32-bit float"),
        (("a", "b"), (1.0,), "one score per document"),
        (("a",), None, "one score per document"),
    ],
)
def test_a_ranking_that_a_run_cannot_hold_is_refused(tmp_path, doc_ids, scores, message):
    with pytest.raises(InputError, match=message):
        trec.write_run([Ranking(query_id="q", doc_ids=doc_ids, scores=scores, model="m")], str(tmp_path / "run"))


def test_topics_and_collections_take_each_documented_field_name(tmp_path):
    topics = "".join(
        json.dumps({name: name, text: "x"}) + "\n" for name in trec.QUERY_IDS for text in ("text",)
    ) + json.dumps({"qid": 7, "query": "y"})
    read = list(trec.read_topics(write(tmp_path / "t.jsonl", topics), BadLines()))
    assert [q.query_id for q in read] == [*trec.QUERY_IDS, "7"]
    documents = [{"docid": text, text: "x", "title": "T"} for text in trec.DOC_TEXTS]
    path = write(tmp_path / "c.json", "\n".join(map(json.dumps, documents)))
    assert list(trec.read_collection(path, BadLines())) == [
        Candidate(doc_id=name, text="x", title="T") for name in trec.DOC_TEXTS
    ]


def test_an_ms_marco_v2_passage_is_known_by_its_pid_not_by_its_documents_id(tmp_path):
    path = write(tmp_path / "c.gz", gzip.compress(b'{"pid": "p_1", "passage": "x", "docid": "d_1"}'))
    assert list(trec.read_collection(path, BadLines())) == [Candidate(doc_id="p_1", text="x")]


def test_tsv_topics_keep_later_tabs_and_collections_take_two_or_three_columns(tmp_path):
    assert next(trec.read_topics(write(tmp_path / "t", "1\ta\tb"), BadLines())).text == "a\tb"
    path = write(tmp_path / "c", "1\tbody\n2\ttitle\tbody\n3\t\n")
    assert list(trec.read_collection(path, BadLines())) == [
        Candidate(doc_id="1", text="body"),
        Candidate(doc_id="2", title="title", text="body"),
        Candidate(doc_id="3", text=""),
    ]
    wide = write(tmp_path / "w", "1\tbody\nD1\turl\ttitle\tbody\n")
    assert fault_of(trec.read_collection, wide).startswith(":2: 4 columns, not 2 or 3")
    assert fault_of(trec.read_topics, write(tmp_path / "x", "1\ta\n2 b\n")).startswith(":2: no tab")


# Any bytes at all

READERS = [
    beir.read_corpus,
    beir.read_queries,
    trec.read_topics,
    trec.read_collection,
    trec.read_run,
    hits.read_hits,
    read_qrels,
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["_id", "text", "doc"]), inner),
    max_leaves=6,
)
field_names = st.sampled_from(["_id", "text", "title", "query", "qid", "docid", "hits", "candidates", "rank", "score"])
objects = st.dictionaries(field_names, json_values | st.lists(st.dictionaries(field_names, json_values), max_size=3))
lines = st.one_of(st.binary(max_size=30), objects.map(json.dumps).map(str.encode), st.text(max_size=30).map(str.encode))
file_bytes = st.lists(lines, max_size=5).map(b"\n".join) | st.lists(objects).map(json.dumps).map(str.encode)


@in_tmp_path
@given(file_bytes)
def test_any_bytes_parse_or_give_an_input_error_with_path_and_line(tmp_path, content):
    path = write(tmp_path / "any", content)
    for read in READERS:
        try:
            list(read(path, BadLines()))
        except InputError as error:
            place = str(error).removeprefix(path)
            if place.startswith((": holds no judgment", ": is gzip,")):
                continue
            assert place.startswith((":", ": entry "))
            assert place.lstrip(": entry")[0].isdigit()


def test_only_commands_with_the_option_recommend_it(tmp_path: Path):
    path = write(tmp_path / "run", "q1 Q0 a x 1.0 t\n")
    for bad, recommended in ((BadLines(), False), (BadLines(skip=False), True)):
        with pytest.raises(InputError) as caught:
            trec.read_run(path, bad)
        assert ("--skip-bad-lines" in str(caught.value)) is recommended


@pytest.mark.parametrize(
    ("query_id", "doc_id", "said"),
    [
        ("q 1", "d", r"part-00000\.parquet: row 1: query id 'q 1' has blanks"),
        ("q1", "a\tb", r"part-00000\.parquet: row 1: doc id 'a\\tb' has blanks.*trec_run: false"),
    ],
)
def test_ids_that_a_run_cannot_hold_are_found_before_ranking(tmp_path: Path, query_id: str, doc_id: str, said: str):
    odd = CandidateList(query=Query(query_id=query_id, text="q"), candidates=(Candidate(doc_id=doc_id, text="t"),))
    rows = [schema.candidate_row(make_list("q0", 3)), schema.candidate_row(odd)]
    parquet.write_rows(rows[:1], str(tmp_path / "good"), schema.CANDIDATES)
    trec.check_ids(str(tmp_path / "good"))
    parquet.write_rows(rows, str(tmp_path / "bad"), schema.CANDIDATES)
    with pytest.raises(InputError, match=said):
        trec.check_ids(str(tmp_path / "bad"))
