"""Errors a user can mend: each names what is wrong, where, and the fix. The command line prints just the message."""

from __future__ import annotations

from collections.abc import Sequence


class RerankRayError(Exception):
    """Base of every error that a user's input, config or environment can cause."""


class ConfigError(RerankRayError):
    """A config file, override or argument that can't be run as it stands."""


class InputError(RerankRayError):
    """An input file that can't be read or breaks the contract."""


class RowError(RerankRayError):
    """One row that breaks the contract, or that a teacher failed on; jobs turn it into an output row with `error`.

    `defects`, of `rerank_ray.records`, are what was wrong with the teacher's answers: rates count them beside those of
    rows that could be scored.
    """

    def __init__(self, message: str, defects: Sequence = ()) -> None:
        super().__init__(message)
        self.defects = tuple(defects)


class ModelError(RerankRayError):
    """A model that can't be found, loaded, or asked for what a method needs."""


class UnavailableError(ModelError):
    """A model that no call can reach, or that refuses every one alike: no fault of a row."""


class LostError(UnavailableError):
    """A model that this process can't run any more, and another one could: its GPU or its engine is lost."""


class RunError(RerankRayError):
    """A run that can't be started, resumed or accounted for."""
