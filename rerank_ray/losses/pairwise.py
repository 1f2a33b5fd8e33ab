"""RankNet (Burges et al. 2005)."""

from __future__ import annotations

import torch
from torch.nn.functional import softplus


def ranknet(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over pairs with target_i > target_j of log(1 + exp(−(s_i − s_j))).

    Args:
        scores, targets: [Q, C]; only the order of the targets counts, so scores, negated ranks and gains all serve.
        mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a query whose targets are all alike.
    """
    scores = scores.float()
    difference = scores[:, :, None] - scores[:, None, :]
    better = (targets[:, :, None] > targets[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    total = torch.where(better, softplus(-difference), 0.0).sum((1, 2))
    return total / better.sum((1, 2)).clamp(min=1)
