"""Connecting to a Ray cluster, or starting one on this machine for the length of a job."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

import ray
from joblib import cpu_count
from rich.console import Console

from rerank_ray.errors import RunError
from rerank_ray.settings.resources import Needs

# Logical CPUs of a local session beside a job's own, and beside the machine's.
_SPARE_CPUS, _SPARE_CPUS_OF_MACHINE = 0.5, 2


@contextmanager
def session(needs: Needs) -> Iterator[None]:
    """Use the running Ray session, the cluster that RAY_ADDRESS names, or a local one with logical CPUs to spare.

    A local session is shut down at the end; a cluster is left as it was. A cluster that lacks something may be one that
    grows, so there it is said and the job waits.

    Raises:
        RunError: this machine has not the GPUs or the memory that are needed.
    """
    if ray.is_initialized():
        yield
        return
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False)
        if missing := needs.missing_from(_nodes()):
            Console(stderr=True, soft_wrap=True).print(
                f"{missing}. Until the cluster has grown the job waits, and a job over rows for "
                "execution.no_progress_timeout_s at most"
            )
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's C++ side reports conditions of its own code as errors; what ends a job reaches it as an exception.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Ray would warn that a CPU-only machine hides its accelerators from tasks without GPUs.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=ceil(max(needs.total.cpus + _SPARE_CPUS, cpu_count() + _SPARE_CPUS_OF_MACHINE)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    _say_of_idle_gpus(needs)
    try:
        if not address and (missing := needs.missing_from(_nodes())):
            raise RunError(
                f"{missing} on this machine. Ask for fewer in `execution`, or let RAY_ADDRESS name a cluster"
            )
        yield
    finally:
        ray.shutdown()


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _say_of_idle_gpus(needs: Needs) -> None:
    if not needs.total.gpus and (there := ray.cluster_resources().get("GPU")):
        Console(stderr=True, soft_wrap=True).print(
            f"Ray has {there:g} GPUs, and this job uses none: reserve them with execution.gpus_per_actor (training: "
            "gpus_per_worker)"
        )


_RAISED = re.compile(r"^[\w.]*(?:Error|Exception|Expired|Timeout)\b.*", re.MULTILINE)


def root_cause(error: BaseException) -> str:
    """The message of the exception that a worker raised, out of Ray's report of it.

    Ray hands over the worker's traceback as text; its last exception line starts the message.
    """
    text = next((str(e).strip() for e in (error, error.__cause__) if e is not None and str(e).strip()), "")
    raised = list(_RAISED.finditer(text))
    return text[raised[-1].start() :] if raised else f"{type(error).__name__}: {text}"
