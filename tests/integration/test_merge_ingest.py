"""Merging first stages from the command line and as a pipeline's step."""

from __future__ import annotations

from pathlib import Path

from fixtures.rows import make_list

from rerank_ray.cli import main
from rerank_ray.execution.pipeline import ingest
from rerank_ray.parquet import read_candidates, write_candidates
from rerank_ray.settings.pipeline import BeirIngestSettings, MergeIngestSettings


def doc_ids(source: str) -> dict[str, list[str]]:
    return {c.query.query_id: [x.doc_id for x in c.candidates] for c in read_candidates(source)}


def test_on_the_command_line_and_as_a_step(tmp_path: Path, console):
    """A step's input is an ingest run; started again it is done, whatever else happened in that run's folder."""
    inputs = [str(tmp_path / name) for name in "ab"]
    for size, folder in enumerate(inputs, start=1):
        write_candidates([make_list("q", size)], folder)
    assert main(["ingest", "merge", *inputs, "--out", str(tmp_path / "out"), "--method", "interleave"]) == 0
    assert doc_ids(str(tmp_path / "out")) == {"q": ["d0", "d1"]}
    first = MergeIngestSettings(kind="merge", inputs=inputs)
    ingest(first, str(tmp_path / "first"), console)
    second = MergeIngestSettings(kind="merge", inputs=[str(tmp_path / "first"), inputs[0]], method="interleave")
    ingest(second, str(tmp_path / "second"), console)
    ingest(first, str(tmp_path / "first"), console)
    run = ingest(second, str(tmp_path / "second"), console)
    assert doc_ids(run.data) == {"q": ["d0", "d1"]}


def test_a_folder_of_the_splits_name_is_no_input(tmp_path: Path, console, monkeypatch):
    """A pipeline may start beside the user's own `test/`; what changes there is not the collection's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "honey bees"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "bees"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    (tmp_path / "test").mkdir()
    settings = BeirIngestSettings(kind="beir", folder=str(tmp_path), split="test", depth=1)
    run = ingest(settings.model_copy(update={"folder": "."}), "runs/ingest", console)
    assert set(run.state()["inputs"]) == {"./corpus.jsonl", "./queries.jsonl", "./qrels/test.tsv"}
