"""Synthetic queries: which passages are drawn, what becomes of the model's text, and which queries find back."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from fixtures.rows import make_list
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rerank_ray import config
from rerank_ray.errors import ConfigError, InputError, RunError
from rerank_ray.execution import synthesis_job
from rerank_ray.models.protocol import Answer, Failure
from rerank_ray.parquet import write_candidates
from rerank_ray.prompt import show
from rerank_ray.prompts.parse.words import parse_query
from rerank_ray.prompts.render import Template
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.write_query import QueryWriter, passage_of
from rerank_ray.records import Candidate, CandidateList, DefectKind, Query, Usage
from rerank_ray.schema import PASSAGES, WRITTEN_QUERIES
from rerank_ray.settings.synthesize import QueryWriterSettings, SynthesizeSettings
from rerank_ray.stages import WriteStage
from rerank_ray.synthesize import (
    WrittenQuery,
    draw_passages,
    finds_back,
    longest_copied_run,
    retrieve,
    usable_queries,
)

DOCUMENTS = {
    "d1": "cats sleep all day",
    "d2": "dogs chase cats around the yard",
    "d3": "bread rises when yeast eats sugar",
    "d4": "",
    "d5": "cats and dogs",
}


def write_corpus(path: Path, documents: dict[str, str]) -> str:
    path.write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in documents.items()))
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus.jsonl", DOCUMENTS)


def settings_of(corpus: str, **content) -> SynthesizeSettings:
    writer = {"model": {"kind": "fake", "writes": "queries"}} | content.pop("writer", {})
    return config.validate(SynthesizeSettings, {"corpus": corpus, "writer": writer, **content}, "test")


# Passages


def drawn(corpus: str, **content) -> list[str]:
    return [row["doc_id"] for row in draw_passages(settings_of(corpus, **content))]


def test_the_draw_depends_on_ids_and_seed_alone_and_takes_no_empty_passage(tmp_path, corpus):
    """Any order of the collection gives the same passages; d0, added to it, can only push the last one out."""
    everything = drawn(corpus, passages=10)
    assert sorted(everything) == ["d1", "d2", "d3", "d5"]
    backwards = write_corpus(tmp_path / "backwards", dict(reversed(DOCUMENTS.items())))
    assert drawn(backwards, passages=2) == everything[:2]
    grown = drawn(write_corpus(tmp_path / "grown", {"d0": "new", **DOCUMENTS}), passages=4)
    assert [d for d in grown if d != "d0"] == everything[: len(grown) - ("d0" in grown)]
    assert len({tuple(drawn(corpus, seed=seed)) for seed in range(10)}) > 1
    with pytest.raises(InputError, match="holds no passage with text"):
        drawn(write_corpus(tmp_path / "empty", {"d": " "}))


def test_documents_of_candidate_lists_are_a_collection_each_once_and_with_one_text(tmp_path):
    """Drawn and found as those of a file, in whatever order and however often lists have them."""
    documents = {doc_id: text for doc_id, text in DOCUMENTS.items() if text}
    file, folder = write_corpus(tmp_path / "corpus.jsonl", documents), str(tmp_path / "lists")

    def listed(query_id: str, texts: dict[str, str]) -> CandidateList:
        candidates = tuple(Candidate(doc_id=d, text=t, score=2.0, label=1.0) for d, t in texts.items())
        return CandidateList(query=Query(query_id=query_id, text="query"), candidates=candidates)

    lists = [listed("q1", documents), listed("q2", dict(reversed(documents.items())))]
    write_candidates(lists, folder)
    assert list(draw_passages(settings_of(folder))) == list(draw_passages(settings_of(file)))
    queries = [WrittenQuery(query_id="s", text="cats", doc_id="d1")]
    parquet = f"{folder}/part-00000.parquet"
    of_lists, of_part, of_file = (list(retrieve(queries, settings_of(c), Counter())) for c in (folder, parquet, file))
    assert of_lists == of_part == of_file
    write_candidates([*lists, listed("q3", {"d1": "another text"})], folder)
    with pytest.raises(InputError, match="'q3': document 'd1' has another text than in an earlier list"):
        drawn(folder)


def test_ids_name_the_passage_and_differ_by_number_writer_and_seed(corpus):
    def ids(**content) -> list[str]:
        return [row["query_id"] for row in draw_passages(settings_of(corpus, queries_per_passage=3, **content))]

    runs = [ids(), ids(seed=1), ids(writer={"temperature": 0.5})]
    assert len({i for run in runs for i in run}) == 3 * 4 * 3
    assert {i.rsplit("-", 1)[0] for i in runs[0]} == {"syn-d1", "syn-d2", "syn-d3", "syn-d5"}
    assert ids() == runs[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"queries_per_passage": 2, "writer": {"temperature": 0}}, "at temperature 0 all queries of a passage are"),
        ({"bm25_top": 11, "depth": 10}, r"bm25_top \(11\) is above depth \(10\)"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        settings_of("corpus", **content)


# The model's text


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("why do cats sleep", "why do cats sleep"),
        ('\n "Why do cats sleep?" \n\nThis question asks …', "Why do cats sleep?"),
        ("**Query:** cat sleep", "cat sleep"),
        ("1. Search query: cat sleep", "cat sleep"),
        ("- Question 1: cat sleep", "cat sleep"),
        ("<think>cats, then.</think>\nwhy cats", "why cats"),
        ("2001 a space odyssey", "2001 a space odyssey"),
        ("question time on the bbc", "question time on the bbc"),
        ("what to do when i can't sleep", "what to do when i can't sleep"),
        ("why is it impossible to divide by zero", "why is it impossible to divide by zero"),
        ("Sure! Here is a query:\nwhat is x", "what is x"),
        ("为什么猫睡觉？", "为什么猫睡觉？"),
    ],
)
def test_a_query_is_read_off_the_texts_first_line(text, query):
    assert parse_query(text).query == query


@pytest.mark.parametrize(
    ("text", "cut_off", "kind"),
    [
        ("", False, DefectKind.EMPTY),
        ("<think>what could", True, DefectKind.EMPTY),
        ("I'm sorry, but I can't help with that.", False, DefectKind.REFUSAL),
        ("Unfortunately, I cannot write a query for this passage.", False, DefectKind.REFUSAL),
        ("Based on the text, it is not possible to write a question.", False, DefectKind.REFUSAL),
        ("Query:", False, DefectKind.UNPARSED),
        ("???", False, DefectKind.UNPARSED),
        ("why do cats sle", True, DefectKind.CUT_OFF),
        ("why do cats sleep\n ", True, DefectKind.CUT_OFF),
    ],
)
def test_a_text_without_a_query_says_why(text, cut_off, kind):
    parsed = parse_query(text, cut_off=cut_off)
    assert parsed.query is None
    assert [d.kind for d in parsed.defects] == [kind]


def test_what_is_cut_off_after_the_first_line_leaves_the_query_whole():
    assert parse_query("why do cats sleep\nBecause they", cut_off=True).query == "why do cats sleep"


@given(st.text(), st.booleans())
def test_any_text_gives_a_query_or_a_defect(text, cut_off):
    parsed = parse_query(text, cut_off=cut_off)
    assert (parsed.query is None) == bool(parsed.defects)
    assert parsed.query is None or (parsed.query.strip() and "\n" not in parsed.query)


class Scripted:
    """A backend that gives the next result for each call, and remembers the calls."""

    name = "scripted"

    def __init__(self, *results) -> None:
        self.results, self.calls = list(results), []

    def run(self, calls):
        self.calls += calls
        return [self.results.pop(0) for _ in calls]


def test_a_query_is_the_rows_and_an_answer_without_one_is_its_error():
    usage = Usage(calls=1, output_tokens=5)
    backend = Scripted(
        Answer(value="why cats\n", usage=usage, log_probability=-2.5),
        Answer(value="As an AI, I", usage=usage),
        Failure(reason="no server"),
        Answer(value="why c", usage=usage, cut_off=True),
    )
    writer = QueryWriter(QueryWriterSettings(model={"kind": "fake"}), backend)
    rows = [{"query_id": f"syn-{n}", "doc_id": "d", "title": "T", "text": f"passage {n}"} for n in range(4)]
    outcomes = scheduler.run(writer, backend, [passage_of(row) for row in rows])
    assert outcomes[0].scores.rationales == ("why cats",)
    assert outcomes[0].scores.scores == (-2.5,)
    assert [o.error for o in outcomes[1:]] == [
        "the model wrote no query: refusal: 'As an AI, I'",
        "the model gave no answer: no server",
        "the model wrote no query: cut_off: 'why c'",
    ]
    assert [[d.kind for d in o.defects] for o in outcomes] == [
        [],
        [DefectKind.REFUSAL],
        [DefectKind.UNSCORED],
        [DefectKind.CUT_OFF],
    ]
    assert backend.calls[0].prompt.passages == ("T passage 0",)
    assert len({call.seed for call in backend.calls}) == 4
    assert max(call.seed for call in backend.calls) < 2**31
    assert backend.calls[0].stop == ()


def test_a_prompt_that_is_no_chat_ends_with_the_line():
    backend = Scripted(Answer(value=" why cats", usage=Usage()))
    writer = QueryWriter(QueryWriterSettings(model={"kind": "fake"}, prompt="write_query_few_shot"), backend)
    scheduler.run(writer, backend, [make_list("q", 1)])
    assert backend.calls[0].stop == ("\n",)
    assert not backend.calls[0].prompt.chat


def test_the_stage_gives_one_row_a_passage_whatever_fails(corpus):
    """The passage on bread fails; the others' queries are words of theirs, and another number gives other words."""
    settings = settings_of(
        corpus, queries_per_passage=2, writer={"model": {"kind": "fake", "writes": "queries", "fail_on": "bread"}}
    )
    passages = pa.Table.from_pylist(list(draw_passages(settings)), schema=PASSAGES)
    stage = WriteStage(settings.writer)
    table = stage(passages)
    assert table.schema.equals(WRITTEN_QUERIES)
    rows = table.to_pylist()
    assert table.select(PASSAGES.names).to_pylist() == passages.to_pylist()
    for row in rows:
        failed = row["doc_id"] == "d3"
        assert (row["error"] is not None, row["query"] is None, row["scores"] is None) == (failed,) * 3
        assert failed or set(row["query"].split()) <= set(row["text"].split())
    assert len({row["query"] for row in rows if row["doc_id"] == "d2"}) == 2
    assert [row["error"] for row in stage.failed(passages, "boom").to_pylist()] == ["boom"] * 8


def test_a_template_that_shows_the_query_is_refused_and_the_prompt_can_be_shown(tmp_path):
    with pytest.raises(ValueError, match="the query is what the model writes"):
        Template(method="write_query", about="x", text="{passage} {query}")
    write_candidates([make_list("q", 2)], str(tmp_path / "candidates"))
    shown = show("write_query", str(tmp_path / "candidates"))
    assert shown.text.startswith("Passage: alpha document 0 of q\n\nWrite one question")


# Queries


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("Why do cats sleep, all day?", 4),
        ("do cats chase the dogs around the yard", 3),
        ("cats sleep; dogs chase cats", 3),
        ("catsleep", 0),
        ("", 0),
    ],
)
def test_the_longest_copied_run_is_counted_in_words(query, expected):
    assert longest_copied_run(query, "Cats sleep all day; dogs chase cats around the yard.") == expected


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_the_longest_copied_run_equals_all_runs_tried(query, passage):
    runs = [query[i:j] for i in range(len(query)) for j in range(i + 1, len(query) + 1)]
    spots = [passage[i:j] for i in range(len(passage)) for j in range(i + 1, len(passage) + 1)]
    expected = max((len(run) for run in runs if run in spots), default=0)
    assert longest_copied_run(" ".join(query), " ".join(passage)) == expected


def written(
    query_id: str, query: str | None, text: str = "x", title: str | None = None, error: str | None = None
) -> dict:
    passage = {"doc_id": f"d-{query_id}", "title": title, "text": text}
    return {"query_id": query_id, "query": query, **passage, "error": error}


def test_of_equal_queries_the_first_by_id_stays_and_the_rest_is_counted():
    rows = [
        written("3", "Why cats?"),
        written("2", "why  CATS"),
        written("4", None, error="boom"),
        written("5", "one two three four", "zero one two three"),
        written("6", "Of titles too", "zero", title="of titles, too"),
        written("1", "one two three", "zero one two four"),
    ]
    for order in (rows, rows[::-1]):
        left_out: Counter[str] = Counter()
        kept = list(usable_queries(order, 2, left_out))
        assert [(q.query_id, q.text, q.doc_id) for q in kept] == [
            ("1", "one two three", "d-1"),
            ("2", "why  CATS", "d-2"),
        ]
        assert left_out == {"duplicate": 1, "not_written": 1, "copied": 2}
    assert len(list(usable_queries(rows, None, Counter()))) == 4


def test_words_are_told_apart_by_their_vowel_signs():
    """Hindi `kī` (of) and `ki` (that) share their letter: without marks these queries were the same words."""
    rows = [written("1", "की पानी"), written("2", "कि पानी"), written("3", "की, पानी!")]
    left_out: Counter[str] = Counter()
    assert [q.query_id for q in usable_queries(rows, None, left_out)] == ["1", "2"]
    assert left_out == {"duplicate": 1}
    assert longest_copied_run("विश्वविद्यालय", "एक विश्वविद्यालय") == 1


def test_a_query_keeps_bm25s_candidates_if_its_passage_is_among_the_first(corpus):
    """ "cats" occurs in d1, d2 and d5, of which d5 is the shortest and d2 the longest: BM25 ranks them d5, d1, d2."""
    queries = [WrittenQuery(query_id=i, text="cats", doc_id=i) for i in ("d1", "d2", "d3", "d5")]

    def kept(**content) -> tuple[dict, Counter]:
        left_out: Counter[str] = Counter()
        lists = list(retrieve(queries, settings_of(corpus, depth=3, **content), left_out))
        return {c.query.query_id: [(x.doc_id, x.text, x.label) for x in c.candidates] for c in lists}, left_out

    found, left_out = kept(bm25_top=2)
    assert found == {
        "d1": [("d5", DOCUMENTS["d5"], None), ("d1", DOCUMENTS["d1"], 1.0), ("d2", DOCUMENTS["d2"], None)],
        "d5": [("d5", DOCUMENTS["d5"], 1.0), ("d1", DOCUMENTS["d1"], None), ("d2", DOCUMENTS["d2"], None)],
    }
    assert left_out == {"not_found_by_bm25": 2}
    assert list(kept(bm25_top=None)[0]) == ["d1", "d2", "d5"]


@pytest.mark.parametrize(
    ("scores", "place"),
    [
        ([0.1, 0.3, 0.2], 1),
        ([0.4, 0.3, 0.2], 2),
        ([0.3, 0.3, 0.3], 2),
        ([0.1, 0.3, 0.3], 1),
        ([math.nan, 0.3, None], 1),
        ([0.5, math.nan, 0.4], None),
        ([0.5, None, math.nan], None),
    ],
)
def test_the_passage_is_found_back_from_its_place_on(scores, place):
    """The passage is the second candidate; `place` is its rank, None if it has no score."""
    for top in (1, 2, 3):
        assert finds_back(scores, [None, 1.0, None], top) == (place is not None and place <= top)


def test_a_run_is_refused_with_another_content_of_what_its_round_trip_reads(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_) -> None:
        raise RunError("stopped")

    monkeypatch.setattr(synthesis_job, "_write_queries", stop)
    template = tmp_path / "mine.yaml"
    ranker = {"method": "yes_no", "model": {"kind": "fake"}, "prompt": str(template)}
    settings = settings_of(corpus, round_trip={"ranker": ranker})
    for text, message in (("{query} {passage}", "stopped"), ("{passage} {query}", "content of input prompt .*mine")):
        template.write_text(f"{{method: yes_no, about: test, text: '{text}', labels: ['Yes', 'No']}}")
        with pytest.raises(RunError, match=message):
            synthesis_job.synthesize(settings, str(tmp_path / "run"), Console())
