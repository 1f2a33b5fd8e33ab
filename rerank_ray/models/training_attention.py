"""Attention as training computes it on a CPU: plain matrix products, where scoring has a fused kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

_LONGEST_UNFUSED = 512


class _Setting:
    """Of all threads, as a backward pass computes layers again in another one.

    PyTorch's own setting says the same, but torch.compile can't look at it.
    """

    taken_apart = False


@contextmanager
def attention_for_training(device: torch.device, length: int) -> Iterator[None]:
    """On the CPU, attention as plain matrix products within: the fused kernel's backward pass takes longer there than
    the rest of a training step together. Sequences longer than 512 tokens keep it: their products take much memory."""
    if device.type != "cpu" or length > _LONGEST_UNFUSED:
        yield
        return
    before, allowed = _Setting.taken_apart, torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    # In bfloat16, as the fused kernel has it; otherwise the products are in float32. The setting is the CPU's too.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    _Setting.taken_apart = True
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _Setting.taken_apart = before
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def is_taken_apart(device: torch.device) -> bool:
    """Whether `attention_for_training` is in force."""
    return device.type == "cpu" and _Setting.taken_apart


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Scaled dot-product attention [B, H, L, D], every token to all, or to those that the mask allows.

    PyTorch's own, but while `attention_for_training` is in force. Its plain path looks for rows that may attend to
    nothing, in two more passes over the weights [B, H, L, L]; here such a row attends to all.

    Args:
        query, key, value: [B, H, L, D].
        mask: [B or 1, H or 1, L or 1, L], True where attention is allowed, or a bias; None allows all.
        scale: null is 1 / √D.
    """
    if not is_taken_apart(query.device):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)
        scores = scores + mask
    return nn.functional.dropout(scores.softmax(-1), dropout) @ value
