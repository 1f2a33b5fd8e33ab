"""The lines of a training's metrics: appended, dropped behind a checkpoint, and whole whatever is killed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rerank_ray import storage
from rerank_ray.distill.metrics_log import FILE, MetricsLog, written_lines
from rerank_ray.execution import train
from rerank_ray.runs import RunFolder


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in written_lines(str(run / FILE))]


def test_a_line_is_there_when_it_is_written_and_nothing_before_it_is_written_again(tmp_path: Path):
    log = MetricsLog(str(tmp_path))
    log.write({"step": 0, "validation_ndcg@10": 0.5})
    start = (tmp_path / FILE).stat().st_ino
    for step in (10, 20):
        log.write({"step": step, "loss/total": 1.0})
        assert steps(tmp_path)[-1] == step
    assert (tmp_path / FILE).stat().st_ino == start


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_half_a_line(tmp_path: Path):
    """What is being written is no line yet for a reader either."""
    log = MetricsLog(str(tmp_path))
    for step in (0, 10, 20, 30):
        log.write({"step": step})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 4')
    assert steps(tmp_path) == [0, 10, 20, 30]
    again = MetricsLog(str(tmp_path))
    for step in (20, 25):
        again.write({"step": step, "resumed": True})
    assert steps(tmp_path) == [0, 10, 20, 25]
    assert [json.loads(line).get("resumed") for line in (tmp_path / FILE).read_text().splitlines()][1:] == [
        None,
        True,
        True,
    ]


def test_where_nothing_can_be_appended_the_file_is_written_at_validations(tmp_path: Path, monkeypatch):
    """As on an object store; the lines between two validations come with the second one."""
    written = []
    monkeypatch.setattr(storage, "local_path", lambda uri: None)
    monkeypatch.setattr(storage, "write_text", lambda uri, text: written.append(text.count("\n")))
    log = MetricsLog(str(tmp_path))
    for metrics in (
        {"step": -1, "exit_warm_up/layer_1": 0.1},
        {"step": 0, "validation_ndcg@10": 0.5},
        {"step": 10, "loss/total": 1.0},
        {"step": 20, "loss/total": 1.0},
        {"step": 30, "validation_ndcg@10": 0.6},
    ):
        log.write(metrics)
    assert written == [1, 2, 5]


def test_lines_go_on_being_printed_after_one_read_that_failed(tmp_path: Path, monkeypatch, capsys):
    """A store may be out of reach for a moment in the days that a training takes."""
    reads = iter([[], OSError("timeout")])

    def read(path: str) -> list[str]:
        found = next(reads, None)
        if isinstance(found, OSError):
            raise found
        return written_lines(path) if found is None else found

    monkeypatch.setattr(train, "written_lines", read)
    monkeypatch.setattr(train, "_ECHO_EVERY_S", 0.01)
    with train._echo(RunFolder(uri=str(tmp_path)), lambda metrics: f"step {metrics['step']}"):
        time.sleep(0.1)
        MetricsLog(str(tmp_path)).write({"step": 10})
    assert "step 10" in capsys.readouterr().err


def test_what_has_not_changed_is_not_fetched_each_second(tmp_path: Path, monkeypatch, capsys):
    """On an object store it is written at validations alone, and may be megabytes."""
    reads: list[str] = []
    monkeypatch.setattr(train, "written_lines", lambda path: reads.append(path) or written_lines(path))
    monkeypatch.setattr(train, "_ECHO_EVERY_S", 0.01)
    log = MetricsLog(str(tmp_path))
    log.write({"step": 10})
    with train._echo(RunFolder(uri=str(tmp_path)), lambda metrics: f"step {metrics['step']}"):
        time.sleep(0.2)
        log.write({"step": 20})
        time.sleep(0.2)
    assert capsys.readouterr().err == "step 20\n"
    # At the start, the first second, after the change, and at the end.
    assert len(reads) <= 5


def test_a_full_disk_names_the_file(tmp_path: Path):
    log = MetricsLog(str(tmp_path))
    log.write({"step": 0})
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(Exception, match=f"{tmp_path}/{FILE}: can't be written"):
        log.write({"step": 10})
