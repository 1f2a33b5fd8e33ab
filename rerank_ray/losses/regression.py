"""Losses on numbers rather than order: scores (MSE), their margins (Margin-MSE), and ranks (ADR-MSE)."""

from __future__ import annotations

import torch

from rerank_ray.losses.masking import at_least_float32, masked_mean, pairs, ranks


def mse(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over candidates of (s_i − t_i)²: the pointwise baseline that Margin-MSE was compared with (Hofstätter et al.
    2020). Squares pass float32 for errors above 1e19.

    Args:
        scores, targets: [Q, C]; mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a query without candidates.
    """
    return masked_mean((at_least_float32(scores) - at_least_float32(targets)).square(), mask)


def margin_mse(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of ((s_i − s_j) − (t_i − t_j))² (Hofstätter et al. 2020, whose triples are groups of two).

    Args:
        scores, targets: [Q, C]; mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for fewer than two candidates.
    """
    error = at_least_float32(scores) - at_least_float32(targets)
    return masked_mean((error[:, :, None] - error[:, None, :]).square(), pairs(mask))


def adr_mse(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean of (r_i − r̂_i)² / log₂(1 + r_i): approximate, discounted rank MSE (Schlatt et al. 2024, Rank-DistiLLM).

    r is the target's rank and r̂_i = 1 + Σ_{j≠i} σ((s_j − s_i)/T) the student's, made differentiable (Qin et al. 2010).

    Args:
        scores, targets: [Q, C]; only the order of the targets counts. mask: [Q, C], True for real candidates.
        temperature: T; the smaller, the closer r̂ is to the rank and the fewer pairs have a gradient.

    Returns:
        [Q]; 0 for a single candidate.
    """
    scores = at_least_float32(scores)
    beaten = torch.sigmoid((scores[:, None, :] - scores[:, :, None]) / temperature)
    approximate = 1 + torch.where(pairs(mask), beaten, 0.0).sum(-1)
    rank = ranks(targets, mask)
    # A masked candidate has rank 0, whose discount would be a division by 0.
    discount = torch.log2(1 + rank.clamp(min=1))
    return masked_mean((rank - approximate).square() / discount, mask)
