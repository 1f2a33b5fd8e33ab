"""Attention as plain matrix products, where PyTorch's fused kernel for CPUs is the slower one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rerank_ray.models.engine import computes_bfloat16, multiplies_tiles

_CPU = torch.device("cpu")
_LONGEST_IN_TRAINING, _LONGEST_IN_SCORING = 512, 256
"""Tokens of a sequence above which the products take much memory, or as long as the fused kernel."""
_WEIGHTS_IN_CACHE = 2**20
"""Bytes of attention weights that a core's cache holds: in scoring, so many are computed at a time."""
_FUSED_IS_SLOWER = computes_bfloat16(_CPU) and not multiplies_tiles(_CPU)
"""In scoring, in bfloat16; with AMX it was not measured."""


class _Setting:
    """Of all threads, as a backward pass computes layers again in another one.

    PyTorch's own setting says the same, but torch.compile can't look at it.
    """

    taken_apart = False


@contextmanager
def attention_for_training(device: torch.device, length: int) -> Iterator[None]:
    """On the CPU, attention as plain matrix products within: the fused kernel's backward pass takes longer there than
    the rest of a training step together. Sequences longer than 512 tokens keep it: their products take much memory."""
    if device.type != "cpu" or length > _LONGEST_IN_TRAINING:
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


def is_taken_apart(query: torch.Tensor) -> bool:
    """Whether `attention` of such a query [B, H, L, D] is plain products: while `attention_for_training` is in force,
    and of short sequences where they are faster."""
    if query.device.type != "cpu":
        return False
    is_short = query.shape[-2] <= _LONGEST_IN_SCORING
    return _Setting.taken_apart or (_FUSED_IS_SLOWER and query.dtype == torch.bfloat16 and is_short)


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

    PyTorch's own, but where it `is_taken_apart`. PyTorch's plain path looks for rows that may attend to nothing, in two
    more passes over the weights [B, H, L, L]; here such a row attends to all.

    Args:
        query: [B, H, L, D].
        key, value: [B, K, S, D]; H is a multiple of K, and as many heads of queries in a row share one of keys.
        mask: [B or 1, H or 1, L or 1, S], True where attention is allowed, or a bias; None allows all.
        scale: null is 1 / √D.
    """
    if not is_taken_apart(query):
        shares = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=shares
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    sequences = len(query)
    if not (query.requires_grad or torch.compiler.is_compiling()):
        one = query[0, :, :, 0].numel() * key.shape[2] * query.element_size()
        sequences = max(1, _WEIGHTS_IN_CACHE // one)
    if sequences >= len(query):
        return _products(query, key, value, mask, scale, dropout)
    parts = [slice(start, start + sequences) for start in range(0, len(query), sequences)]
    of_all = mask is None or mask.dim() < 4 or len(mask) == 1
    masks = [mask if of_all else mask[part] for part in parts]
    return torch.cat(
        [
            _products(query[part], key[part], value[part], own, scale, dropout)
            for part, own in zip(parts, masks, strict=True)
        ]
    )


def _products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    shape = query.shape
    # Heads that share keys are rows of one product.
    query = query.reshape(key.shape[0] * key.shape[1], -1, shape[-1])
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    # One product, scaled as it is written; what it could be added to is left out by beta.
    nothing = query.new_zeros(1, 1, 1)
    scores = torch.baddbmm(nothing, query, key.transpose(1, 2), beta=0, alpha=scale).view(*shape[:3], -1)
    if mask is not None:
        if mask.dtype == torch.bool:
            lowest = torch.finfo(scores.dtype).min
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)
        scores.add_(mask)
    weights = nn.functional.dropout(scores.softmax(-1), dropout)
    return (weights.view(len(key), -1, weights.shape[-1]) @ value).view(*shape[:3], -1)
