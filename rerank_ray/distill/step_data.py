"""What a training step computes with: the sampled groups' pairs in micro-batches, and their targets, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rerank_ray.distill.targets import Targets
from rerank_ray.records import Labels

Group = tuple[Labels, Sequence[int]]
"""A query's labels, and the candidates that were sampled of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """Pairs batched by length, on the device."""

    batches: Sequence[tuple[torch.Tensor, dict[str, torch.Tensor]]]
    """Which pairs each has, and what the student takes of them."""
    sizes: Sequence[int]
    """Pairs of each query's list."""
    tokens: int
    positions: int
    """Tokens and the padding that is computed with them."""
    longest: int
    """Tokens of the longest pair."""

    @property
    def count(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The groups whose gradient one backward pass adds."""

    pairs: MicroBatches
    targets: Targets
    places: tuple[torch.Tensor, torch.Tensor]
    """Of each pair: its row and column in the targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """What one worker computes in one step."""

    groups: Sequence[Group]
    chunks: Sequence[Chunk]
    """All of the groups."""
    queries: int
    """Of the step, over all workers."""
    counts: bool
    """False for a worker without queries, which takes part with the data of another."""
