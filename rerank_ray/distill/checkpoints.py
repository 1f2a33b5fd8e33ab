"""Everything a training run needs to go on as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

STUDENT = "student"
_STATE = "trainer.pt"


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
    student,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    trained: Sequence[torch.Tensor] | None,
    average: Sequence[torch.Tensor] | None,
) -> None:
    """Write a checkpoint: `student/` as it would be deployed, and the trainer's state beside it.

    `trained` are the weights that training goes on from, when the student holds their average or has adapters merged;
    `average` is their average, when the student has adapters merged.
    """
    student.save(folder / STUDENT)
    state = {
        "trained": None if trained is None else list(trained),
        "average": None if average is None else list(average),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(state, folder / _STATE)


def load(folder: Path, student, optimizer: torch.optim.Optimizer, average: Sequence[torch.Tensor] | None) -> Progress:
    """Restore weights, optimizer and random state from a checkpoint.

    The caller made the student, from the checkpoint's folder unless that has adapters merged, and `average` of it.
    """
    state = torch.load(folder / _STATE, weights_only=True)
    if state["trained"] is not None:
        with torch.no_grad():
            torch._foreach_copy_([p for p in student.parameters() if p.requires_grad], state["trained"])
    if state["average"] is not None:
        torch._foreach_copy_(list(average), state["average"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return Progress(**state["progress"])
