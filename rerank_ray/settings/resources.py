"""What a job asks of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

_ROUNDING = 1e-6
_UNITS = ("CPUs", "GPUs", "GiB of memory")


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus % 1:
        raise ValueError(f"{gpus:g}: Ray reserves a share of one GPU, or whole ones")
    return gpus


GPUs = Annotated[float, Field(ge=0.0), AfterValidator(_whole_above_one)]
"""A share of one GPU, or whole ones."""


class Resources(NamedTuple):
    """Amounts that Ray reserves: logical CPUs, GPUs, and GiB of memory."""

    cpus: float
    gpus: float = 0.0
    memory_gb: float = 0.0

    @classmethod
    def of(cls, amounts: Mapping[str, float]) -> Resources:
        """From amounts by Ray's names: "CPU", "GPU", and "memory" in bytes."""
        return cls(amounts.get("CPU", 0.0), amounts.get("GPU", 0.0), amounts.get("memory", 0.0) / 2**30)

    def beyond(self, there: Resources) -> list[str]:
        """What is more than there is, each as a phrase."""
        amounts = zip(_UNITS, self, there, strict=True)
        return [f"{needed:g} {name} and Ray has {has:g}" for name, needed, has in amounts if has < needed - _ROUNDING]


class Needs(NamedTuple):
    """What must be there for a job to begin."""

    total: Resources
    """At once, on all nodes together."""
    one: Resources
    """Of a model replica or a training worker, which lives on one node."""

    @classmethod
    def largest(cls, needs: Sequence[Needs]) -> Needs:
        """The most of each that any of them asks for."""
        total, one = (Resources(*map(max, zip(*parts, strict=True))) for parts in zip(*needs, strict=True))
        return cls(total=total, one=one)

    def missing_from(self, nodes: Sequence[Mapping[str, float]]) -> str | None:
        """What is needed and not there, as a sentence; None if there is enough.

        Args:
            nodes: each node's amounts by Ray's names.
        """
        there = [Resources.of(node) for node in nodes]
        if missing := self.total.beyond(Resources(*map(sum, zip(Resources(0.0), *there, strict=True)))):
            return f"the job needs {', and '.join(missing)}"
        if any(not self.one.beyond(node) for node in there):
            return None
        amounts = " and ".join(f"{needed:g} {unit}" for unit, needed in zip(_UNITS, self.one, strict=True) if needed)
        return f"each replica or training worker needs {amounts} on one node, and no node of Ray's has that"
