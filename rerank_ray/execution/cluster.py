"""Connecting to a Ray cluster, or starting one on this machine for the length of a job."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import ray

# Logical CPUs that reading, filtering by checkpoint, dividing and writing need beside the model replicas: with fewer, a
# resumed run on a small machine waits for ever for a CPU that its own replicas hold.
BOOKKEEPING_CPUS = 2


@contextmanager
def session(cpus_for_actors: float) -> Iterator[None]:
    """Use the running Ray session, the cluster that RAY_ADDRESS names, or a local one with logical CPUs to spare.

    A local session is shut down at the end; a cluster is left as it was.
    """
    if ray.is_initialized():
        yield
        return
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's C++ side reports conditions of its own code as errors; what ends a job reaches it as an exception.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Ray would warn that a CPU-only machine hides its accelerators from tasks without GPUs.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=int(max(os.cpu_count() or 1, cpus_for_actors) + BOOKKEEPING_CPUS),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


_RAISED = re.compile(r"^[\w.]*(?:Error|Exception|Expired|Timeout)\b.*", re.MULTILINE)


def root_cause(error: BaseException) -> str:
    """The message of the exception that a worker raised, out of Ray's report of it.

    Ray hands over the worker's traceback as text; its last exception line starts the message.
    """
    text = next((str(e).strip() for e in (error, error.__cause__) if e is not None and str(e).strip()), "")
    raised = list(_RAISED.finditer(text))
    return text[raised[-1].start() :] if raised else f"{type(error).__name__}: {text}"
