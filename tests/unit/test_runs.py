"""Run folders: starting, resuming, and refusing what would mix two runs."""

from __future__ import annotations

import errno
import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rerank_ray.errors import RunError
from rerank_ray.runs import RunFolder, resolve_input
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.jobs import ExecutionSettings, LabelSettings, LimitSettings
from rerank_ray.settings.models import FakeSettings
from rerank_ray.settings.rankers import YesNoSettings

INPUTS = {"in": "0123"}


def config(seed: int = 0, **settings) -> LabelSettings:
    return LabelSettings(input="in", teacher=YesNoSettings(model=FakeSettings(seed=seed)), **settings)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(uri=str(tmp_path / "runs" / "r"))


def test_the_first_start(run: RunFolder):
    assert run.start("label", config(), INPUTS) == {}
    state = run.state()
    assert (state["kind"], state["state"], state["starts"], state["inputs"]) == ("label", "running", 1, INPUTS)
    assert set(state["versions"]) == {"rerank_ray", "ray", "torch", "transformers", "pyarrow", "numpy", "python"}
    assert "seed: 0" in Path(run.path("config.yaml")).read_text()


def test_a_second_start_resumes(run: RunFolder):
    run.start("label", config(), INPUTS)
    first = run.state()
    assert run.start("label", config(), INPUTS) == first
    state = run.state()
    assert (state["starts"], state["state"], state["started"]) == (2, "running", first["started"])


def test_a_finished_run_stays_finished(run: RunFolder):
    run.start("label", config(), INPUTS)
    run.update(state="done", rows=7)
    assert run.start("label", config(), INPUTS)["rows"] == 7
    assert (run.state()["state"], run.state()["starts"]) == ("done", 1)


def test_execution_and_limits_may_change(run: RunFolder):
    """How rows are spread and when a run counts as failed changes no output; config.yaml holds the new values."""
    run.start("label", config(), INPUTS)
    changed = config(execution=ExecutionSettings(actors=7), limits=LimitSettings(max_error_rate=0.5))
    run.start("label", changed, INPUTS)
    text = Path(run.path("config.yaml")).read_text()
    assert "actors: 7" in text
    assert "max_error_rate: 0.5" in text


def test_what_a_trainings_memory_depends_on_may_change(run: RunFolder):
    """Or a run that is out of memory could not go on; what was changed is on record, and nothing else may change."""
    student = {"base": "b", "gradient_checkpointing": False}
    first = {"input": ["in"], "student": student, "tokens_per_micro_batch": 64}
    run.start("distill", DistillSettings.model_validate(first), INPUTS)
    changed = first | {"student": student | {"gradient_checkpointing": True}, "tokens_per_micro_batch": 32}
    run.start("distill", DistillSettings.model_validate(changed), INPUTS)
    run.start("distill", DistillSettings.model_validate(changed), INPUTS)
    noted = ["student.gradient_checkpointing: False -> True", "tokens_per_micro_batch: 64 -> 32"]
    assert [(c["start"], sorted(c["config"])) for c in run.state()["changes"]] == [(2, noted)]
    other = DistillSettings.model_validate(changed | {"student": student | {"max_length": 128}})
    with pytest.raises(RunError, match=r"student.max_length: 256 -> 128"):
        run.start("distill", other, INPUTS)


def test_another_config_is_refused_with_every_difference(run: RunFolder):
    run.start("label", config(), INPUTS)
    before = Path(run.path("config.yaml")).read_text()
    other = LabelSettings(
        input="other", teacher=YesNoSettings(model=FakeSettings(seed=1)), execution=ExecutionSettings(actors=2)
    )
    with pytest.raises(RunError) as caught:
        run.start("label", other, INPUTS)
    said = str(caught.value).splitlines()
    assert said[0].startswith(f"{run.uri}: this run was started with another config or input")
    assert said[1:-1] == ["  input: 'in' -> 'other'", "  teacher.model.seed: 0 -> 1"]
    assert Path(run.path("config.yaml")).read_text() == before
    assert run.state()["starts"] == 1


def test_a_run_in_which_nothing_is_finished_may_be_deleted(run: RunFolder):
    """As one whose model's path was mistyped: the mended config is another one."""
    run.start("label", config(), INPUTS)
    with pytest.raises(RunError, match=r"or delete this one: nothing is finished in it\.$"):
        run.start("label", config(seed=1), INPUTS)
    Path(run.data).mkdir()
    Path(run.data, "part.parquet").touch()
    with pytest.raises(RunError, match=r"\nPut it back, or use another folder\.$"):
        run.start("label", config(seed=1), INPUTS)


def test_what_checkpoints_are_divided_by_may_not_change(run: RunFolder):
    run.start("label", config(), INPUTS)
    changed = config(execution=ExecutionSettings(actors=7, cpus_per_actor=2.0))
    run.start("label", changed, INPUTS, fixed=("batch_size",))
    with pytest.raises(RunError, match=r"resuming would mix the two:\n  execution\.actors: 7 -> 8\n"):
        run.start("label", config(execution=ExecutionSettings(actors=8)), INPUTS, fixed=("actors",))


def test_a_training_may_be_logged_more_often(run: RunFolder):
    """It changes no weight; a run of before there was the setting has none."""
    settings = DistillSettings.model_validate({"input": ["labels"], "student": {"base": "some/encoder"}})
    run.start("distill", settings, INPUTS)
    path = Path(run.path("config.yaml"))
    path.write_text("".join(line for line in path.open() if "log_every_steps" not in line))
    run.start("distill", settings.model_copy(update={"log_every_steps": 1}), INPUTS)
    with pytest.raises(RunError, match="queries_per_step: 4 -> 8"):
        run.start("distill", settings.model_copy(update={"queries_per_step": 8}), INPUTS)


def test_a_run_goes_on_whose_version_lacked_a_setting(run: RunFolder):
    """The setting's default is what was done without it; another value is another run."""
    settings = DistillSettings.model_validate({"input": ["labels"], "student": {"base": "some/encoder"}})
    run.start("distill", settings, INPUTS)
    path = Path(run.path("config.yaml"))
    older = [line for line in path.open() if "orthogonality" not in line and "max_query_length" not in line]
    path.write_text("".join(older))
    run.start("distill", settings, INPUTS)
    path.write_text("".join(older))
    shorter = settings.student.model_copy(update={"max_query_length": 32})
    with pytest.raises(RunError, match=r"student\.max_query_length: 64 -> 32"):
        run.start("distill", settings.model_copy(update={"student": shorter}), INPUTS)


def test_a_key_that_only_starts_like_execution_is_no_exception(run: RunFolder):
    """A difference is excused by its first key as a whole, not by how the line begins."""
    run.start("label", config(), INPUTS)
    path = Path(run.path("config.yaml"))
    path.write_text(path.read_text() + "execution_note: 1\n")
    with pytest.raises(RunError, match="execution_note: 1 -> None"):
        run.start("label", config(), INPUTS)


def test_a_changed_input_is_refused(run: RunFolder):
    run.start("label", config(), INPUTS)
    with pytest.raises(RunError, match="content of input in: '0123' -> '4567'"):
        run.start("label", config(), {"in": "4567"})


def test_a_run_of_a_version_that_noted_fewer_inputs_goes_on(run: RunFolder):
    run.start("label", config(), INPUTS)
    run.start("label", config(), INPUTS | {"prompt yes_no": "89ab"})
    with pytest.raises(RunError, match="content of input prompt yes_no: '89ab' -> 'cdef'"):
        run.start("label", config(), INPUTS | {"prompt yes_no": "cdef"})


def test_another_job_is_refused(run: RunFolder):
    run.start("label", config(), INPUTS)
    with pytest.raises(RunError, match="is a label run, not rerank: use another folder"):
        run.start("rerank", config(), INPUTS)


def test_data_without_a_run_is_refused(run: RunFolder):
    folder = Path(run.data)
    folder.mkdir(parents=True)
    (folder / "part-0.parquet").write_bytes(b"")
    with pytest.raises(RunError, match=r"holds data but .*run\.json is missing"):
        run.start("label", config(), INPUTS)


def test_update_keeps_what_it_is_not_given(run: RunFolder):
    run.update(a=1, text="é")
    run.update(b=2)
    state = json.loads(Path(run.path("run.json")).read_text())
    assert (state["a"], state["b"], state["text"]) == (1, 2, "é")
    assert not list(Path(run.uri).glob("*.tmp"))


def test_a_damaged_state_is_named(run: RunFolder):
    run.update(a=1)
    Path(run.path("run.json")).write_text("")
    with pytest.raises(RunError, match=r"run\.json: is damaged \(.*\): put back a copy"):
        run.state()


# Locks


HOLD = """
import sys, time
from rerank_ray.runs import RunFolder
with RunFolder(uri=sys.argv[1]).locked():
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    time.sleep(60)
"""


def test_a_run_is_locked_by_another_process_until_it_ends(run: RunFolder):
    """Also when it ends by SIGKILL: the operating system lets the lock go."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, run.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"another process is at it \(pid {process.pid} on "), run.locked():
            pytest.fail("two processes hold the run")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with run.locked():
        pass


def test_a_filesystem_without_locks_is_told(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    def flock(file, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunError, match=r"this filesystem has no locks \(.*not implemented\).*-o flock"), run.locked():
        pytest.fail("went on without a lock")


def test_a_lock_is_let_go_when_the_job_fails(run: RunFolder):
    with pytest.raises(ValueError, match="boom"), run.locked():
        raise ValueError("boom")
    with run.locked(), pytest.raises(RunError), run.locked():
        pytest.fail("one process holds the run twice")


# Inputs


def test_a_finished_run_stands_for_its_data(run: RunFolder):
    run.start("label", config(), INPUTS)
    with pytest.raises(RunError, match="this label run is running: start it again before using its output"):
        resolve_input(run.uri)
    run.update(state="done")
    assert resolve_input(run.uri) == run.data


def test_any_other_input_stands_for_itself(tmp_path: Path):
    assert resolve_input(str(tmp_path)) == str(tmp_path)
    assert resolve_input(str(tmp_path / "a.parquet")) == str(tmp_path / "a.parquet")


def test_a_folder_of_candidates_is_no_run_folder(run: RunFolder):
    """`resolve_input` would take the folder for the run, whose data is another ranking."""
    Path(run.uri).mkdir(parents=True, exist_ok=True)
    Path(run.uri, "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="holds Parquet, which a run would hide"):
        run.start("label", config(), INPUTS)


def test_a_file_is_no_run_folder(tmp_path: Path):
    (tmp_path / "qrels.txt").write_text("")
    run = RunFolder(uri=str(tmp_path / "qrels.txt"))
    with pytest.raises(RunError, match="a run is a folder"), run.locked():
        pass
