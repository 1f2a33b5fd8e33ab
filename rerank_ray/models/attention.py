"""Gated attention: an additive bias on attention between the two segments of a pair.

Registered with transformers as the attention implementation `rerank_ray_gated`, so that every backbone which goes
through its attention interface can be gated without a line of its own.
"""

from __future__ import annotations

import torch
from torch import nn

from rerank_ray.models.packing import register_packed
from rerank_ray.models.plain_attention import attention, is_taken_apart

GATED = "rerank_ray_gated"


def width_multiple(device: torch.device) -> int:
    """Of what a head's width must be a multiple: CUDA's fused kernels that take a mask want 8 in 16-bit types."""
    return 8 if device.type == "cuda" else 1


def gated_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    gate: torch.Tensor,
    segment_sign: torch.Tensor,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention with `gate[layer, head]` added wherever query and key lie in different segments.

    Args:
        query, key, value: [B, H, L, D].
        attention_mask: [B, 1, L, L] bool, True where attention is allowed, or None.
        gate: [layers, H] biases β.
        segment_sign: [B, L], +1 in the first segment and −1 in the second.

    Returns:
        [B, L, H, D].

    With signs s, β·[s_i ≠ s_j] = β/2 − (β/2)·s_i·s_j. The constant drops out of the softmax and the product is one more
    dimension of query and key, so the bias needs no [B, H, L, L] tensor and has a gradient in every fused kernel.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sign = segment_sign[:, None, :, None].to(query.dtype).expand(-1, query.shape[1], -1, 1)
    beta = gate[module.layer_idx].to(query.dtype)[None, :, None, None]
    query = torch.cat([query, sign * (beta * (-0.5 / scale))], dim=-1)
    key = torch.cat([key, sign], dim=-1)
    head_dim = value.shape[-1]
    if not is_taken_apart(query):
        # Fused kernels want all three of one width; zeros change no product.
        unused = -(head_dim + 1) % width_multiple(query.device)
        query, key, value = _widened(query, unused), _widened(key, unused), _widened(value, 1 + unused)
    output = attention(query, key, value, attention_mask, scale=scale, dropout=dropout)
    return output[..., :head_dim].transpose(1, 2), None


def _widened(states: torch.Tensor, by: int) -> torch.Tensor:
    # Padding by nothing would be a copy.
    return nn.functional.pad(states, (0, by)) if by else states


register_packed(GATED, gated_attention)
