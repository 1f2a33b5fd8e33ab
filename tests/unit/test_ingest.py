"""Ingests: what is written, what is counted, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.full_disk import full_disk
from fixtures.training_data import write_lines

from rerank_ray import ingest as ingest_module
from rerank_ray import parquet, schema
from rerank_ray.errors import ConfigError, InputError, RunError
from rerank_ray.formats import hits
from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.qrels import read_qrels
from rerank_ray.ingest import ingest_beir, ingest_hits, ingest_merge, ingest_trec
from rerank_ray.ingest_labels import ingest_rank_distillm
from rerank_ray.runs import INGEST_UNFINISHED, ingest_ended, resolve_input


@pytest.fixture
def beir_folder(tmp_path) -> Path:
    """Three documents and three queries; "zebra" occurs in no document, and q3 is judged in no split."""
    folder = tmp_path / "beir"
    documents = [("d1", "", "a cat sat"), ("d2", "Dogs", "a dog and a cat"), ("d3", "", "birds")]
    write_lines(folder / "corpus.jsonl", *[{"_id": i, "title": t, "text": x} for i, t, x in documents])
    queries = {"q1": "dogs cat", "q2": "zebra", "q3": "birds"}
    write_lines(folder / "queries.jsonl", *[{"_id": i, "text": t} for i, t in queries.items()])
    write_lines(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "q1\td2\t2", "q2\td3\t1", "q1\td3\t1")
    return folder


def hits_entry(query_id: str, *doc_ids: str) -> dict:
    return {
        "query": f"text of {query_id}",
        "hits": [
            {"content": f"text of {d}", "qid": query_id, "docid": d, "rank": r, "score": -r}
            for r, d in enumerate(doc_ids, start=1)
        ],
    }


def rows(out: Path) -> dict[str, list[tuple]]:
    return {
        c.query.query_id: [(x.doc_id, x.text, x.label) for x in c.candidates] for c in parquet.read_candidates(str(out))
    }


def test_beir_takes_the_splits_queries_and_lists_the_one_for_which_nothing_is_found(tmp_path, beir_folder):
    """q1: d2 has both words; d1 is not judged for it; d3, judged, has none of the words and is not retrieved."""
    out = tmp_path / "out"
    summary = ingest_beir(str(beir_folder), "test", 10, str(out), instruction="Find animals")
    assert rows(out) == {"q1": [("d2", "a dog and a cat", 2.0), ("d1", "a cat sat", None)]}
    (row,) = parquet.read_candidates(str(out))
    assert row.query.instruction == "Find animals"
    assert [c.title for c in row.candidates] == ["Dogs", None]
    assert row.candidates[0].score > row.candidates[1].score > 0
    assert (summary.queries, summary.rows, summary.candidates, summary.labelled_pairs) == (2, 1, 2, 1)
    assert summary.queries_without_candidates == ("q2",)
    stored = json.loads((out / "ingest.json").read_text())
    assert stored["queries_without_candidates"] == ["q2"]
    assert stored["parameters"] == {
        "split": "test",
        "depth": 10,
        "k1": 0.9,
        "b": 0.4,
        "stopwords": "en",
        "instruction": "Find animals",
    }
    assert [Path(s).name for s in stored["sources"]] == ["corpus.jsonl", "queries.jsonl", "test.tsv"]


def test_beir_without_a_split_takes_every_query_and_labels_none(tmp_path, beir_folder):
    (beir_folder / "qrels" / "test.tsv").unlink()
    summary = ingest_beir(str(beir_folder), None, 1, str(tmp_path / "out"))
    assert rows(tmp_path / "out") == {"q1": [("d2", "a dog and a cat", None)], "q3": [("d3", "birds", None)]}
    assert summary.labelled_pairs == 0


def test_a_judged_query_without_text_and_a_missing_split_are_errors(tmp_path, beir_folder):
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match=r"qrels/dev\.tsv: no such file"):
        ingest_beir(str(beir_folder), "dev", 10, out)
    write_lines(beir_folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "q1\td2\t2", "q9\td2\t2")
    with pytest.raises(InputError, match=r"test\.tsv: query 'q9': its text is not in .*queries\.jsonl"):
        ingest_beir(str(beir_folder), "test", 10, out)
    assert not (tmp_path / "out").exists()


def test_a_collection_without_documents_is_named(tmp_path, beir_folder):
    (beir_folder / "corpus.jsonl").write_text("")
    with pytest.raises(InputError, match=r"corpus\.jsonl: no documents"):
        ingest_beir(str(beir_folder), "test", 10, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_skipped_bad_lines_are_counted_once_and_listed_though_the_collection_is_read_twice(tmp_path, beir_folder):
    with (beir_folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d1", "text": "cat again"}\nnot json\n')
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match=r"corpus\.jsonl:4: doc id 'd1' is already used on line 1"):
        ingest_beir(str(beir_folder), "test", 10, out)
    summary = ingest_beir(str(beir_folder), "test", 10, out, skip_bad_lines=True)
    assert summary.bad_lines == 2
    assert [line.split("corpus.jsonl")[1][:3] for line in summary.bad_lines_listed] == [":4:", ":5:"]
    assert [d for d, *_ in rows(tmp_path / "out")["q1"]] == ["d2", "d1"]
    assert rows(tmp_path / "out")["q1"][1][1] == "a cat sat"


def test_hits_files_are_concatenated_cut_to_the_depth_and_labelled(tmp_path):
    """A judged gain of 0 stays 0; candidates and queries without judgments have no label."""
    first = write_lines(tmp_path / "a.jsonl", hits_entry("q1", "d1", "d2", "d3"))
    second = tmp_path / "b.json"
    second.write_text(json.dumps([hits_entry("q2", "d1")]))
    qrels = write_lines(tmp_path / "qrels", "q1 0 d1 0", "q1 0 d3 3", "q9 0 d1 1")
    others = write_lines(tmp_path / "others", "q9 0 d1 1")
    with pytest.raises(InputError, match="the qrels name none of these queries, but 'q9'"):
        ingest_hits([first, str(second)], others, out=str(tmp_path / "none"))
    summary = ingest_hits([first, str(second)], qrels, out=str(tmp_path / "out"), depth=2)
    assert rows(tmp_path / "out") == {
        "q1": [("d1", "text of d1", 0.0), ("d2", "text of d2", None)],
        "q2": [("d1", "text of d1", None)],
    }
    assert (summary.rows, summary.candidates, summary.labelled_pairs) == (2, 3, 1)
    assert summary.sources == (first, str(second), qrels)


def test_qrels_that_judge_no_candidate_are_another_collections(tmp_path, trec_files):
    """Query ids are numbers from 1 in many collections; nothing would be labelled, without a word."""
    qrels = write_lines(tmp_path / "others", "q1 0 D3 1", "q9 0 d1 1")
    message = r"others: the qrels judge none of the candidates \(query 'q1': 'd1' is one, they judge 'D3'\)"
    with pytest.raises(InputError, match=message):
        ingest_trec(**{**trec_files, "qrels": qrels}, out=str(tmp_path / "out"))
    with pytest.raises(InputError, match=message):
        ingest_rank_distillm(**{**trec_files, "qrels": qrels}, out=str(tmp_path / "labels"))
    other_queries = write_lines(tmp_path / "queries", "q9 0 d1 1")
    with pytest.raises(InputError, match="the qrels name none of these queries, but 'q9'"):
        ingest_rank_distillm(**{**trec_files, "qrels": other_queries}, out=str(tmp_path / "labels"))


def test_a_query_in_two_hits_files_is_an_error_that_names_both(tmp_path):
    files = [write_lines(tmp_path / name, hits_entry("q1", "d1")) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(InputError, match=r"b\.jsonl: query 'q1' is also in .*a\.jsonl"):
        ingest_hits(files, out=str(tmp_path / "out"), skip_bad_lines=True)
    assert not ingest_ended(str(tmp_path / "out"))


@pytest.fixture
def trec_files(tmp_path) -> dict[str, str]:
    return {
        "run": write_lines(tmp_path / "run", "q2 Q0 d1 1 3 t", "q1 Q0 d3 2 4 t", "q1 Q0 d1 1 5 t", "q1 Q0 d2 3 3 t"),
        "queries": write_lines(tmp_path / "topics.tsv", "q1\tone", "q2\ttwo", "q3\tthree"),
        "corpus": write_lines(tmp_path / "corpus.tsv", "d0\tzero", "d1\tfirst", "d2\tT\tsecond", "d3\tthird"),
        "qrels": write_lines(tmp_path / "qrels", "q1 0 d3 1"),
    }


def test_a_trec_run_is_joined_in_the_topics_order(tmp_path, trec_files):
    summary = ingest_trec(**trec_files, out=str(tmp_path / "out"), depth=2)
    assert rows(tmp_path / "out") == {
        "q1": [("d1", "first", None), ("d3", "third", 1.0)],
        "q2": [("d1", "first", None)],
    }
    assert list(rows(tmp_path / "out")) == ["q1", "q2"]
    assert summary.queries_without_candidates == ("q3",)
    assert (summary.queries, summary.rows, summary.labelled_pairs) == (3, 2, 1)


def test_a_runs_unknown_document_or_query_is_named_or_counted(tmp_path, trec_files):
    out = str(tmp_path / "out")
    run = write_lines(tmp_path / "run", "q1 Q0 d3 1 5 t", "q1 Q0 dx 2 4 t", "q3 Q0 dx 1 4 t")
    with pytest.raises(InputError, match=r"run:2: doc id 'dx' is not in the collection"):
        ingest_trec(**{**trec_files, "run": run}, out=out)
    summary = ingest_trec(**{**trec_files, "run": run}, out=out, skip_bad_lines=True)
    assert (summary.bad_lines, summary.rows) == (2, 1)
    assert summary.queries_without_candidates == ("q2", "q3")
    unknown = write_lines(tmp_path / "run2", "q9 Q0 d1 1 5 t")
    with pytest.raises(InputError, match=r"run2: query 'q9': its text is not in"):
        ingest_trec(**{**trec_files, "run": unknown}, out=str(tmp_path / "out2"))


def test_a_finished_ingest_is_kept_unless_overwritten_and_an_unfinished_one_is_replaced(tmp_path):
    out = tmp_path / "out"
    old = write_lines(tmp_path / "old.jsonl", hits_entry("q1", "d1"), hits_entry("q2", "d1"))
    new = write_lines(tmp_path / "new.jsonl", hits_entry("q3", "d1"))
    ingest_hits([old], out=str(out))
    with pytest.raises(InputError, match="--overwrite"):
        ingest_hits([new], out=str(out))
    assert list(rows(out)) == ["q1", "q2"]
    ingest_hits([new], out=str(out), overwrite=True)
    assert list(rows(out)) == ["q3"]

    (out / "ingest.json").write_text(INGEST_UNFINISHED)
    (out / "part-00007.parquet").write_bytes(b"PAR1 torn")
    ingest_hits([old], out=str(out))
    assert list(rows(out)) == ["q1", "q2"]
    assert [p.name for p in sorted(out.iterdir())] == ["ingest.json", "lock", "part-00000.parquet"]


def test_what_an_ingest_left_that_did_not_end_is_no_input(tmp_path):
    """Its rows are whole Parquet, and a job over them would end as if they were all."""
    lines = [hits_entry(f"q{i}", "d1") for i in range(100)]
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match=r"a\.jsonl:101"):
        ingest_hits([write_lines(tmp_path / "a.jsonl", *lines, "not json")], out=out)
    assert 0 < len(rows(tmp_path / "out")) < 100
    with pytest.raises(RunError, match="out: this ingest did not end: start it again"):
        resolve_input(out)
    ingest_hits([write_lines(tmp_path / "b.jsonl", *lines)], out=out)
    assert len(rows(Path(resolve_input(out)))) == 100


@pytest.mark.parametrize("spelled", ["{0}", "{0}/", "file://{0}", "file://{0}/", "{0}/part-00000.parquet"])
def test_a_merge_does_not_delete_its_input(tmp_path, spelled: str):
    folder = str(tmp_path / "x")
    ingest_hits([write_lines(tmp_path / "a.jsonl", hits_entry("q1", "d1"))], out=folder)
    with pytest.raises(InputError, match="the folder to write to: name another --out"):
        ingest_merge([spelled.format(folder)], out=folder, overwrite=True)
    assert list(rows(tmp_path / "x")) == ["q1"]


@pytest.mark.parametrize("wrong", ["typo", "broken", "empty"])
def test_a_failed_overwrite_keeps_the_finished_ingest(tmp_path, wrong: str):
    """Sources are opened one after the other, while rows are written already."""
    out = tmp_path / "out"
    old = write_lines(tmp_path / "old.jsonl", hits_entry("q1", "d1"))
    ingest_hits([old], out=str(out))
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.name != "lock"}
    lines = [hits_entry(f"new{i}", "d1") for i in range(40)]
    new = write_lines(tmp_path / "new.jsonl", *lines)
    write_lines(tmp_path / "broken.jsonl", "not json")
    write_lines(tmp_path / "empty.jsonl")
    files = [str(tmp_path / f"{wrong}.jsonl")]
    with pytest.raises(InputError, match=rf"{wrong}\.jsonl"):
        ingest_hits(files if wrong == "empty" else [new, *files], out=str(out), overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != "lock"} == before
    assert list(rows(Path(resolve_input(str(out))))) == ["q1"]


def test_parts_of_an_overwrite_that_was_killed_are_neither_read_nor_kept(tmp_path):
    out = tmp_path / "out"
    ingest_hits([write_lines(tmp_path / "old.jsonl", hits_entry("q1", "d1"))], out=str(out))
    (out / "part-00003.parquet.new").write_bytes((out / "part-00000.parquet").read_bytes())
    assert parquet.inspect_input(resolve_input(str(out)), schema.CANDIDATES).rows == 1
    ingest_hits([write_lines(tmp_path / "new.jsonl", hits_entry("q2", "d1"))], out=str(out), overwrite=True)
    assert [p.name for p in sorted(out.iterdir())] == ["ingest.json", "lock", "part-00000.parquet"]
    assert list(rows(out)) == ["q2"]


def test_data_that_nothing_calls_unfinished_is_only_overwritten_when_told(tmp_path):
    """Candidates that a program wrote have no `ingest.json`."""
    out = tmp_path / "out"
    files = [write_lines(tmp_path / "a.jsonl", hits_entry("q1", "d1"))]
    ingest_hits(files, out=str(out))
    (out / "ingest.json").unlink()
    with pytest.raises(InputError, match="already holds data: --overwrite replaces it"):
        ingest_hits(files, out=str(out))
    assert list(rows(out)) == ["q1"]


def test_a_second_ingest_is_refused_while_one_writes_to_the_folder(tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    first = write_lines(tmp_path / "first.jsonl", *[hits_entry(f"old{i}", "d1") for i in range(40)])
    second = write_lines(tmp_path / "second.jsonl", hits_entry("new", "d1"))
    read = hits.read_hits
    refused = []

    def reading(path: str, bad: BadLines):
        for number, entry in enumerate(read(path, bad)):
            if path == first and number == 20:
                with pytest.raises(RunError, match="another process is at it") as raised:
                    ingest_hits([second], out=out)
                refused.append(raised)
            yield entry

    monkeypatch.setattr(hits, "read_hits", reading)
    assert (ingest_hits([first], out=out).rows, len(refused)) == (40, 1)
    assert len(rows(tmp_path / "out")) == 40


def test_an_ingest_that_ended_while_another_read_its_sources_is_kept(tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    first = write_lines(tmp_path / "first.jsonl", hits_entry("old", "d1"))
    second = write_lines(tmp_path / "second.jsonl", hits_entry("new", "d1"))
    written = ingest_module.write_ingest

    def late(*arguments, **options):
        monkeypatch.setattr(ingest_module, "write_ingest", written)
        ingest_hits([second], out=out)
        return written(*arguments, **options)

    monkeypatch.setattr(ingest_module, "write_ingest", late)
    with pytest.raises(InputError, match="already holds data"):
        ingest_hits([first], out=out)
    assert list(rows(tmp_path / "out")) == ["new"]


@pytest.mark.parametrize("name", ["other.parquet", "part-00000.parquet", "sub/part-00000.parquet"])
def test_parquet_files_of_something_else_are_never_deleted(tmp_path, name):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), foreign)
    files = [write_lines(tmp_path / "a.jsonl", hits_entry("q1", "d1"))]
    with pytest.raises(InputError, match="no ingest wrote"):
        ingest_hits(files, out=str(tmp_path / "out"), overwrite=True)
    assert foreign.exists()


def test_nothing_to_ingest_a_file_as_folder_and_a_depth_of_zero_are_refused(tmp_path):
    empty = write_lines(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="nothing was ingested: 0 queries"):
        ingest_hits([empty], out=str(tmp_path / "out"))
    assert not ingest_ended(str(tmp_path / "out"))
    with pytest.raises(InputError, match="is a file"):
        ingest_hits([empty], out=empty)
    with pytest.raises(ConfigError, match="depth=0"):
        ingest_hits([empty], out=str(tmp_path / "out"), depth=0)


def ndcg_at_10(out: Path, qrels_path: Path) -> float:
    """nDCG@10 of the stored order with linear gains and log2 discounts (trec_eval's ndcg_cut_10)."""

    def dcg(gains: list[float]) -> float:
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:10], start=1))

    qrels = read_qrels(str(qrels_path), BadLines())
    found = {c.query.query_id: [x.doc_id for x in c.candidates] for c in parquet.read_candidates(str(out))}
    values = []
    for query_id, gains in qrels.items():
        actual = dcg([gains.get(doc_id, 0.0) for doc_id in found.get(query_id, [])])
        values.append(actual / (dcg(sorted(gains.values(), reverse=True)) or 1.0))
    return sum(values) / len(values)


@pytest.mark.parametrize(("year", "expected"), [("19", 0.5058), ("21", 0.4458)])
def test_ingested_trec_dl_lists_have_bm25s_published_ndcg(tmp_path, collections, year, expected):
    folder = collections / "trec-dl"
    qrels = folder / f"qrels.dl{year}-passage.txt"
    ingest_hits([str(folder / f"bm25_dl{year}.json.gz")], str(qrels), out=str(tmp_path / "out"))
    assert ndcg_at_10(tmp_path / "out", qrels) == pytest.approx(expected, abs=5e-5)


def test_cranfield_is_ingested_whole(tmp_path, collections):
    """75 test questions over 1,400 abstracts, two of them empty; ranx gives 0.4867 for this run."""
    summary = ingest_beir(str(collections / "cranfield"), "test", 100, str(tmp_path / "out"))
    assert (summary.queries, summary.rows, summary.bad_lines) == (75, 75, 0)
    assert summary.candidates <= 7500
    assert ndcg_at_10(tmp_path / "out", collections / "cranfield" / "qrels" / "test.tsv") == pytest.approx(
        0.4867, abs=5e-5
    )


def test_an_ingest_without_room_names_the_file_and_goes_on_with_room(tmp_path):
    """800 bytes are enough for the marker of what has not ended, and not for Parquet."""
    source = write_lines(tmp_path / "a.jsonl", *(hits_entry(f"q{i}", "d1") for i in range(100)))
    out = str(tmp_path / "out")
    with full_disk(800), pytest.raises(RunError, match=r"out/part-00000\.parquet: can't be written"):
        ingest_hits([source], out=out)
    assert ingest_hits([source], out=out).rows == 100
