"""Training data of other projects: read to labels, written from labels, and the same after both."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.rows import label_row, write_labels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rerank_ray import cli
from rerank_ray.convert import convert
from rerank_ray.distill.labels import LabelSet
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.training_data import TrainingLists, text_id
from rerank_ray.formats.triples import read_triples
from rerank_ray.ingest_labels import LIST_READERS, ingest_lists, ingest_rank_distillm, ingest_triples
from rerank_ray.records import Candidate, CandidateList, Labels, Query
from rerank_ray.schema import LABELS, labels_from_row, read_rows, write_candidates

in_tmp_path = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_lines(path: Path, *lines: str | dict) -> str:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return str(path)


def read(kind: str, *paths: str, bad: BadLines | None = None) -> list[Labels]:
    lists = TrainingLists()
    return [labels for path in paths for labels in LIST_READERS[kind](path, bad or BadLines(), lists)]


def stored(folder: Path | str) -> list[Labels]:
    return [labels_from_row(row) for row in read_rows(str(folder), LABELS.names)]


def shown(labels: Labels) -> list[tuple]:
    """(doc id, text, gain, score) of each candidate."""
    return [
        (c.doc_id, c.text, c.label, s) for c, s in zip(labels.candidate_list.candidates, labels.scores, strict=True)
    ]


# Reading


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


# Writing, and reading back


def candidate(doc_id: str, text: str, label: float | None = None, title: str | None = None) -> Candidate:
    return Candidate(doc_id=doc_id, text=text, label=label, title=title)


def written(folder: Path, *lists: Labels) -> str:
    return write_labels(folder, [label_row(x.candidate_list, x.scores, teacher=x.teacher) for x in lists])


def labelled(query_id: str, text: str, candidates: Sequence[Candidate], scores: Sequence[float]) -> Labels:
    query = Query(query_id=query_id, text=text)
    return Labels(
        candidate_list=CandidateList(query=query, candidates=tuple(candidates)), teacher="t", scores=tuple(scores)
    )


EXAMPLE = labelled(
    "q1",
    "query",
    [candidate("a", "A", None), candidate("b", "B", 2.0, "T"), candidate("c", "C", 1.0), candidate("d", "D", 0.0)],
    [0.5, 3.0, -1.0, math.nan],
)


def test_what_each_format_holds_of_one_list(tmp_path):
    """b (gain 2, title T) and c (gain 1) are positives, a is not, and d has no score, so it is nowhere."""
    source = written(tmp_path / "labels", EXAMPLE)

    def lines(form: str, **options) -> list:
        out = tmp_path / f"out-{form}"
        done = convert(source, str(out), form, overwrite=True, **options)
        assert (done.lists, done.candidates, done.unscored) == (1, 3, 1)
        return out.read_text().splitlines()

    assert json.loads(*lines("flagembedding")) == {
        "query_id": "q1",
        "query": "query",
        "pos": ["T B", "C"],
        "neg": ["A"],
        "pos_scores": [3.0, -1.0],
        "neg_scores": [0.5],
        "pos_id": ["b", "c"],
        "neg_id": ["a"],
    }
    assert json.loads(*lines("flagembedding", min_gain=2.0, target="gains")) == {
        "query_id": "q1",
        "query": "query",
        "pos": ["T B"],
        "neg": ["A", "C"],
        "pos_id": ["b"],
        "neg_id": ["a", "c"],
    }
    assert json.loads(*lines("sentence-transformers")) == {
        "query": "query",
        "docs": ["T B", "A", "C"],
        "scores": [3.0, 0.5, -1.0],
    }
    assert json.loads(*lines("sentence-transformers", target="gains")) == {
        "query": "query",
        "docs": ["T B", "C", "A"],
        "labels": [2.0, 1.0, 0.0],
    }
    assert [json.loads(line) for line in lines("margin-mse", positives=1)] == [
        {"query": "query", "positive": "T B", "negative": "A", "label": 2.5},
        {"query": "query", "positive": "T B", "negative": "C", "label": 4.0},
    ]
    assert json.loads(*lines("tevatron", positives=2)) == {
        "query_id": "q1",
        "query": "query",
        "positive_passages": [{"docid": "a", "title": "", "text": "A"}, {"docid": "b", "title": "T", "text": "B"}],
        "negative_passages": [{"docid": "c", "title": "", "text": "C"}],
    }
    assert lines("triples") == ["query\tT B\tA", "query\tC\tA"]


def test_rows_that_hold_no_training_list_are_counted(tmp_path):
    rows = [
        label_row(EXAMPLE.candidate_list, EXAMPLE.scores),
        label_row(labelled("e", "e", [candidate("a", "A")], [1.0]).candidate_list, None, error="boom"),
        label_row(labelled("n", "n", [candidate("a", "A")], [math.nan]).candidate_list, [math.nan]),
        label_row(labelled("0", "0", [candidate("a", "A")], [1.0]).candidate_list, [1.0]),
        label_row(labelled("1", "1", [candidate("a", "A", 1.0)], [1.0]).candidate_list, [1.0]),
    ]
    source = write_labels(tmp_path / "labels", rows)
    done = convert(source, str(tmp_path / "out.jsonl.gz"), "flagembedding")
    assert (done.lists, dict(done.skipped)) == (
        1,
        {
            "with an error instead of labels": 1,
            "without a score": 1,
            "without a positive": 1,
            "without a negative": 1,
        },
    )
    assert (tmp_path / "out.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert [x.candidate_list.query.query_id for x in read("flagembedding", str(tmp_path / "out.jsonl.gz"))] == ["q1"]
    with pytest.raises(InputError, match=r"no list can be written \(3 rows without a positive, 1 rows with an error"):
        convert(source, str(tmp_path / "none.jsonl"), "tevatron", min_gain=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels", "out.jsonl.gz"]


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("sentence-transformers", {"positives": 1}, "positives does nothing for sentence-transformers"),
        ("rank-distillm", {"min_gain": 1.0}, "min_gain does nothing for rank-distillm"),
        ("rank-distillm", {"target": "gains"}, "target gains does nothing for rank-distillm, which holds teacher"),
        ("triples", {"target": "teacher"}, "target teacher does nothing for triples, which holds neither"),
        ("flagembedding", {"positives": 1, "min_gain": 1.0}, "give one"),
        ("flagembedding", {"positives": 0}, "positives=0"),
        ("tfrecord", {}, "format 'tfrecord' is unknown; known: flagembedding"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, form, options, message):
    source = written(tmp_path / "labels", EXAMPLE)
    with pytest.raises(ConfigError, match=message):
        convert(source, str(tmp_path / "out"), form, **options)


def test_candidates_have_gains_but_no_teacher_and_a_file_is_kept(tmp_path):
    source = str(tmp_path / "candidates")
    write_candidates([EXAMPLE.candidate_list], source)
    out = tmp_path / "out.jsonl"
    assert cli.main(["convert", source, "--format", "flagembedding", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["neg"] == ["A", "D"]
    assert "pos_scores" not in json.loads(out.read_text())
    for form, options in (
        ("margin-mse", {}),
        ("rank-distillm", {}),
        ("flagembedding", {"positives": 1}),
        ("flagembedding", {"target": "teacher"}),
    ):
        with pytest.raises(ConfigError, match="holds no teacher's scores"):
            convert(source, str(tmp_path / "other"), form, **options)
    with pytest.raises(InputError, match="is there already"):
        convert(source, str(out), "triples")
    with pytest.raises(InputError, match=r"holds no \.parquet file"):
        convert(str(tmp_path / "nowhere"), str(tmp_path / "other"), "triples")


def test_one_doc_id_with_two_texts_is_no_collection(tmp_path):
    other = labelled("q2", "other", [candidate("a", "another A")], [1.0])
    with pytest.raises(InputError, match="'a' has another text than in an earlier list"):
        convert(written(tmp_path / "labels", EXAMPLE, other), str(tmp_path / "out"), "rank-distillm")
    assert not list((tmp_path / "out").glob("*.jsonl"))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
float32 = st.floats(width=32, min_value=-(2.0**20), max_value=2.0**20, allow_nan=False)


@st.composite
def label_lists(draw, text: st.SearchStrategy[str] = texts) -> list[Labels]:
    """Lists of queries with different texts; each has a positive and a negative, and passages with different texts."""
    lists = []
    for number, query in enumerate(draw(st.lists(words, unique=True, min_size=1, max_size=3))):
        passages = draw(st.lists(text, unique=True, min_size=2, max_size=5))
        gains = [1.0, 0.0, *draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=8, max_size=8))]
        candidates = [candidate(f"d{number}-{i}", t, gains[i]) for i, t in enumerate(passages)]
        scores = draw(st.lists(float32, min_size=len(passages), max_size=len(passages)))
        lists.append(labelled(f"q{number}", query, candidates, scores))
    return lists


def there_and_back(tmp_path: Path, lists: Sequence[Labels], form: str, **options) -> list[Labels]:
    """Labels → a file of the format → an ingest."""
    source = tmp_path / "labels"
    for path in source.glob("*"):
        path.unlink()
    out = tmp_path / ("folder" if form == "rank-distillm" else "file")
    convert(written(source, *lists), str(out), form, overwrite=True, **options)
    ingested = {"out": str(tmp_path / "ingested"), "overwrite": True}
    if form == "rank-distillm":
        ingest_rank_distillm(str(out / "run.trec"), str(out / "queries.jsonl"), str(out / "corpus.jsonl"), **ingested)
    elif form == "triples":
        ingest_triples([str(out)], **ingested)
    else:
        ingest_lists(form, [str(out)], **ingested)
    return stored(tmp_path / "ingested")


def by_role(labels: Labels) -> list[tuple]:
    """Positives before negatives, each in the list's order."""
    return sorted(shown(labels), key=lambda entry: -entry[2])


@in_tmp_path
@given(label_lists())
def test_flagembedding_keeps_everything_but_titles(tmp_path, lists):
    back = there_and_back(tmp_path, lists, "flagembedding")
    assert [x.candidate_list.query for x in back] == [x.candidate_list.query for x in lists]
    assert [shown(x) for x in back] == [by_role(x) for x in lists]


@in_tmp_path
@given(label_lists())
def test_tevatron_keeps_ids_texts_and_gains(tmp_path, lists):
    back = there_and_back(tmp_path, lists, "tevatron")
    expected = [[(*entry[:3], entry[2]) for entry in by_role(x)] for x in lists]
    assert [x.candidate_list.query for x in back] == [x.candidate_list.query for x in lists]
    assert [shown(x) for x in back] == expected


@in_tmp_path
@given(label_lists(), st.sampled_from(["teacher", "gains"]))
def test_labelled_lists_keep_texts_and_numbers(tmp_path, lists, target):
    back = there_and_back(tmp_path, lists, "sentence-transformers", target=target)
    for x, original in zip(back, lists, strict=True):
        assert x.candidate_list.query.text == original.candidate_list.query.text
        number = 3 if target == "teacher" else 2
        assert {t: s for _, t, _, s in shown(x)} == {entry[1]: entry[number] for entry in shown(original)}


@in_tmp_path
@given(label_lists())
def test_margins_keep_every_difference_between_a_positive_and_a_negative(tmp_path, lists):
    """A float32 holds the difference of two float32 numbers to 2^-24 of it."""
    back = there_and_back(tmp_path, lists, "margin-mse")
    found = {
        (x.candidate_list.query.text, x.candidate_list.candidates[0].text, c.text): x.scores[0] - s
        for x in back
        for c, s in list(zip(x.candidate_list.candidates, x.scores, strict=True))[1:]
    }
    expected = {
        (x.candidate_list.query.text, p[1], n[1]): p[3] - n[3]
        for x in lists
        for p in shown(x)
        for n in shown(x)
        if p[2] > n[2]
    }
    assert found.keys() == expected.keys()
    for key, margin in expected.items():
        assert found[key] == pytest.approx(margin, rel=2**-23, abs=0)


@in_tmp_path
@given(label_lists(words))
def test_triples_keep_texts_and_roles(tmp_path, lists):
    back = there_and_back(tmp_path, lists, "triples")
    found = {x.candidate_list.query.text: [entry[1:3] for entry in shown(x)] for x in back}
    assert found == {x.candidate_list.query.text: [entry[1:3] for entry in by_role(x)] for x in lists}


@in_tmp_path
@given(label_lists())
def test_rank_distillm_keeps_ids_texts_and_the_teachers_order(tmp_path, lists):
    back = there_and_back(tmp_path, lists, "rank-distillm")
    for x, original in zip(back, lists, strict=True):
        ordered = sorted(shown(original), key=lambda entry: -entry[3])
        expected = [(i, t, None, float(len(ordered) - r)) for r, (i, t, *_) in enumerate(ordered, start=1)]
        assert x.candidate_list.query == original.candidate_list.query
        assert shown(x) == expected


def test_triples_have_no_room_for_tabs_and_line_ends(tmp_path):
    tabbed = labelled("q", "a\tb", [candidate("p", "c\n d", 1.0), candidate("n", "e\r\n\tf", 0.0)], [1.0, 0.0])
    convert(written(tmp_path / "labels", tabbed), str(tmp_path / "out"), "triples")
    assert (tmp_path / "out").read_text() == "a b\tc d\te f\n"


# The real readers


def test_sentence_transformers_losses_take_the_written_columns(tmp_path, tiny_cross_encoder):
    """Its collator finds the labels and hands the losses what they expect: two lists of 3, and two margins."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
    from sentence_transformers.cross_encoder.losses import MarginMSELoss, RankNetLoss

    other = replace(EXAMPLE, candidate_list=replace(EXAMPLE.candidate_list, query=Query(query_id="q2", text="other")))
    source = written(tmp_path / "labels", EXAMPLE, other)
    model = CrossEncoder(str(tiny_cross_encoder))
    for form, loss_class in (("sentence-transformers", RankNetLoss), ("margin-mse", MarginMSELoss)):
        out = tmp_path / form
        convert(source, str(out), form)
        features = [json.loads(line) for line in out.read_text().splitlines()]
        batch = CrossEncoderDataCollator(preprocess_fn=model.preprocess)(features)
        labels = batch.pop("label")
        loss = loss_class(model)(list(batch.values()), labels)
        assert 0 < loss.item() < math.inf
