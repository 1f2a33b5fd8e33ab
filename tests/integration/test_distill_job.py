"""The distil job on Ray Train: a student on disk, exact resume, several workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fixtures.rows import label_row, make_list, write_labels
from fixtures.tiny_models import tiny_bert_folder
from safetensors.torch import load_file

from rerank_ray import config
from rerank_ray.errors import InputError, RunError
from rerank_ray.execution import training_jobs
from rerank_ray.execution.train import fit, work
from rerank_ray.models.student import load_student
from rerank_ray.parquet import write_candidates
from rerank_ray.runs import RunFolder
from rerank_ray.settings.distill import DistillSettings, TrainingExecutionSettings
from rerank_ray.settings.models import ModelSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert_folder(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 labelled queries of 6 candidates; the teacher prefers them in an order of each query's own."""
    rows = [
        label_row(make_list(f"q{q}", 6, text="cat dog"), [float((i * 5 + q) % 6) for i in range(6)]) for q in range(20)
    ]
    return write_labels(tmp_path_factory.mktemp("labels"), rows)


def settings(labels: str, base: Path, **changes) -> DistillSettings:
    content = {
        "input": [labels],
        "student": {"base": str(base), "head": "similarity", "max_length": 48, "max_query_length": 16, "dropout": 0.1},
        "sampling": {"group_size": 4},
        "validation": {"fraction": 0.2, "every_steps": 2, "patience": 1000},
        "queries_per_step": 4,
        "epochs": 2,
        "dtype": "float32",
    } | changes
    return config.validate(DistillSettings, content, source="test")


def student_weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "student"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "heads.safetensors")}


@pytest.mark.usefixtures("ray_session")
def test_a_run_leaves_a_student_metrics_and_nothing_to_do(labels, base, tmp_path, console, monkeypatch):
    """Started with relative paths, which mean something else in the workers' folder."""
    monkeypatch.chdir(tmp_path)
    labels, base, run = os.path.relpath(labels), Path(os.path.relpath(base)), tmp_path / "run"
    training_jobs.distill(settings(labels, base), "run", console)
    state = json.loads((run / "run.json").read_text())
    assert state["state"] == "done"
    assert state["counts"]["training_queries"] + state["counts"]["validation_queries"] == 20
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert steps[-1] == state["best"]["total_steps"]
    assert state["best"]["step"] == state["best"]["best_step"]
    assert list((run / "tensorboard").glob("events*"))
    student = load_student(ModelSettings(path=str(run / "student"), max_length=48))
    assert student.layers == (3,)
    written = (run / "student" / "model.safetensors").stat().st_mtime_ns
    training_jobs.distill(settings(labels, base), str(run), console)
    assert (run / "student" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(RunError, match="epochs: 2 -> 3"):
        training_jobs.distill(settings(labels, base, epochs=3), str(run), console)


@pytest.mark.usefixtures("ray_session")
def test_texts_of_an_exit_warm_up_are_an_input_of_the_run(labels, base, tmp_path, console, monkeypatch):
    """By a relative path too; other texts are another input."""
    monkeypatch.chdir(tmp_path)
    write_candidates((make_list(f"t{n}", 4) for n in range(6)), "texts")
    warming = {"steps": 2, "passages": 4, "spans": 2, "texts": ["texts"]}
    student = settings(labels, base).student.model_dump() | {"layers": (2, 3), "exit_warm_up": warming}
    run = tmp_path / "run"
    training_jobs.distill(settings(labels, base, student=student, max_steps=2), str(run), console)
    state = json.loads((run / "run.json").read_text())
    assert state["state"] == "done"
    assert set(state["inputs"]) == {"labels", "texts", str(base)}
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [-2, -1, 0, 2]
    assert load_student(ModelSettings(path=str(run / "student"), max_length=48)).layers == (2, 3)
    write_candidates((make_list(f"u{n}", 4) for n in range(6)), "texts")
    with pytest.raises(RunError, match="texts"):
        training_jobs.distill(settings(labels, base, student=student, max_steps=2), str(run), console)
    student["exit_warm_up"]["texts"] = ["nowhere"]
    with pytest.raises(InputError, match="nowhere: the input does not exist"):
        training_jobs.distill(settings(labels, base, student=student, max_steps=2), str(tmp_path / "other"), console)
    assert not (tmp_path / "other" / "run.json").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("backward", ["plain", "cached"])
def test_two_workers_take_the_same_steps_as_one(labels, base, tmp_path, console, backward):
    """Without dropout the averaged gradient is one worker's, so the weights agree to rounding; 5 queries a step leave
    an uneven split and a short last step. Several chunks a step: gradients are averaged after the last one only."""
    student = settings(labels, base).student.model_dump() | {"dropout": 0.0}
    weights = []
    for workers in (1, 2):
        run = tmp_path / f"workers-{workers}"
        chosen = settings(
            labels,
            base,
            student=student,
            queries_per_step=5,
            execution={"workers": workers},
            max_steps=4,
            # The one worker's step is the reference: plain, in one chunk.
            backward=backward if workers > 1 else "plain",
            tokens_per_backward=128 if workers > 1 else 8192,
        )
        training_jobs.distill(chosen, str(run), console)
        weights.append((json.loads((run / "run.json").read_text())["best"]["step"], student_weights(run)))
    assert weights[0][0] == weights[1][0]
    for name, tensor in weights[0][1].items():
        torch.testing.assert_close(weights[1][1][name], tensor, rtol=0, atol=2e-5, msg=name)


@pytest.mark.timeout(900)  # three jobs, each with a Ray of its own
def test_killed_in_mid_epoch_it_ends_with_the_same_weights(labels, base, tmp_path):
    """`kill -9` of the driver between two checkpoints of the first epoch; dropout is on."""
    chosen = settings(labels, base, epochs=20, validation={"fraction": 0.2, "every_steps": 3, "patience": 1000})
    file = tmp_path / "distill.yaml"
    file.write_text(config.dump(chosen))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    start(file, undisturbed).wait(timeout=400)
    driver = start(file, killed)
    deadline = time.monotonic() + 400
    while not (killed / "metrics.jsonl").exists() or last_step(killed) < 9:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    killed_at = last_step(killed)
    assert killed_at < last_step(undisturbed)
    assert start(file, killed).wait(timeout=400) == 0
    expected, actual = last_weights(undisturbed), last_weights(killed)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert (killed / "student" / "heads.safetensors").read_bytes() == (
        undisturbed / "student" / "heads.safetensors"
    ).read_bytes()


def start(file: Path, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "rerank_ray.cli", "distill", str(file), "--run", str(run)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def last_step(run: Path) -> int:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights of the latest checkpoint: what training ended with, whichever step was best."""
    states = {f: torch.load(f, weights_only=True)["progress"]["step"] for f in run.glob("checkpoints/*/trainer.pt")}
    folder = max(states, key=states.get).parent / "student"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "heads.safetensors")}


@pytest.mark.usefixtures("ray_session")
def test_what_can_not_work_is_said_before_anything_starts(labels, base, tmp_path, console):
    missing = settings(labels, tmp_path / "nowhere" / "model")
    with pytest.raises(Exception, match="no such model folder"):
        training_jobs.distill(missing, str(tmp_path / "run"), console)
    with pytest.raises(Exception, match="the input does not exist"):
        training_jobs.distill(settings(str(tmp_path / "none"), base), str(tmp_path / "run"), console)
    chosen = settings(labels, base)
    wrong = chosen.student.model_copy(update={"layers": (1, 9)})
    with pytest.raises(Exception, match="give ascending layers"):
        training_jobs.distill(chosen.model_copy(update={"student": wrong}), str(tmp_path / "run"), console)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("error", "starts"), [(InputError("nothing to learn"), 1), (RunError("the disk was full"), 2), (OSError("busy"), 2)]
)
def test_an_error_that_would_come_again_is_not_waited_for(tmp_path, error, starts):
    """The loop is started once more after what may pass alone."""
    execution, count = TrainingExecutionSettings(max_failures=1), tmp_path / "starts"

    def worker(given: dict) -> None:
        def loop(world, report, resume=None):
            with count.open("a") as file:
                file.write("x")
            raise error from (OSError("no space left") if isinstance(error, RunError) else None)

        work(given["run"], None, execution, loop)

    run = RunFolder(uri=str(tmp_path / "run"))
    for _ in range(2):
        with pytest.raises(RunError, match=str(error)):
            fit(run, worker, {}, execution, score="s", summary=str)
    assert count.read_text() == "x" * 2 * starts


@pytest.mark.usefixtures("ray_session")
def test_of_equal_steps_the_last_becomes_the_student(tmp_path):
    """As `best_step` counts them."""

    def worker(given: dict) -> None:
        def loop(world, report, resume=None):
            for step, score in enumerate([0.1, 0.5, 0.5, 0.5, 0.2]):
                folder = Path(given["run"], "made", str(step))
                (folder / "student").mkdir(parents=True)
                (folder / "student" / "step").write_text(str(step))
                report({"step": step, "s": score}, folder)

        work(given["run"], None, TrainingExecutionSettings(), loop)

    run = RunFolder(uri=str(tmp_path / "run"))
    assert fit(run, worker, {}, TrainingExecutionSettings(), score="s", summary=str)["step"] == 3
    assert Path(run.student, "step").read_text() == "3"
