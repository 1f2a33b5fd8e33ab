"""Listwise softmax cross-entropy on hard labels (Gao et al. 2021, LCE, when a group has one positive)."""

from __future__ import annotations

import torch

from rerank_ray.losses.masking import masked_log_softmax


def softmax_cross_entropy(scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over a query's positives of −log softmax(scores) at the positive.

    Args:
        scores: [Q, C]; positives: [Q, C] bool; mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a query without a positive.
    """
    positives = positives & mask
    log_p = masked_log_softmax(scores, mask)
    return -torch.where(positives, log_p, 0.0).sum(-1) / positives.sum(-1).clamp(min=1)
