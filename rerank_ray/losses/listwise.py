"""The likelihood of the target's list: ListNet, ListMLE, and ListMLE cut off after the hardest negatives (CPRD)."""

from __future__ import annotations

import torch

from rerank_ray.losses.masking import at_least_float32, masked_log_softmax, masked_logsumexp, ranks


def listnet(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """−Σ softmax(targets/T) · log softmax(scores/T): ListNet's top-one cross-entropy (Cao et al. 2007).

    Its gradient is that of `kl` over T²; its least value is the targets' entropy, not 0.

    Args:
        scores, targets: [Q, C]; mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a single candidate.
    """
    probability = masked_log_softmax(torch.where(mask, at_least_float32(targets), 0.0) / temperature, mask).exp()
    log_student = masked_log_softmax(at_least_float32(scores) / temperature, mask)
    return -torch.where(mask, probability * log_student, 0.0).sum(-1)


def listmle(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """−log of the Plackett–Luce likelihood of the target's order (Xia et al. 2008): −Σ_k [s_k − log Σ_{l ≥ k} e^{s_l}].

    Equal targets have no order to be likely: each of them competes with all that are not above it (Breslow's treatment
    of ties), so that the loss does not depend on the order they come in.

    Args:
        scores, targets: [Q, C]; only the order of the targets counts. mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a single candidate.
    """
    return torch.where(mask, _surprises(scores, targets, mask), 0.0).sum(-1)


def position_aware_listmle(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ListMLE whose k-th of K terms weighs 2^{K−k} − 1, over the sum of the weights (Lan et al. 2014, p-ListMLE).

    Without that sum a list of 100 would weigh 2^90 times one of 10.

    Args:
        scores, targets: [Q, C]; only the order of the targets counts. mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a single candidate.
    """
    length = mask.sum(-1, keepdim=True)
    # 2^{−k} − 2^{−K} is the weight over 2^K, which no list is too long for.
    weight = torch.where(mask, torch.exp2(-ranks(targets, mask)) - torch.exp2(-length.float()), 0.0)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight * torch.where(mask, _surprises(scores, targets, mask), 0.0)).sum(-1)


def partial_listmle(
    scores: torch.Tensor,
    targets: torch.Tensor,
    positives: torch.Tensor,
    mask: torch.Tensor,
    cutoff: int | None = None,
) -> torch.Tensor:
    """Mean ListMLE term of the `cutoff` hardest negatives: contrastive partial ranking distillation, CPRD (Chen et al.
    2024).

    Negatives are ordered by the target; those below the cut-off, whose order a teacher is taken not to know, stay in
    every denominator but are not ordered among themselves. Equal ones are ordered if the first of their ranks is within
    the cut-off, so that the hardest always are. Positives take no part: another loss puts them first.

    Args:
        scores, targets: [Q, C]; positives: [Q, C] bool; mask: [Q, C], True for real candidates.
        cutoff: how many negatives are ordered, and those that equal the last of them; None orders all.

    Returns:
        [Q]; 0 for fewer than two negatives.
    """
    negatives = mask & ~positives
    above = ((targets[:, None, :] > targets[:, :, None]) & negatives[:, None, :]).sum(-1)
    ordered = negatives if cutoff is None else negatives & (above < cutoff)
    total = torch.where(ordered, _surprises(scores, targets, negatives), 0.0).sum(-1)
    return total / ordered.sum(-1).clamp(min=1)


def _surprises(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """−log of the probability that each candidate is drawn first from those whose target is not above its: [Q, C]."""
    scores = at_least_float32(scores)
    rivals = (targets[:, None, :] <= targets[:, :, None]) & mask[:, None, :]
    return masked_logsumexp(scores[:, None, :].expand(-1, scores.shape[1], -1), rivals) - scores
