"""Masked arithmetic that every loss shares."""

from __future__ import annotations

import torch

_NEGATIVE = -1e30


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, in which every loss is computed; float64 stays (finite differences need it)."""
    return values if values.dtype == torch.float64 else values.float()


def masked_logsumexp(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log Σ exp(scores) over the last dimension where the mask holds; about −1e30, without gradient, if nowhere."""
    return at_least_float32(scores).masked_fill(~mask, _NEGATIVE).logsumexp(-1)


def masked_log_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the unmasked candidates of each row [Q, C]; 0 where masked."""
    log_p = torch.log_softmax(at_least_float32(scores).masked_fill(~mask, _NEGATIVE), dim=-1)
    return log_p.masked_fill(~mask, 0.0)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the values [Q, …] where the mask, of the same shape, holds; 0 for a query where it holds nowhere."""
    count = mask.flatten(1).sum(1).clamp(min=1)
    return torch.where(mask, values, 0.0).flatten(1).sum(1) / count


def masked_zscore(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values [Q, C] with mean 0 and population deviation 1 within each row; all 0 where they do not differ."""
    values = at_least_float32(values)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    centred = torch.where(mask, values, 0.0)
    centred = torch.where(mask, centred - centred.sum(-1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    # The deviation of equal values need not be 0: their mean is rounded.
    lowest = values.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    highest = values.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return torch.where(highest > lowest, centred / deviation.clamp(min=1e-12), 0.0)


def differ(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whether a row [Q, C] holds two unmasked values that are not the same: [Q] bool."""
    return values.masked_fill(~mask, -torch.inf).amax(-1) > values.masked_fill(~mask, torch.inf).amin(-1)


def pairs(mask: torch.Tensor) -> torch.Tensor:
    """Whether i and j are two real candidates of a row [Q, C]: [Q, C, C] bool, False on the diagonal."""
    apart = ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask[:, :, None] & mask[:, None, :] & apart


def ranks(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Ranks [Q, C] from 1, highest value first; equal values share the mean of their ranks, masked candidates have 0.

    No order among equals has to be made up, so a loss on these ranks does not depend on the candidates' order.
    """
    other = mask[:, None, :]
    above = ((values[:, None, :] > values[:, :, None]) & other).sum(-1)
    equal = ((values[:, None, :] == values[:, :, None]) & other).sum(-1)
    return torch.where(mask, above + (equal + 1) / 2, 0.0)
