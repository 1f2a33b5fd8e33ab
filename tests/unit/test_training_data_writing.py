"""Labels written as training data of other projects, and the same after both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.rows import label_row, write_labels
from fixtures.training_data import in_tmp_path, read, shown, stored, write_lines
from hypothesis import assume, given
from hypothesis import strategies as st

from rerank_ray import cli
from rerank_ray.convert import convert
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.ingest_labels import ingest_lists, ingest_rank_distillm, ingest_triples
from rerank_ray.parquet import write_candidates
from rerank_ray.records import Candidate, CandidateList, Labels, Query


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
    with pytest.raises(InputError, match=r"\(3 rows without a positive, 1 rows with an error.*\): --min-gain says"):
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


def no_teacher_is_made_up(source: str, out: str) -> None:
    """Forms and options that need a teacher's scores are refused."""
    for form, options in (
        ("margin-mse", {}),
        ("rank-distillm", {}),
        ("flagembedding", {"positives": 1}),
        ("flagembedding", {"target": "teacher"}),
    ):
        with pytest.raises(ConfigError, match="holds no teacher's scores"):
            convert(source, out, form, **options)


def test_candidates_have_gains_but_no_teacher_and_a_file_is_kept(tmp_path):
    source = str(tmp_path / "candidates")
    write_candidates([EXAMPLE.candidate_list], source)
    out = tmp_path / "out.jsonl"
    assert cli.main(["convert", source, "--format", "flagembedding", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["neg"] == ["A", "D"]
    assert "pos_scores" not in json.loads(out.read_text())
    no_teacher_is_made_up(source, str(tmp_path / "other"))
    with pytest.raises(InputError, match="is there already"):
        convert(source, str(out), "triples")
    with pytest.raises(InputError, match=r"holds no \.parquet file"):
        convert(str(tmp_path / "nowhere"), str(tmp_path / "other"), "triples")


def test_labels_that_repeat_the_gains_have_no_teacher(tmp_path):
    """An ingest of a file without teacher scores makes gains the labels: written again, it is the file that it was."""
    line = {"query_id": "q", "query": "query", "pos": ["a"], "neg": ["b", "c"]}
    line |= {"pos_id": ["1"], "neg_id": ["2", "3"]}
    ingest_lists("flagembedding", [write_lines(tmp_path / "in.jsonl", line)], out=str(tmp_path / "gains"))
    source, out = str(tmp_path / "gains"), str(tmp_path / "out.jsonl")
    assert convert(source, out, "flagembedding").lists == 1
    assert [json.loads(x) for x in Path(out).read_text().splitlines()] == [line]
    convert(source, out, "sentence-transformers", overwrite=True)
    assert json.loads(Path(out).read_text()) == {"query": "query", "docs": ["a", "b", "c"], "labels": [1.0, 0.0, 0.0]}
    no_teacher_is_made_up(source, str(tmp_path / "other"))


def test_lists_with_and_without_a_teacher_are_no_one_file(tmp_path):
    gains = replace(EXAMPLE, candidate_list=replace(EXAMPLE.candidate_list, query=Query(query_id="q2", text="other")))
    source = written(tmp_path / "labels", EXAMPLE, replace(gains, teacher="gains:train.jsonl"))
    with pytest.raises(InputError, match="some lists have a teacher's scores, and others gains alone"):
        convert(source, str(tmp_path / "out"), "triples")


def test_a_failed_rank_distillm_leaves_what_was_there(tmp_path):
    """Without a list nothing is written; the folder that was made on the way keeps no second attempt out."""
    failed = write_labels(tmp_path / "failed", [label_row(EXAMPLE.candidate_list, None, error="boom")])
    out = tmp_path / "out"
    with pytest.raises(InputError, match=rf"{failed}: no list can be written \(1 rows with an error"):
        convert(failed, str(out), "rank-distillm")
    convert(written(tmp_path / "labels", EXAMPLE), str(out), "rank-distillm")
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(files) == ["corpus.jsonl", "queries.jsonl", "run.trec"]
    with pytest.raises(InputError, match="no list can be written"):
        convert(failed, str(out), "rank-distillm", overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    with pytest.raises(InputError, match="is there already"):
        convert(str(tmp_path / "labels"), str(out), "rank-distillm")


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
    # A line of nothing but numbers would be taken for ids.
    assume(not any(x.candidate_list.query.text.strip().isdecimal() for x in lists))
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


@pytest.mark.parametrize("form", ["flagembedding", "sentence-transformers", "margin-mse", "tevatron", "triples"])
def test_a_text_that_a_list_has_twice_is_written_once(tmp_path, form: str, capsys):
    """p is judged and its copy is not; of the two unjudged n the second has the higher score. A title is text, too."""
    twice = labelled(
        "q",
        "query",
        [
            candidate("copy", "p text", None),
            candidate("p", "text", 1.0, title="p"),
            candidate("n", "n", None),
            candidate("higher", "n", None),
        ],
        [5.0, 4.0, 1.0, 2.0],
    )
    (back,) = there_and_back(tmp_path, [twice], form)
    titled = "text" if form == "tevatron" else "p text"
    assert {c.text for c in back.candidate_list.candidates} == {titled, "n"}
    assert len(back.candidate_list) == 2
    if form != "tevatron" and form != "triples":
        scores = dict(zip((c.text for c in back.candidate_list.candidates), back.scores, strict=True))
        assert scores["p text"] - scores["n"] == 2.0
    arguments = ["convert", str(tmp_path / "labels"), "--format", form, "--out", str(tmp_path / "file"), "--overwrite"]
    assert cli.main(arguments) == 0
    assert "2 candidates left out: another one of their list has the same text" in capsys.readouterr().out


def test_triples_know_no_texts_that_differ_in_blanks_alone(tmp_path):
    texts = [candidate("p", "a\tb", 1.0), candidate("copy", "a  b", 0.0), candidate("n", "c", 0.0)]
    source = written(tmp_path / "labels", labelled("q", "query", texts, [1.0, 2.0, 0.0]))
    assert convert(source, str(tmp_path / "out"), "triples").repeated == 1
    assert (tmp_path / "out").read_text() == "query\ta b\tc\n"
    assert convert(source, str(tmp_path / "tevatron"), "tevatron").repeated == 0


def test_triples_have_no_empty_columns(tmp_path, capsys):
    """Their reader, as others', refuses one. A list may be left without a negative."""
    texts = [candidate("p", "a", 1.0), candidate("none", " ", 0.0), candidate("n", "c", 0.0)]
    rows = [labelled("q", "query", texts, [1.0, 2.0, 0.0]), labelled("r", "query 2", texts[:2], [1.0, 2.0])]
    source = written(tmp_path / "labels", *rows)
    assert cli.main(["convert", source, "--format", "triples", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == "query\ta\tc\n"
    told = capsys.readouterr().out
    assert "2 candidates left out: they have no text" in told
    assert "1 rows left out: without a negative" in told
    assert convert(source, str(tmp_path / "tevatron"), "tevatron").empty == 0


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


def test_lists_without_a_known_gain_are_no_lists_of_zeros(tmp_path):
    judged = labelled("q1", "a", [candidate("p", "c", 1.0), candidate("n", "e", None)], [1.0, 0.0])
    unknown = labelled("q2", "b", [candidate("p", "c", None), candidate("n", "e", None)], [1.0, 0.0])
    folder = written(tmp_path / "labels", judged, unknown)
    done = convert(folder, str(tmp_path / "out"), "sentence-transformers", target="gains")
    assert (done.lists, dict(done.skipped)) == (1, {"without a known gain": 1})
    assert convert(folder, str(tmp_path / "scores"), "sentence-transformers", target="teacher").lists == 2
