"""What a run can't do ends in a clear error, at once where it can be known at once, and never in a hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.full_disk import full_disk
from fixtures.tiny_models import tiny_bert_folder
from ray.train import Checkpoint

from rerank_ray import config
from rerank_ray.distill.checkpoints import STUDENT
from rerank_ray.errors import InputError, ModelError, RunError
from rerank_ray.execution import jobs, train
from rerank_ray.runs import RunFolder
from rerank_ray.settings.jobs import LabelSettings


def label_with(source: str, teacher: dict) -> LabelSettings:
    return config.validate(LabelSettings, {"input": source, "teacher": teacher}, source="test")


def fake(source: str) -> LabelSettings:
    return label_with(source, {"method": "yes_no", "model": {"kind": "fake"}})


@pytest.mark.usefixtures("ray_session")
def test_a_model_without_the_head_it_needs(make_candidates, tmp_path, console):
    """Only a worker finds that; its error must reach the user."""
    encoder = tiny_bert_folder(tmp_path / "bert")
    teacher = {"method": "cross_encoder", "model": {"kind": "cross_encoder", "path": str(encoder), "max_length": 64}}
    with pytest.raises(RunError, match="not a cross-encoder: the checkpoint has no weights for"):
        jobs.label(label_with(make_candidates(4), teacher), str(tmp_path / "run"), console)


def test_a_missing_model_is_found_before_ray_starts(make_candidates, tmp_path, console):
    teacher = {"method": "cross_encoder", "model": {"kind": "cross_encoder", "path": str(tmp_path / "no-model")}}
    with pytest.raises(ModelError, match="no such model folder"):
        jobs.label(label_with(make_candidates(4), teacher), str(tmp_path / "run"), console)


def test_a_truncated_file_is_named_before_ray_starts(make_candidates, tmp_path, console):
    source = make_candidates(100)
    second = Path(source, "part-00001.parquet")
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"part-00001\.parquet: not a readable Parquet file"):
        jobs.label(fake(source), str(tmp_path / "run"), console)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 600 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_ends_the_run_and_space_lets_it_finish(make_candidates, small_disk, console):
    """The run stops with the system's message; with more room the same command completes it, each row once."""
    source = make_candidates(192, size=20, noise=200)
    run = small_disk / "run"
    with pytest.raises(RunError, match=r"(?s)No space left.*start the same command again"):
        jobs.label(fake(source), str(run), console)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    jobs.label(fake(source), str(run), console)
    state = json.loads((run / "run.json").read_text())
    assert state["state"] == "done"
    assert state["counts"]["ok"] == 192


def test_a_student_for_which_there_is_no_room(tmp_path):
    """It is copied when training has ended; its checkpoint stays, and the same command copies it again."""
    (tmp_path / "checkpoint" / STUDENT).mkdir(parents=True)
    (tmp_path / "checkpoint" / STUDENT / "model.safetensors").write_bytes(b"x" * 2000)
    checkpoint, run = Checkpoint.from_directory(tmp_path / "checkpoint"), RunFolder(uri=str(tmp_path / "run"))
    with (
        full_disk(1000),
        pytest.raises(RunError, match=r"run/student: can't be written .*File too large"),
    ):
        train._publish(checkpoint, run)
    train._publish(checkpoint, run)
    assert Path(run.student, "model.safetensors").stat().st_size == 2000


def test_the_command_line_prints_the_error_and_exits_with_1(tmp_path):
    file = tmp_path / "label.yaml"
    file.write_text("inputs: x\nteacher: {method: yes_no, model: {kind: fake, sed: 1}}\n")
    result = subprocess.run(
        [sys.executable, "-m", "rerank_ray.cli", "label", str(file)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for part in ("3 errors", "inputs: unknown key; did you mean 'input'?", "input: required", "did you mean 'seed'?"):
        assert part in result.stderr


def test_gpus_that_the_machine_has_not_are_no_endless_wait(make_candidates, tmp_path):
    file = tmp_path / "label.yaml"
    file.write_text(f"input: {make_candidates(4)}\nteacher: {{method: yes_no, model: {{kind: fake}}}}\n")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "rerank_ray.cli", "label", str(file), "--run", str(tmp_path / "run")]
    result = subprocess.run(
        [*command, "--set", "execution.gpus_per_actor=1"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "the job needs 1 GPUs and Ray has 0 on this machine" in result.stderr
