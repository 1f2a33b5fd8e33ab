"""Everything a training run needs to go on as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

STUDENT = "student"
_STATE = "trainer.pt"
_OPTIMIZER = "optimizer.pt"
# Not the device they were saved from: all workers of a node would load the first one's onto its GPU.
_ON_LOAD = "cpu"


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands; `step` optimizer steps are done."""

    step: int = 0
    best_score: float = -math.inf
    """Of the metric that the kept student is chosen by."""
    best_step: int = 0
    validations_without_best: int = 0
    """Validations since the best one: the early-stopping counter."""


def save(
    folder: Path,
    progress: Progress,
    trained: Sequence[torch.Tensor] | None,
    average: Sequence[torch.Tensor] | None = None,
    start: Sequence[torch.Tensor] | None = None,
) -> None:
    """Write what a checkpoint has beside `student/`, the student as it would be deployed, and the optimizer's state.

    `trained` are the weights that training goes on from, when the student holds others or has adapters merged;
    `average` is their average, when the student does not hold it; `start` is what training started from, when the
    student is chosen between it and the rest.
    """
    weights = {"trained": trained, "average": average, "start": start}
    state = {name: None if value is None else list(value) for name, value in weights.items()}
    state["progress"] = asdict(progress)
    torch.save(state, folder / _STATE)


def load(
    folder: Path,
    trained: Sequence[torch.Tensor],
    average: Sequence[torch.Tensor] | None = None,
    start: Sequence[torch.Tensor] | None = None,
) -> Progress:
    """Restore progress, and in place the weights that `save` was given.

    The caller made the student, from the checkpoint's folder unless that has adapters merged, and the others of it.
    """
    state = torch.load(folder / _STATE, weights_only=True, map_location=_ON_LOAD)
    with torch.no_grad():
        for name, weights in {"trained": trained, "average": average, "start": start}.items():
            if state[name] is not None:
                torch._foreach_copy_(list(weights), state[name])
    return Progress(**state["progress"])


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    torch.save(optimizer.state_dict(), folder / _OPTIMIZER)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(torch.load(folder / _OPTIMIZER, weights_only=True, map_location=_ON_LOAD))
