"""Kullback–Leibler divergence between teacher and student score distributions (Hinton et al. 2015)."""

from __future__ import annotations

import torch

from rerank_ray.losses.masking import at_least_float32, masked_log_softmax


def kl(scores: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T² · KL(softmax(teacher/T) ‖ softmax(scores/T)) of each query.

    Args:
        scores, teacher: [Q, C]; mask: [Q, C], True for real candidates.
        temperature: T; the factor T² keeps the gradient's size independent of it.

    Returns:
        [Q], never negative.
    """
    log_student = masked_log_softmax(at_least_float32(scores) / temperature, mask)
    log_teacher = masked_log_softmax(torch.where(mask, at_least_float32(teacher), 0.0) / temperature, mask)
    terms = log_teacher.exp() * (log_teacher - log_student)
    return temperature**2 * torch.where(mask, terms, 0.0).sum(-1)
