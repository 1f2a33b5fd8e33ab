"""Masked arithmetic that every loss shares."""

from __future__ import annotations

import torch

_NEGATIVE = -1e30


def masked_log_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the unmasked candidates of each row [Q, C]; 0 where masked."""
    log_p = torch.log_softmax(scores.float().masked_fill(~mask, _NEGATIVE), dim=-1)
    return log_p.masked_fill(~mask, 0.0)


def masked_zscore(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values [Q, C] with mean 0 and population deviation 1 within each row; all 0 where they do not differ."""
    values = values.float()
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    centred = torch.where(mask, values, 0.0)
    centred = torch.where(mask, centred - centred.sum(-1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    # The deviation of equal values need not be 0: their mean is rounded.
    lowest = values.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    highest = values.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return torch.where(highest > lowest, centred / deviation.clamp(min=1e-12), 0.0)
