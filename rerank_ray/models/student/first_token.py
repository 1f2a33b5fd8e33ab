"""BERT's last layer for the first token alone: the other tokens' states there are read by nothing but that token.

Of MiniLM's six layers of 384 and 1,536 that is a seventh of the work of a pair of any length, forward and backward.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedModel

from rerank_ray.models.packing import PACKABLE, PACKED, Packing
from rerank_ray.models.plain_attention import attention
from rerank_ray.models.student.source import layers_of


def compute_first_token_alone(model: PreTrainedModel) -> None:
    """Let the last layer, and so the model, give states [B, 1, H] instead of [B, L, H], of packed tokens too, where
    layers are BERT's and attention PyTorch's."""
    config = model.config
    if config.model_type in PACKABLE and not config.is_decoder and config._attn_implementation in ("sdpa", PACKED):
        layer = layers_of(model)[-1]
        layer.forward = MethodType(_forward, layer)


def computes_first_token_alone(model: PreTrainedModel) -> bool:
    return getattr(layers_of(model)[-1].forward, "__func__", None) is _forward


def _forward(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *_: None,
    packing: Packing | None = None,
    **__: object,
) -> torch.Tensor:
    """BERT's layer, its query and all that follows from it cut to the first token of each sequence.

    Args:
        hidden_states: [B, L, H], or packed [1, T', H].
        attention_mask: [B, 1, L, L] of padded sequences.

    Returns:
        [B, 1, H].
    """
    self_attention = layer.attention.self
    key, value = self_attention.key(hidden_states), self_attention.value(hidden_states)
    if packing is None:
        first = hidden_states[:, :1]
        mask = None if attention_mask is None else attention_mask[:, :, :1]
    else:
        first = packing.first(hidden_states)
        key, value = packing.unpack(key), packing.unpack(value)
        mask = packing.mask.bool()[:, None, None, :]
    query, key, value = (
        states.unflatten(-1, (-1, self_attention.attention_head_size)).transpose(1, 2)
        for states in (self_attention.query(first), key, value)
    )
    dropout = self_attention.dropout.p if layer.training else 0.0
    attended = attention(query, key, value, mask, scale=self_attention.scaling, dropout=dropout)
    return layer.feed_forward_chunk(layer.attention.output(attended.transpose(1, 2).flatten(2), first))
