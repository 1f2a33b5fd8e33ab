"""`cluster/`: manifests that agree with the repository, with each other and with what they promise."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rerank_ray import config
from rerank_ray.settings.pipeline import PipelineSettings

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"
MANIFESTS = sorted(CLUSTER.glob("*.yaml"))
GPU = "nvidia.com/gpu"

# Fields of KubeRay's v1 API (ray-operator/apis/ray/v1/{rayjob,raycluster}_types.go): the API server drops others, so a
# misspelt deadline would be no deadline.
RAYJOB_FIELDS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "entrypoint",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "ttlSecondsAfterFinished",
}
CLUSTER_FIELDS = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "headGroupSpec",
    "rayVersion",
    "workerGroupSpecs",
}
WORKER_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


@pytest.fixture(scope="module")
def rayjob() -> dict:
    (document,) = documents("rayjob-pipeline.yaml")
    return document


@pytest.fixture(scope="module")
def nightly() -> dict[str, dict]:
    """The nightly's objects by kind."""
    return {document["kind"]: document for document in documents("cronjob-nightly.yaml")}


def worker_group(rayjob: dict, name: str) -> dict:
    return next(g for g in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == name)


def pod_specs(rayjob: dict) -> list[dict]:
    """The head's pod and each worker group's."""
    spec = rayjob["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def load_pipeline(entrypoint: str, monkeypatch: pytest.MonkeyPatch) -> PipelineSettings:
    """Check an entrypoint word by word against the repository; returns the pipeline that it would run."""
    python, job, path, *options = shlex.split(entrypoint)
    flags, values = options[::2], options[1::2]
    assert python == "python"
    assert (REPOSITORY / job).is_file()
    assert set(flags) <= {"--set", "--run"}
    assert [v.startswith("s3://") for f, v in zip(flags, values, strict=True) if f == "--run"] == [True]
    monkeypatch.setenv("RERANK_RAY_DATA", "s3://bucket/collections")
    overrides = [v for f, v in zip(flags, values, strict=True) if f == "--set"]
    return config.load(PipelineSettings, REPOSITORY / path, overrides)


def gpus(pipeline: PipelineSettings) -> float:
    """GPUs that a replica or worker of any step asks for."""
    executions = [getattr(getattr(s, s.job), "execution", None) for s in pipeline.steps]
    return sum(getattr(e, "gpus_per_actor", getattr(e, "gpus_per_worker", 0)) for e in executions if e is not None)


def test_the_set_of_files() -> None:
    names = ["cronjob-nightly.yaml", "launch-aws.yaml", "launch-onprem.yaml", "rayjob-pipeline.yaml"]
    assert [path.name for path in MANIFESTS] == names


@pytest.mark.parametrize("path", [*MANIFESTS, CLUSTER / "Dockerfile"], ids=lambda p: p.name)
def test_no_file_names_a_host(path: Path) -> None:
    """Registries and indexes are the user's: build arguments and image names, never addresses of ours."""
    assert not re.findall(r"https?://(?!localhost)\S+", path.read_text())


# RayJob


def test_rayjob_has_only_fields_that_kuberay_knows(rayjob: dict) -> None:
    spec = rayjob["spec"]

    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    assert set(spec) == RAYJOB_FIELDS
    assert set(spec["rayClusterSpec"]) == CLUSTER_FIELDS
    assert set(spec["rayClusterSpec"]["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert set(group) == WORKER_FIELDS


def test_rayjob_runs_a_pipeline_of_this_repository_that_asks_for_gpus(
    rayjob: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config or an override that no longer fits would fail only on the cluster, after its start."""
    assert gpus(load_pipeline(rayjob["spec"]["entrypoint"], monkeypatch)) == 3


def test_rayjob_ends_retries_and_cleans_up(rayjob: dict) -> None:
    spec = rayjob["spec"]

    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["submissionMode"] == "K8sJobMode"
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}


def test_rayjob_pins_the_ray_of_the_image(rayjob: dict) -> None:
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={rayjob['spec']['rayClusterSpec']['rayVersion']}" in pins


def test_rayjob_head_takes_no_work_and_the_cluster_needs_a_token(rayjob: dict) -> None:
    spec = rayjob["spec"]["rayClusterSpec"]
    variables = pod_specs(rayjob)[0]["containers"][0]["env"]
    environment = {variable["name"]: int(variable["value"]) for variable in variables}

    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"] == {"mode": "token"}
    # The comment beside them promises 30 s.
    period, failures = "RAY_health_check_period_ms", "RAY_health_check_failure_threshold"
    assert environment[period] * environment[failures] == 30_000


def test_rayjob_worker_groups_scale_and_only_the_gpu_group_holds_gpus(rayjob: dict) -> None:
    cpu, gpu = worker_group(rayjob, "cpu"), worker_group(rayjob, "gpu")
    limits = {g["groupName"]: g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in (cpu, gpu)}

    assert rayjob["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert limits["gpu"][GPU] == "1"
    assert GPU not in limits["cpu"]
    assert [t["key"] for t in gpu["template"]["spec"]["tolerations"]] == [GPU]
    assert cpu["minReplicas"] >= 1
    assert gpu["minReplicas"] == 0
    for group in (cpu, gpu):
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_rayjob_pods_are_alike_where_they_must_be(rayjob: dict) -> None:
    """One image (Ray refuses mixed versions), the same secret everywhere, no root, memory that is there."""
    containers = [spec["containers"][0] for spec in pod_specs(rayjob)]

    assert {c["image"] for c in containers} == {"rerank-ray:0.1.0"}
    for spec, container in zip(pod_specs(rayjob), containers, strict=True):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["envFrom"] == [{"secretRef": {"name": "rerank-object-store"}}]
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_launchers_use_the_same_image(rayjob: dict) -> None:
    (launcher,) = documents("launch-aws.yaml")
    assert launcher["docker"]["image"] == pod_specs(rayjob)[0]["containers"][0]["image"]


# Nightly


def test_nightly_objects_refer_to_each_other(nightly: dict[str, dict]) -> None:
    account, role, binding = (nightly[kind] for kind in ("ServiceAccount", "Role", "RoleBinding"))
    cron = nightly["CronJob"]
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]

    assert len(nightly) == 4
    assert cron["apiVersion"] == "batch/v1"
    assert pod["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]


def test_nights_do_not_overlap_and_stay_within_one_date(nightly: dict[str, dict], rayjob: dict) -> None:
    """The date names the run: a pod that is started again after midnight would begin another night's.

    01:00 + an hour's late start + the waiting pod's deadline must end before 24:00, and that deadline must not cut off
    the RayJob's attempts.
    """
    cron = nightly["CronJob"]["spec"]
    waiting = cron["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    minute, hour, *days = cron["schedule"].split()
    start = int(hour) * 3600 + int(minute) * 60

    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["timeZone"] == "Etc/UTC"
    assert days == ["*", "*", "*"]
    assert start + cron["startingDeadlineSeconds"] + waiting < 24 * 3600
    assert waiting > (rayjob["spec"]["backoffLimit"] + 1) * rayjob["spec"]["activeDeadlineSeconds"]


KUBECTL = """#!{python}
import json, os, sys, yaml
from pathlib import Path

store, arguments = Path(os.environ["STORE"]), sys.argv[1:]
with (store / "calls").open("a") as log:
    log.write(json.dumps(arguments) + "\\n")

def option(name):
    return arguments[arguments.index(name) + 1]

def merge(old, new):
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {{key: merge(old.get(key), value) for key, value in new.items()}}

if arguments[0] == "patch":
    assert "--local" in arguments and option("--type") == "merge"
    print(yaml.safe_dump(merge(yaml.safe_load(Path(option("-f")).read_text()), json.loads(option("-p")))))
elif arguments[0] == "create":
    manifest = yaml.safe_load(Path(option("-f")).read_text())
    target = store / (manifest["metadata"]["name"] + ".json")
    if target.exists():
        sys.exit("Error from server (AlreadyExists)")
    target.write_text(json.dumps(manifest))
elif arguments[0] == "get" and "-o" not in arguments:
    sys.exit(0 if (store / (arguments[2] + ".json")).exists() else "NotFound")
elif arguments[0] == "get":
    answers = (store / "answers").read_text().splitlines()
    (store / "answers").write_text("\\n".join(answers[1:]))
    if answers[0] == "unreachable":
        sys.exit("Unable to connect to the server")
    print("" if answers[0] == "gone" else answers[0], end="")
else:
    sys.exit("unexpected: " + " ".join(arguments))
"""


class Nightly:
    """The CronJob's script, run by a real shell against a kubectl that answers from a list."""

    def __init__(self, cron: dict, folder: Path) -> None:
        self.folder = folder
        pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        (self.container,) = pod["containers"]
        (folder / "kubectl").write_text(KUBECTL.format(python=sys.executable))
        (folder / "kubectl").chmod(stat.S_IRWXU)
        (folder / "rayjob.yaml").write_text((CLUSTER / "rayjob-pipeline.yaml").read_text())

    def run(self, *answers: str) -> subprocess.CompletedProcess:
        """Run the pod's command; `answers` are the RayJob's states, one for each look, or what happens to the look."""
        (self.folder / "answers").write_text("\n".join(answers))
        script = self.container["args"][0].replace("/manifests/", f"{self.folder}/")
        script = script.replace("/tmp/rayjob.yaml", f"{self.folder}/patched.yaml")
        environment = {"PATH": f"{self.folder}:{os.environ['PATH']}", "STORE": str(self.folder), "POLL_SECONDS": "0"}
        environment |= {"JOB_NAME": "rerank-nightly-29000000", "JOB_UID": "0123-4567"}
        command = [*self.container["command"], script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    @property
    def created(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    @property
    def verbs(self) -> set[str]:
        """kubectl verbs that reach the API server."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return {call[0] for call in calls if "--local" not in call}


@pytest.fixture
def night(nightly: dict[str, dict], tmp_path: Path) -> Nightly:
    return Nightly(nightly["CronJob"], tmp_path)


def test_a_night_creates_one_rayjob_named_after_its_date(
    night: Nightly, nightly: dict[str, dict], rayjob: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name and run folder carry the date, the Job owns the RayJob, everything else is the template's."""
    ended = night.run("/", "Initializing/", "Running/RUNNING", "Complete/SUCCEEDED")
    (created,) = night.created
    day = re.fullmatch(r"rerank-nightly-(\d{4}-\d\d-\d\d)", created["metadata"]["name"])[1]

    assert ended.returncode == 0, ended.stderr
    assert created["spec"]["entrypoint"].endswith(f"--run s3://rerank-runs/nightly/{day}")
    assert load_pipeline(created["spec"]["entrypoint"], monkeypatch) == load_pipeline(
        rayjob["spec"]["entrypoint"], monkeypatch
    )
    assert created["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "rerank-nightly-29000000", "uid": "0123-4567"}
    ]
    assert {k: v for k, v in created["spec"].items() if k != "entrypoint"} == {
        k: v for k, v in rayjob["spec"].items() if k != "entrypoint"
    }
    assert night.verbs == set(nightly["Role"]["rules"][0]["verbs"])


def test_a_night_started_again_waits_for_the_rayjob_that_is_there(night: Nightly) -> None:
    night.run("Failed/FAILED")

    again = night.run("Running/RUNNING", "Complete/SUCCEEDED")

    assert again.returncode == 0, again.stderr
    assert len(night.created) == 1


def test_a_night_survives_an_api_server_that_is_away(night: Nightly) -> None:
    assert night.run("Running/RUNNING", "unreachable", "unreachable", "Complete/SUCCEEDED").returncode == 0


@pytest.mark.parametrize("state", ["Failed/FAILED", "Failed/", "Complete/STOPPED", "gone"])
def test_a_night_that_did_not_succeed_fails_the_cronjob(night: Nightly, state: str) -> None:
    """Also a job that was stopped, and a RayJob that somebody deleted: never a silent success."""
    ended = night.run("Running/RUNNING", state)

    assert ended.returncode == 1
    assert "rerank-nightly-" in ended.stderr


# Dockerfile


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continuation lines joined, comments left out."""
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_dockerfile_copies_what_is_there_and_what_jobs_need(instructions: list[tuple[str, str]]) -> None:
    sources = [source for name, rest in instructions if name == "COPY" for source in rest.split()[:-1]]

    assert [s for s in sources if not (REPOSITORY / s).exists()] == []
    assert {"jobs", "configs", "rerank_ray", "constraints.txt"} <= set(sources)


def test_dockerfile_installs_pinned_and_runs_without_root(instructions: list[tuple[str, str]]) -> None:
    base = next(rest for name, rest in instructions if name == "ARG" and rest.startswith("PYTHON_IMAGE="))
    installs = [rest for name, rest in instructions if name == "RUN" and "pip install" in rest]

    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.1[12]\.\d+-slim-\w+", base)
    assert len(installs) == 3
    assert all("-c constraints.txt" in command and "${PIP_EXTRA_ARGS}" in command for command in installs)
    assert [rest for name, rest in instructions if name == "USER"][-1] == "ray"


def test_dockerfile_has_what_kuberay_and_the_launcher_run_inside(instructions: list[tuple[str, str]]) -> None:
    """KubeRay's probes call wget from bash; `ray up` copies with rsync and reaches workers over ssh."""
    apt = next(rest for name, rest in instructions if name == "RUN" and "apt-get install" in rest)
    assert {"bash", "wget", "rsync", "openssh-client"} <= set(apt.split())
