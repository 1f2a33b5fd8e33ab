"""Training data of other projects, read to labels."""

from __future__ import annotations

import math
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.training_data import in_tmp_path, read, shown, stored, write_lines
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.distill.labels import LabelSet
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.sentence_transformers import read_margins
from rerank_ray.formats.training_data import TrainingLists, text_id
from rerank_ray.formats.triples import read_triples
from rerank_ray.ingest_labels import ingest_lists, ingest_rank_distillm, ingest_triples
from rerank_ray.records import Query


def test_flagembeddings_scores_are_the_teachers_and_its_prompt_the_instruction(tmp_path):
    line = {
        "query": "q",
        "pos": ["a"],
        "neg": ["b", "c"],
        "pos_scores": [0.5],
        "neg_scores": [2, -1.5],
        "prompt": "Find it",
        "type": "normal",
    }
    (labels,) = read("flagembedding", write_lines(tmp_path / "train.jsonl", line))
    assert shown(labels) == [
        (text_id("a"), "a", 1.0, 0.5),
        (text_id("b"), "b", 0.0, 2.0),
        (text_id("c"), "c", 0.0, -1.5),
    ]
    assert labels.candidate_list.query == Query(query_id=text_id("q"), text="q", instruction="Find it")
    assert labels.teacher == "imported:train.jsonl"


def test_without_scores_the_gains_are_the_labels_and_ids_are_read_where_they_are(tmp_path):
    line = {"query_id": 7, "query": "q", "pos": ["a"], "neg": ["b"], "pos_id": [3], "neg_id": ["x"]}
    (labels,) = read("flagembedding", write_lines(tmp_path / "train.jsonl", line | {"pos_scores": None}))
    assert shown(labels) == [("3", "a", 1.0, 1.0), ("x", "b", 0.0, 0.0)]
    assert (labels.candidate_list.query.query_id, labels.teacher) == ("7", "gains:train.jsonl")


def test_a_query_without_an_id_has_its_texts_in_every_file_and_further_lists_are_numbered(tmp_path):
    lines = [{"query": q, "pos": [p], "neg": ["n"]} for q, p in (("q", "a"), ("r", "b"), ("q", "c"))]
    one, two = write_lines(tmp_path / "1", *lines), write_lines(tmp_path / "2", lines[2])
    ids = [labels.candidate_list.query.query_id for labels in read("flagembedding", one, two)]
    assert ids == [text_id("q"), text_id("r"), text_id("q") + "-2", text_id("q") + "-3"]


def test_a_file_given_twice_is_refused(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", {"query": "q", "pos": ["a"], "neg": ["b"]})
    with pytest.raises(InputError, match=r"f\.jsonl: is given more than once"):
        ingest_lists("flagembedding", [path, f"{tmp_path}/./f.jsonl"], out=str(tmp_path / "out"))


def test_a_passage_given_twice_alike_is_one_candidate(tmp_path):
    path = write_lines(tmp_path / "f", {"query": "q", "pos": ["a"], "neg": ["b", "b"]})
    assert [text for _, text, *_ in shown(read("flagembedding", path)[0])] == ["a", "b"]


GOOD = {
    "flagembedding": {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1.0], "neg_scores": [0.0]},
    "sentence-transformers": {"query": "q", "docs": ["a", "b"], "scores": [1.0, 0.0]},
    "margin-mse": {"query": "q", "positive": "a", "negative": "b", "label": 1.0},
    "tevatron": {
        "query_id": "1",
        "query": "q",
        "positive_passages": [{"docid": "a", "title": "", "text": "t"}],
        "negative_passages": [],
    },
}


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("flagembedding", {"query": " "}, "the query's text is empty"),
        ("flagembedding", {"neg": "b"}, "'neg' is a JSON string, not an array"),
        ("flagembedding", {"neg": ["b", 3]}, "'neg[1]' is a JSON number, not a string"),
        ("flagembedding", {"neg_scores": None}, "'pos_scores' without the other side's"),
        ("flagembedding", {"neg_scores": []}, "'neg_scores' has 0 entries for 1 in 'neg'"),
        ("flagembedding", {"neg_scores": [math.nan]}, "neg_scores[0] nan is not a finite 32-bit number"),
        ("flagembedding", {"neg_scores": [None]}, "'neg_scores[0]' is null"),
        ("flagembedding", {"neg_id": ["x", "y"]}, "'neg_id' has 2 entries for 1 in 'neg'"),
        ("flagembedding", {"neg": ["a"]}, "passage '" + text_id("a") + "' ('a') is there twice"),
        ("flagembedding", {"pos": [], "neg": [], "pos_scores": [], "neg_scores": []}, "the query has no passages"),
        ("flagembedding", {"pos_scores": None, "neg_scores": None}, "the list has no teacher scores"),
        ("sentence-transformers", {"labels": [1, 0]}, "the columns are query, docs, scores, labels"),
        ("sentence-transformers", {"id": "x"}, "the columns are query, docs, scores, id"),
        ("sentence-transformers", {"scores": [1.0]}, "'scores' has 1 entries for 2 in 'docs'"),
        ("sentence-transformers", {"docs": ["a", "a"]}, "passage '" + text_id("a") + "' ('a') is there twice"),
        ("margin-mse", {"negative": "a"}, "'positive' and 'negative' are the same text"),
        ("margin-mse", {"label": [1.0, 0.0]}, "'label' is a JSON array, not a number"),
        ("margin-mse", {"label": 2.0}, "an earlier triplet of these texts has the margin 1, not 2"),
        ("tevatron", {}, "query id '1' is already used on line 1 of"),
        ("tevatron", {"query_id": None}, "'query_id' is a JSON null"),
        ("tevatron", {"negative_passages": None}, "'negative_passages' is missing or no array"),
        ("tevatron", {"query_id": "2", "negative_passages": ["b"]}, "'negative_passages' holds something that is not"),
        (
            "tevatron",
            {"query_id": "2", "negative_passages": [{"docid": "a", "text": "u"}]},
            "passage 'a' ('u') is there twice",
        ),
    ],
)
def test_a_bad_line_is_named_and_may_be_skipped(tmp_path, kind, change, reason):
    path = write_lines(tmp_path / "f.jsonl", GOOD[kind], GOOD[kind] | change)
    with pytest.raises(InputError) as error:
        read(kind, path)
    assert str(error.value).startswith(f"{path}:2: {reason}")
    skipping = BadLines(skip=True)
    assert len(read(kind, path, bad=skipping)) == 1
    assert skipping.count == 1


def test_labels_that_are_no_gains_have_to_be_called_scores(tmp_path):
    path = write_lines(tmp_path / "f", {"query": "q", "docs": ["a", "b"], "labels": [1, -0.5]})
    with pytest.raises(InputError, match=r"f:1: 'labels' holds -0\.5, which is no gain"):
        read("sentence-transformers", path)


def test_sentence_transformers_columns_are_told_by_their_order_and_graded_labels_are_gains(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", {"question": "q", "labels": [3, 0], "answer": ["a", "b"]})
    (labels,) = read("sentence-transformers", path)
    assert [x[1:] for x in shown(labels)] == [("a", 3.0, 3.0), ("b", 0.0, 0.0)]


def test_parquet_columns_are_read_like_lines_and_a_bad_row_is_named(tmp_path):
    table = pa.table({"query": ["q", "r"], "docs": [["a", "b"], ["c"]], "scores": [[0.5, 1.0], [None]]})
    pq.write_table(table, tmp_path / "f.parquet")
    path = str(tmp_path / "f.parquet")
    skipping = BadLines(skip=True)
    (labels,) = read("sentence-transformers", path, bad=skipping)
    assert [x[1:] for x in shown(labels)] == [("a", None, 0.5), ("b", None, 1.0)]
    assert [str(b) for b in skipping.listed] == [f"{path}: row 1: 'scores[0]' is null"]


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"scores": [[Decimal("1.5")]]}, "'scores[0]' is a Decimal, not a number: write a number"),
        ({"query": [b"q"]}, "'query' is a bytes, not a string: write it as a string"),
        ({"docs": ["a"]}, "'docs' is a JSON string, not an array: write it as an array"),
    ],
)
def test_a_parquet_columns_type_that_json_has_not_is_told(tmp_path, columns, fault):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"query": ["q"], "docs": [["a"]], "scores": [[0.5]]} | columns), path)
    with pytest.raises(InputError) as caught:
        read("sentence-transformers", str(path))
    assert str(caught.value) == f"{path}: row 0: {fault}"


def test_margins_become_one_list_for_each_query_and_first_passage(tmp_path):
    """Margins 2 and −1 below `a`: it scores 0, and what it beats by 2 scores −2. Order in the file is of no account."""
    rows = [("q", "a", "b", 2.0), ("r", "a", "b", 1.0), ("q", "a", "c", -1.0), ("q", "d", "b", 3.0)]
    names = ("query", "positive", "negative", "label")
    path = write_lines(tmp_path / "f", *[dict(zip(names, row, strict=True)) for row in rows])
    found = {labels.candidate_list.query.query_id: shown(labels) for labels in read("margin-mse", path)}
    scores = {i: [(text, score) for _, text, _, score in entries] for i, entries in found.items()}
    assert scores == {
        text_id("q"): [("a", 0.0), ("b", -2.0), ("c", 1.0)],
        text_id("r"): [("a", 0.0), ("b", -1.0)],
        text_id("q") + "-2": [("d", 0.0), ("b", -3.0)],
    }


def test_any_number_of_passes_gathers_the_same_margins(tmp_path):
    triplets = [("q", "a", "b", 1.0), ("r", "a", "c", 2.0), ("q", "a", "d", -1.0), ("s", "e", "f", 0.5)]
    lines = [dict(zip(("query", "positive", "negative", "label"), t, strict=True)) for t in triplets]
    path = str(write_lines(tmp_path / "m.jsonl", *lines, {"query": "t"}))

    def gathered(bytes_per_pass: int) -> dict:
        bad = BadLines(skip=True)
        lists = read_margins(path, bad, TrainingLists(), bytes_per_pass=bytes_per_pass)
        found = {labels.candidate_list.query.text: shown(labels) for labels in lists}
        return found | {"bad": len(bad.listed)}

    whole = gathered(10_000)
    assert [entry[1] for entry in whole["q"]] == ["a", "b", "d"]
    assert (len(whole), whole["bad"]) == (4, 1)
    assert gathered(20) == whole


TRIPLES = ("q1\ta\tb", "q2\tc\td", "q1\ta\te", "q1\tf\tb", "q1\ta\tb")


def test_triples_of_texts_are_gathered_by_query(tmp_path):
    summary = ingest_triples([write_lines(tmp_path / "t.tsv", *TRIPLES)], out=str(tmp_path / "out"))
    found = {labels.candidate_list.query.text: shown(labels) for labels in stored(tmp_path / "out")}
    assert {q: [x[1:] for x in c] for q, c in found.items()} == {
        "q1": [("a", 1.0, 1.0), ("f", 1.0, 1.0), ("b", 0.0, 0.0), ("e", 0.0, 0.0)],
        "q2": [("c", 1.0, 1.0), ("d", 0.0, 0.0)],
    }
    assert (summary.rows, summary.candidates, summary.labelled_pairs) == (2, 6, 6)


@in_tmp_path
@given(st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1))
def test_any_number_of_passes_gathers_the_same_triples(tmp_path, lines):
    path = write_lines(tmp_path / "t.tsv", *["\t".join(line) for line in lines])
    whole = {t.query: t for t in read_triples([path], BadLines())}
    for bytes_per_pass in (1, 20):
        assert {t.query: t for t in read_triples([path], BadLines(), bytes_per_pass=bytes_per_pass)} == whole
    assert {(t.query, p) for t in whole.values() for p in t.positives} == {line[:2] for line in lines}


def test_the_depth_of_triples_is_that_of_their_lists(tmp_path):
    """Positives that come after the list is full go too."""
    lines = [f"q\tp{p}\tn{n}" for n, p in enumerate((1, 1, 2, 3))]
    summary = ingest_triples([write_lines(tmp_path / "t.tsv", *lines)], out=str(tmp_path / "out"), depth=2)
    assert (summary.rows, summary.candidates, summary.labelled_pairs) == (1, 2, 2)


def test_bad_triples_are_counted_once_whatever_the_passes(tmp_path):
    path = write_lines(tmp_path / "t.tsv", *TRIPLES, "q1\tb\tz", "q1 a b", "q2\t \td", "q3\tx\tx")
    with pytest.raises(InputError, match=r"t\.tsv:6: passage 'b' is a negative on line 1 of"):
        list(read_triples([path], BadLines()))
    for bytes_per_pass in (10, 10_000):
        bad = BadLines(skip=True)
        assert {t.query for t in read_triples([path], bad, bytes_per_pass=bytes_per_pass)} == {"q1", "q2"}
        places = sorted(str(line).removeprefix(path) for line in bad.listed)
        assert [p[:24] for p in places] == [
            ":6: passage 'b' is a neg",
            ":7: 1 columns, not 3",
            ":8: the positive is empt",
            ":9: passage 'x' is posit",
        ]


def test_triples_of_ids_are_joined_with_their_texts(tmp_path):
    triples = write_lines(tmp_path / "t.tsv", "1\t10\t11", "1\t10\t12", "9\t10\t11", "1\t10\t99")
    queries = write_lines(tmp_path / "q.tsv", "1\tone", "2\ttwo")
    corpus = write_lines(tmp_path / "c.tsv", "10\tten", "11\tT\televen", "12\ttwelve", "13\tunused")
    arguments = {"queries": queries, "corpus": corpus, "out": str(tmp_path / "out")}
    with pytest.raises(InputError, match=r"t\.tsv:4: doc id '99' is not in the collection"):
        ingest_triples([triples], **arguments)
    summary = ingest_triples([triples], **arguments, skip_bad_lines=True)
    (labels,) = stored(tmp_path / "out")
    assert labels.candidate_list.query == Query(query_id="1", text="one")
    assert shown(labels) == [("10", "ten", 1.0, 1.0), ("11", "eleven", 0.0, 0.0), ("12", "twelve", 0.0, 0.0)]
    assert [str(x).removeprefix(triples) for x in summary.bad_lines_listed] == [
        ":4: doc id '99' is not in the collection",
        f":3: query '9' is not in {queries}",
    ]
    with pytest.raises(ConfigError, match="give both or none"):
        ingest_triples([triples], queries=queries, out=str(tmp_path / "other"))


def test_texts_of_more_documents_than_fit_are_fetched_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr("rerank_ray.ingest_labels._DOCUMENTS_HELD", 2)
    triples = write_lines(tmp_path / "t.tsv", *[f"{q}\t{q}0\t{q}1" for q in range(1, 6)])
    queries = write_lines(tmp_path / "q.tsv", *[f"{q}\tquery {q}" for q in range(1, 6)])
    corpus = write_lines(tmp_path / "c.tsv", *[f"{q}{n}\ttext {q}{n}" for q in range(1, 6) for n in (0, 1)], "no tab")
    summary = ingest_triples([triples], queries, corpus, out=str(tmp_path / "out"), skip_bad_lines=True)
    assert [[c.text for c in labels.candidate_list.candidates] for labels in stored(tmp_path / "out")] == [
        [f"text {q}0", f"text {q}1"] for q in range(1, 6)
    ]
    assert summary.bad_lines == 1


def test_rank_distillm_labels_rank_r_of_n_with_n_minus_r(tmp_path):
    """The run's scores contradict its ranks: only the order counts. Document d is missing from the collection."""
    run = write_lines(tmp_path / "run", "1 Q0 b 2 9 gpt", "1 Q0 a 1 0 gpt", "1 Q0 c 3 5 gpt", "2 Q0 d 1 1 gpt")
    arguments = {
        "queries": write_lines(tmp_path / "q.tsv", "1\tone", "2\ttwo"),
        "corpus": write_lines(tmp_path / "c.tsv", "a\tA", "b\tB", "c\tC"),
        "qrels": write_lines(tmp_path / "qrels", "1 0 b 2"),
        "out": str(tmp_path / "out"),
    }
    with pytest.raises(InputError, match=r"run:4: doc id 'd' is not in the collection"):
        ingest_rank_distillm(run, **arguments)
    summary = ingest_rank_distillm(run, **arguments, skip_bad_lines=True)
    (labels,) = stored(tmp_path / "out")
    assert shown(labels) == [("a", "A", None, 2.0), ("b", "B", 2.0, 1.0), ("c", "C", None, 0.0)]
    assert labels.teacher == "imported:run:ranks"
    assert {c.score for c in labels.candidate_list.candidates} == {None}
    assert summary.queries_without_candidates == ("2",)


# Into the project


def test_an_ingest_is_a_training_set_and_can_be_replaced(tmp_path):
    """Two lists of four are held out by their ids' hash; the folder is an ingest's, so it may be overwritten."""
    lines = [{"query": f"q{i}", "pos": ["a"], "neg": ["b", "c"]} for i in range(4)]
    arguments = {"out": str(tmp_path / "out"), "depth": 2, "instruction": "Find it"}
    ingest_lists("flagembedding", [write_lines(tmp_path / "f", *lines)], **arguments)
    labels = LabelSet.open([str(tmp_path / "out")], 0.5, seed=0)
    assert len(labels.train) + len(labels.validation) == 4
    assert (labels.unlabelled, labels.tied) == (0, 0)
    assert {len(x.candidate_list) for x in stored(tmp_path / "out")} == {2}
    assert {x.candidate_list.query.instruction for x in stored(tmp_path / "out")} == {"Find it"}
    with pytest.raises(InputError, match="--overwrite"):
        ingest_lists("flagembedding", [str(tmp_path / "f")], **arguments)
    ingest_lists("tevatron", [write_lines(tmp_path / "t", GOOD["tevatron"])], **arguments, overwrite=True)
    assert [x.candidate_list.query.query_id for x in stored(tmp_path / "out")] == ["1"]


def test_triples_of_ids_are_not_taken_for_texts(tmp_path):
    """MS MARCO's qidpidtriples are all digits: a student would learn to rank "7" for "1"."""
    path = tmp_path / "triples.tsv"
    path.write_text("1\t7\t9\n")
    with pytest.raises(InputError, match=r"triples\.tsv:1: all columns are numbers: these are ids: give --queries"):
        list(read_triples([str(path)], BadLines(skip=False)))
    assert len(list(read_triples([str(path)], BadLines(skip=False), ids=True))) == 1
