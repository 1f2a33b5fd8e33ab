"""Pairwise losses weighted by what a swap costs in nDCG: LambdaRank and the LambdaLoss framework (Wang et al. 2018).

All are Σ over pairs with y_i > y_j of w_ij · log(1 + exp(−σ₀(s_i − s_j))), with G = (2^y − 1) / ideal DCG,
D_r = log₂(1 + r) and w from the student's current ranks, constant in the gradient. A negative gain counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import softplus

from rerank_ray.losses.masking import at_least_float32, pairs

_MU = 10.0


def lambdarank(scores: torch.Tensor, gains: torch.Tensor, mask: torch.Tensor, sigma: float = 1.0) -> torch.Tensor:
    """LambdaRank (Burges et al. 2006): w = |G_i − G_j| · |1/D_{r_i} − 1/D_{r_j}|, what swapping i and j does to nDCG.

    Args:
        scores, gains: [Q, C]; mask: [Q, C], True for real candidates.
        sigma: σ₀, the steepness of the logistic loss.

    Returns:
        [Q]; 0 for a query without a gain.
    """
    return _lambda_loss(scores, gains, mask, sigma, _swap)


def ndcg_loss2(scores: torch.Tensor, gains: torch.Tensor, mask: torch.Tensor, sigma: float = 1.0) -> torch.Tensor:
    """NDCG-Loss2: w = |G_i − G_j| · (1/D_d − 1/D_{d+1}) for ranks d apart, a tighter bound of nDCG than LambdaRank's.

    Args and result as of `lambdarank`.
    """
    return _lambda_loss(scores, gains, mask, sigma, _gap)


def ndcg_loss2pp(scores: torch.Tensor, gains: torch.Tensor, mask: torch.Tensor, sigma: float = 1.0) -> torch.Tensor:
    """NDCG-Loss2++: LambdaRank's weight plus ten times NDCG-Loss2's, ten being the paper's μ.

    Args and result as of `lambdarank`.
    """
    return _lambda_loss(scores, gains, mask, sigma, lambda i, j: _swap(i, j) + _MU * _gap(i, j))


def _swap(rank_i: torch.Tensor, rank_j: torch.Tensor) -> torch.Tensor:
    return (1 / torch.log2(1 + rank_i) - 1 / torch.log2(1 + rank_j)).abs()


def _gap(rank_i: torch.Tensor, rank_j: torch.Tensor) -> torch.Tensor:
    # On the diagonal, which is no pair, the distance is 0 and its discount would be a division by 0.
    distance = (rank_i - rank_j).abs().clamp(min=1)
    return 1 / torch.log2(1 + distance) - 1 / torch.log2(2 + distance)


def _lambda_loss(
    scores: torch.Tensor,
    gains: torch.Tensor,
    mask: torch.Tensor,
    sigma: float,
    discount: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    scores = at_least_float32(scores)
    gains = torch.where(mask, at_least_float32(gains), 0.0).clamp(min=0.0)
    rank = _current_ranks(scores.detach(), gains, mask)
    normalised = _normalised_gains(gains)
    weight = (normalised[:, :, None] - normalised[:, None, :]).abs() * discount(rank[:, :, None], rank[:, None, :])
    preferred = (gains[:, :, None] > gains[:, None, :]) & pairs(mask)
    loss = softplus(-sigma * (scores[:, :, None] - scores[:, None, :]))
    return torch.where(preferred, weight * loss, 0.0).sum((1, 2))


def _normalised_gains(gains: torch.Tensor) -> torch.Tensor:
    """(2^y − 1) / ideal DCG of gains [Q, C] that are 0 where masked; all 0 without a gain. No gain is too large."""
    highest = gains.amax(-1, keepdim=True)
    # Numerator and denominator are both scaled by 2^−highest; expm1 keeps the digits of small gains.
    exponential = -torch.expm1(-math.log(2) * gains) * torch.exp2(gains - highest)
    places = torch.arange(1, gains.shape[-1] + 1, device=gains.device, dtype=gains.dtype)
    ideal = (exponential.sort(-1, descending=True).values / torch.log2(1 + places)).sum(-1, keepdim=True)
    return torch.where(ideal > 0, exponential / ideal.clamp(min=torch.finfo(gains.dtype).tiny), 0.0)


def _current_ranks(scores: torch.Tensor, gains: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Ranks [Q, C] from 1 of the real candidates, highest score first; masked candidates come after them.

    Among equal scores the smaller gain comes first: a student that can't tell candidates apart has not ranked them, and
    their order in the input must not count.
    """
    by_gain = gains.argsort(dim=-1, stable=True)
    by_score = scores.masked_fill(~mask, -torch.inf).gather(-1, by_gain).argsort(dim=-1, descending=True, stable=True)
    return by_gain.gather(-1, by_score).argsort(dim=-1).to(scores.dtype) + 1
