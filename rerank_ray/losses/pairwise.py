"""RankNet (Burges et al. 2005): on the pairs' order, on the teacher's confidence in it, and weighted by rank."""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from rerank_ray.losses.masking import at_least_float32, masked_mean, pairs, ranks


def ranknet(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over pairs with target_i > target_j of log(1 + exp(−(s_i − s_j))).

    Args:
        scores, targets: [Q, C]; only the order of the targets counts, so scores, negated ranks and gains all serve.
        mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a query whose targets are all alike.
    """
    return masked_mean(softplus(-_differences(scores)), _preferred(targets, mask))


def weighted_ranknet(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """RankNet as a weighted mean over its pairs, with weight 1/(r_i + r_j): the head of the list counts most.

    The weighting of FIRST (Reddy et al. 2024), divided by the sum of the weights, so that lists of any length weigh
    alike.

    Args:
        scores, targets: [Q, C]; r is the target's rank, from 1. mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a query whose targets are all alike.
    """
    rank = ranks(targets, mask)
    preferred = _preferred(targets, mask)
    weight = torch.where(preferred, 1.0 / (rank[:, :, None] + rank[:, None, :]), 0.0)
    total = (weight * softplus(-_differences(scores))).sum((1, 2))
    return total / weight.sum((1, 2)).clamp(min=torch.finfo(weight.dtype).tiny)


def soft_ranknet(
    scores: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Mean over pairs of the cross-entropy of σ((s_i − s_j)/T) to the teacher's σ((t_i − t_j)/T).

    Args:
        scores, teacher: [Q, C]; mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for fewer than two candidates. A pair that the teacher holds equal costs log 2 at least.
    """
    difference = _differences(scores) / temperature
    preference = torch.sigmoid(_differences(teacher) / temperature)
    return masked_mean(preference * softplus(-difference) + (1 - preference) * softplus(difference), pairs(mask))


def _differences(values: torch.Tensor) -> torch.Tensor:
    """Value i minus value j: [Q, C, C]."""
    values = at_least_float32(values)
    return values[:, :, None] - values[:, None, :]


def _preferred(targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whether the target of i is above that of j: [Q, C, C] bool."""
    return (targets[:, :, None] > targets[:, None, :]) & pairs(mask)
