"""Every job through `ray job submit` on a cluster of its own: what a user of a real cluster does.

The cluster is started by `ray start` with its own ports and its own temporary folder, and exactly its processes are
ended, so that others on the same machine are neither used nor disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import psutil
import pytest
import yaml
from fixtures.tiny_models import tiny_bert_folder

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
QUERIES, DEPTH = 12, 8
ROWS = {"rows_per_batch": 4, "rows_per_block": 4}
FAKE = {"method": "yes_no", "model": {"kind": "fake"}}
TOPICS = ("river", "engine", "harvest", "signal")
STARTING_TAKES_S = 180
ENDING_TAKES_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job that ended: the client's exit code and output, and the status the cluster recorded."""

    exit_code: int
    output: str
    status: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A running cluster, the folder jobs are submitted from, and the folder that all nodes reach."""

    address: str
    environment: dict[str, str]
    folder: Path
    data: Path

    def submit(self, submission_id: str, job: str, *arguments: str | Path) -> Submitted:
        """`ray job submit` of jobs/`job`.py; waits for its end."""
        command = [RAY, "job", "submit", "--address", self.address, "--submission-id", submission_id]
        command += ["--working-dir", str(self.folder), "--", sys.executable, f"jobs/{job}.py", *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240)
        return Submitted(
            exit_code=done.returncode, output=done.stdout + done.stderr, status=self.job(submission_id).get("status")
        )

    def job(self, submission_id: str) -> dict:
        """What the cluster knows of a job, by its REST interface; nothing of one that it did not take."""
        try:
            with urllib.request.urlopen(f"{self.address}/api/jobs/{submission_id}", timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.NOT_FOUND:
                return {}
            raise

    def config(self, name: str, content: dict) -> str:
        """Write a config into the working directory; returns its path there."""
        path = self.folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        return f"configs/{name}.yaml"

    def run_folder(self, name: str) -> Path:
        return self.data / "runs" / name

    def state(self, name: str) -> dict:
        return json.loads((self.run_folder(name) / "run.json").read_text())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A head node with six logical CPUs, and a working directory that holds just the jobs."""
    base = tmp_path_factory.mktemp("submit")
    shutil.copytree(REPOSITORY / "jobs", base / "work" / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    data = base / "data"
    write_beir(data / "beir")
    # A throw-away cluster on this machine's loopback interface needs no token, and must not leave one in the home
    # folder. The other settings save seconds: no six idle workers for each job, no actors for Parquet footers.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # Not below pytest's folder: Ray's sockets lie in it, and their paths may be 107 characters long.
    with tempfile.TemporaryDirectory(prefix="rr-", ignore_cleanup_errors=True) as temporary:
        address, head = start_head(Path(temporary), environment, base)
        try:
            yield Workspace(address=address, environment=environment, folder=base / "work", data=data)
        finally:
            stop(head)


def start_head(temporary: Path, environment: dict[str, str], folder: Path) -> tuple[str, subprocess.Popen]:
    """Start a cluster that takes jobs: its dashboard's address, and the process.

    On a busy machine Ray gives its own start up after 50 seconds; it is tried three times.
    """
    faults: list[str] = []
    for attempt in range(1, 4):
        gcs, dashboard, agent, agent_grpc, client = free_ports(5)
        command = [RAY, "start", "--head", "--block", "--num-cpus=6", "--num-gpus=0", "--node-ip-address=127.0.0.1"]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
        command += [f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"]
        command += ["--include-dashboard=true", "--disable-usage-stats", f"--temp-dir={temporary / str(attempt)}"]
        command += [f"--object-store-memory={150 * 2**20}"]
        log = folder / f"ray-start-{attempt}.log"
        with log.open("w") as file:
            head = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            wait_until_up(address, head, log)
            return address, head
        except AssertionError as error:
            stop(head)
            faults.append(str(error))
        except BaseException:
            stop(head)
            raise
    raise AssertionError("\n".join(faults))


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on; all are held until all are known, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_until_up(address: str, head: subprocess.Popen, log: Path) -> None:
    """Wait until the cluster takes a job. The head answers before there is an agent to give one to."""
    nothing = json.dumps({"entrypoint": "true"}).encode()
    request = urllib.request.Request(f"{address}/api/jobs/", nothing, {"Content-Type": "application/json"})
    deadline = time.monotonic() + STARTING_TAKES_S
    while time.monotonic() < deadline:
        assert head.poll() is None, f"ray start ended: {log.read_text()}"
        try:
            with urllib.request.urlopen(request, timeout=30):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no cluster after {STARTING_TAKES_S} s: {log.read_text()}")


def stop(head: subprocess.Popen) -> None:
    """End the cluster's own processes, and see that none is left."""
    try:
        main = psutil.Process(head.pid)
        processes = [main, *main.children(recursive=True)]
    except psutil.NoSuchProcess:
        processes = []
    head.terminate()
    _, left = psutil.wait_procs(processes, timeout=2)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait(timeout=ENDING_TAKES_S)
    deadline = time.monotonic() + ENDING_TAKES_S
    while (running := [p for p in left if is_running(p)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running, f"still running: {running}"


def is_running(process: psutil.Process) -> bool:
    """Ended processes stay zombies until their parent, the machine's first process by then, comes to ask after them."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def write_beir(folder: Path) -> None:
    """Forty documents, ten on each topic, and twelve queries on a topic each: BM25 finds more than DEPTH for all."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": f"Note {i}", "text": f"{TOPICS[i % 4]} note number {i}"} for i in range(40)]
    queries = [{"_id": f"q{i}", "text": f"about {TOPICS[i % 4]} {i}"} for i in range(QUERIES)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    judged = "".join(f"q{i}\td{i}\t2\nq{i}\td{i + 4}\t1\n" for i in range(QUERIES))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)


def assert_succeeded(job: Submitted) -> None:
    assert (job.exit_code, job.status) == (0, "SUCCEEDED"), job.output


@pytest.fixture(scope="module")
def candidates(workspace: Workspace) -> Path:
    """Candidate Parquet, by a submitted ingest."""
    out = workspace.data / "candidates"
    job = workspace.submit(
        "ingest", "ingest", "beir", workspace.data / "beir", "--split", "test", "--depth", str(DEPTH), "--out", out
    )
    assert_succeeded(job)
    return out


@pytest.fixture(scope="module")
def labels(workspace: Workspace, candidates: Path) -> Path:
    """A label run, by a submitted label job."""
    config = workspace.config("label", {"input": str(candidates), "teacher": FAKE, "execution": ROWS})
    assert_succeeded(workspace.submit("label", "label", config, "--run", workspace.run_folder("label")))
    return workspace.run_folder("label")


def test_label_accounts_for_every_row(workspace: Workspace, labels: Path) -> None:
    """Each of the 12 queries has one row of 8 scores, computed by as many model calls."""
    state = workspace.state("label")
    counts = state["counts"]

    assert state["state"] == "done"
    assert (counts["rows"], counts["ok"], counts["errors"]) == (QUERIES, QUERIES, 0)
    assert counts["pairs"] == counts["usage"]["calls"] == QUERIES * DEPTH


def test_rerank_then_evaluate(workspace: Workspace, candidates: Path) -> None:
    ranker = {"method": "cross_encoder", "model": {"kind": "fake", "seed": 1}}
    config = workspace.config("rerank", {"input": str(candidates), "ranker": ranker, "execution": ROWS})
    run, report = workspace.run_folder("rerank"), workspace.data / "report.json"

    assert_succeeded(workspace.submit("rerank", "rerank", config, "--run", run))
    qrels = workspace.data / "beir" / "qrels" / "test.tsv"
    evaluated = workspace.submit("evaluate", "evaluate", f"fake={run}", "--qrels", qrels, "--json", report)

    counts = workspace.state("rerank")["counts"]
    assert workspace.state("rerank")["state"] == "done"
    assert (counts["rows"], counts["ok"], counts["errors"]) == (QUERIES, QUERIES, 0)
    assert len((run / "run.trec").read_text().splitlines()) == QUERIES * DEPTH
    assert_succeeded(evaluated)
    assert "fake" in evaluated.output
    assert report.exists()


def test_distill_trains_a_student_that_loads(workspace: Workspace, labels: Path) -> None:
    """Two steps on Ray Train inside a submitted job leave a student that transformers loads."""
    from transformers import AutoModelForSequenceClassification

    encoder = tiny_bert_folder(workspace.data / "encoder", layers=2)
    config = workspace.config(
        "distill",
        {
            "input": [str(labels)],
            "student": {"base": str(encoder), "max_length": 64, "max_query_length": 24},
            "sampling": {"group_size": 4},
            "validation": {"fraction": 0.25, "every_steps": 1},
            "max_steps": 2,
        },
    )

    job = workspace.submit("distill", "distill", config, "--run", workspace.run_folder("distill"))

    assert_succeeded(job)
    state = workspace.state("distill")
    assert state["state"] == "done"
    assert sum(state["counts"].values()) == QUERIES
    assert state["counts"]["queries_without_labels"] == 0
    student = AutoModelForSequenceClassification.from_pretrained(workspace.run_folder("distill") / "student")
    assert student.config.num_labels == 1


def test_pipeline_submitted_again_goes_on_where_it_stopped(workspace: Workspace) -> None:
    """What a submitter does after a lost head: the same run folder, a new submission id."""
    beir = str(workspace.data / "beir")
    steps = [
        {"name": "candidates", "ingest": {"kind": "beir", "folder": beir, "split": "test", "depth": DEPTH}},
        {"name": "ranked", "rerank": {"input": "step://candidates", "ranker": FAKE, "execution": ROWS}},
        {"name": "result", "evaluate": {"rankings": {"fake": "step://ranked"}, "qrels": f"{beir}/qrels/test.tsv"}},
    ]
    config = workspace.config("pipeline", {"steps": steps})
    run = workspace.run_folder("pipeline")

    first = workspace.submit("pipeline-1", "pipeline", config, "--run", run)
    before = {name: workspace.state(f"pipeline/{name}") for name in ("candidates", "ranked")}
    again = workspace.submit("pipeline-2", "pipeline", config, "--run", f"{run}/./")  # the same folder

    assert_succeeded(first)
    assert_succeeded(again)
    # Lines of a job's log are wrapped at 80 columns.
    assert " ".join(again.output.split()).count("already done") == 2
    assert {name: workspace.state(f"pipeline/{name}") for name in before} == before
    assert [before[name]["state"] for name in before] == ["done", "done"]
    assert before["ranked"]["counts"]["ok"] == before["candidates"]["counts"]["rows"] == QUERIES
    assert (run / "result" / "evaluation.json").exists()
    assert (run / "result" / "per_query.tsv").exists()


def test_a_submission_id_runs_once(workspace: Workspace, labels: Path) -> None:
    """The id is the idempotency key: the second submission is refused and the first one's record stays."""
    before = workspace.job("label")

    again = workspace.submit("label", "label", "configs/label.yaml", "--run", workspace.run_folder("label"))

    assert again.exit_code != 0
    assert "already exists" in again.output
    assert workspace.job("label")["start_time"] == before["start_time"]


def test_a_failing_job_is_failed_and_names_the_file(workspace: Workspace) -> None:
    missing = workspace.data / "no-such-candidates"
    config = workspace.config("missing", {"input": str(missing), "teacher": FAKE})

    job = workspace.submit("missing", "label", config, "--run", workspace.run_folder("missing"))

    assert job.status == "FAILED"
    assert job.exit_code != 0
    assert str(missing) in job.output
    assert "Traceback" not in job.output
