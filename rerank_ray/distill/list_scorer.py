"""A step's lists to scores, micro-batch after micro-batch: what a data-parallel wrapper sees of a student."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rerank_ray.models import engine
from rerank_ray.models.student import Student


class ListScorer(nn.Module):
    """Scores lists from micro-batches in one forward call, so that DDP sees one forward before each backward."""

    def __init__(self, student: Student, autocast: Callable[[], torch.autocast]) -> None:
        super().__init__()
        self.student, self._autocast = student, autocast

    def forward(
        self, batches: list[tuple[torch.Tensor, dict]], sizes: Sequence[int], cached: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores [layers, pairs] of lists of these `sizes`, in the pairs' order, and the lists' views.

        With `cached`, nothing of a micro-batch is kept but its output. Backward, which has the objective's gradient on
        the outputs by then, computes each micro-batch again, with the dropout it had, and frees it before the next one:
        gradient caching (Gao et al. 2021, GradCache) by way of torch's checkpointing.
        """
        order = torch.cat([indices for indices, _ in batches])
        if cached:
            parts = [checkpoint(self._output, inputs, use_reentrant=False) for _, inputs in batches]
        else:
            parts = [self._output(inputs) for _, inputs in batches]
        outputs = torch.cat(parts, dim=1)
        # Idle copies have the last places.
        places = torch.argsort(order)[: sum(sizes)]
        with self._autocast():
            return self.student.scores(outputs[:, engine.moved(places, outputs.device)], sizes)

    def _output(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        # One positional argument: checkpointing looks for the devices whose random state it restores in those alone.
        with self._autocast():
            return self.student(**inputs).float()
