"""Everything a training run needs to go on as if it had never stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

STUDENT = "student"
_STATE = "trainer.pt"


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands; `step` optimizer steps are done."""

    step: int = 0
    best_ndcg: float = -1.0
    best_step: int = 0
    validations_without_best: int = 0
    """Validations since the best one: the early-stopping counter."""


def save(folder: Path, student, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write a checkpoint: `student/` as it would be deployed, and the trainer's state beside it."""
    student.save(folder / STUDENT)
    state = {
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(state, folder / _STATE)


def load(folder: Path, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore optimizer and random state from a checkpoint; the student is loaded from its folder by the caller."""
    state = torch.load(folder / _STATE, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return Progress(**state["progress"])
