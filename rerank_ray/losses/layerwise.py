"""Self-distillation between layers: the last layer teaches the earlier ones (Zhang et al. 2019)."""

from __future__ import annotations

import torch

from rerank_ray.losses.divergence import kl


def self_distillation(layer_scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Σ over earlier layers of KL(softmax(s_last) ‖ softmax(s_layer)), the last layer's gradient stopped.

    Args:
        layer_scores: [layers, Q, C], ascending; mask: [Q, C], True for real candidates.

    Returns:
        [Q]; 0 for a single layer.
    """
    last = layer_scores[-1].detach()
    terms = [kl(scores, last, mask) for scores in layer_scores[:-1]]
    return torch.stack(terms).sum(0) if terms else torch.zeros(mask.shape[0], device=mask.device)
