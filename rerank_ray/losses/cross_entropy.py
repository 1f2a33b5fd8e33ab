"""Cross-entropy on hard labels: over the list (softmax), over a positive's own group (LCE), or of each candidate."""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from rerank_ray.losses.masking import at_least_float32, masked_log_softmax, masked_logsumexp, masked_mean


def softmax_cross_entropy(scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over a query's positives of −log softmax(scores) at the positive (listwise softmax, Bruch et al. 2019).

    Args:
        scores: [Q, C]; positives: [Q, C] bool; mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a query without a positive.
    """
    return masked_mean(-masked_log_softmax(scores, mask), positives & mask)


def localized_contrastive(scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """LCE (Gao et al. 2021): mean over positives p of −log e^{s_p} / (e^{s_p} + Σ over the negatives e^{s_n}).

    Each positive stands alone in a group of the query's negatives: unlike in `softmax_cross_entropy`, positives do not
    push each other down. With one positive the two are the same.

    Args:
        scores: [Q, C]; positives: [Q, C] bool; mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a query without a positive or without a negative.
    """
    negatives = masked_logsumexp(scores, mask & ~positives)[:, None]
    return masked_mean(softplus(negatives - at_least_float32(scores)), positives & mask)


def binary_cross_entropy(scores: torch.Tensor, positives: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pointwise: mean over candidates of −log σ(s) at positives and −log σ(−s) elsewhere (Nogueira and Cho 2019).

    Args:
        scores: [Q, C]; positives: [Q, C] bool; mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a query without candidates.
    """
    scores = at_least_float32(scores)
    return masked_mean(softplus(torch.where(positives, -scores, scores)), mask)
