"""What a job asks of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

_ROUNDING = 1e-6


class Resources(NamedTuple):
    """Logical CPUs and GPUs that must be there at once for a job to begin."""

    cpus: float
    gpus: float = 0.0

    def missing_from(self, there: Mapping[str, float]) -> str | None:
        """What is needed and not there, as a sentence; None if there is enough.

        Args:
            there: amounts by Ray's names of resources, "CPU" and "GPU".
        """
        pairs = (("CPUs", self.cpus, there.get("CPU", 0.0)), ("GPUs", self.gpus, there.get("GPU", 0.0)))
        missing = [f"{needed:g} {name} and Ray has {has:g}" for name, needed, has in pairs if has < needed - _ROUNDING]
        return f"the job needs {', and '.join(missing)}" if missing else None
