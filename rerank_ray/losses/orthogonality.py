"""The regulariser of multi-view students: each view of a query has to look another way (MVP)."""

from __future__ import annotations

import torch

from rerank_ray.losses.masking import at_least_float32


def orthogonality(views: torch.Tensor) -> torch.Tensor:
    """‖V Vᵀ − I‖² (Frobenius) of the views, each scaled to length 1: 0 when they are orthogonal.

    Args:
        views: [Q, V, H], one embedding a view.

    Returns:
        [Q]; V² − V when all views are the same.
    """
    views = torch.nn.functional.normalize(at_least_float32(views), dim=-1)
    gram = views @ views.transpose(1, 2)
    return (gram - torch.eye(views.shape[1], dtype=gram.dtype, device=gram.device)).square().sum((1, 2))
