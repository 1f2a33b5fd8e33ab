"""The files for `ray up`, checked by the code that `ray up` runs before it touches a machine."""

from __future__ import annotations

import copy
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
LAUNCHERS = sorted(CLUSTER.glob("launch-*.yaml"))


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def prepared(config: dict) -> dict:
    """The config with Ray's defaults filled in, accepted by Ray's schema and its own checks."""
    result = prepare_config(copy.deepcopy(config))
    validate_config(result)
    return result


def test_there_are_launchers() -> None:
    assert [path.name for path in LAUNCHERS] == ["launch-aws.yaml", "launch-onprem.yaml"]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.stem)
def test_ray_accepts_the_launcher(path: Path) -> None:
    """Ray's own defaults would install Ray's nightly wheel and start without a token; ours replace both."""
    config = prepared(read(path))

    commands = config["setup_commands"] + config["head_setup_commands"] + config["worker_setup_commands"]
    assert not any(".whl" in command for command in commands)
    for kind in ("head", "worker"):
        starts = [c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0]
    assert "~/.ray/auth_token" in config["file_mounts"]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.stem)
def test_a_misspelt_key_is_refused(path: Path) -> None:
    """The check above can fail: Ray's schema knows every key."""
    with pytest.raises(jsonschema.ValidationError, match="max_worker_count"):
        prepared(read(path) | {"max_worker_count": 3})


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.stem)
def test_local_sides_of_file_mounts_are_in_the_repository_or_the_home_folder(path: Path) -> None:
    for local in read(path)["file_mounts"].values():
        assert local.startswith("~/") or (CLUSTER.parent / local).exists()


def test_aws_schedules_nothing_on_the_head_and_scales_gpu_workers_from_zero() -> None:
    config = prepared(read(CLUSTER / "launch-aws.yaml"))
    types = config["available_node_types"]

    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert types[config["head_node_type"]]["max_workers"] == 0
    assert types["gpu"]["min_workers"] == 0 < types["gpu"]["max_workers"]
    workers = [t for name, t in types.items() if name != config["head_node_type"]]
    assert sum(t["max_workers"] for t in workers) == config["max_workers"]


def test_onprem_keeps_every_listed_machine_and_schedules_nothing_on_the_head() -> None:
    config = prepared(read(CLUSTER / "launch-onprem.yaml"))
    (workers,) = config["available_node_types"].values()

    assert workers["min_workers"] == workers["max_workers"] == len(config["provider"]["worker_ips"])
    assert any("--num-cpus=0" in command for command in config["head_start_ray_commands"])
