"""Sequences end to end without padding: only attention sees them apart.

A layer's products, norms and activations are of each token alone, so they are computed over the real tokens of a batch
in one row. Attention puts the tokens back into their padded places for as long as it needs them there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rerank_ray.models.plain_attention import attention

PACKED = "rerank_ray_packed"
PACKABLE = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
"""Model types whose layers attend to the whole sequence and take a token's position from `position_ids` alone."""
_PACKED_ATTENTION: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where the real tokens of a padded batch [B, L] stand."""

    places: torch.Tensor
    """[T] indices into the batch's B·L places, ascending."""
    mask: torch.Tensor
    """[B, L] of real tokens, 1 or 0."""
    multiple: int = 64
    """Rows of packed tokens are a multiple of this, as kernels keep a compiled plan for each shape."""

    @property
    def rows(self) -> int:
        """T', of packed tokens."""
        return math.ceil(len(self.places) / self.multiple) * self.multiple

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] to [1, T', ...]: T real tokens, and zeros."""
        return _Move.apply(padded.flatten(0, 1), self.places, self.rows, True)[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, T', ...] to [B, L, ...] with zeros where padding was."""
        return _Move.apply(packed[0], self.places, self.mask.numel(), False).unflatten(0, self.mask.shape)

    def first(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, T', ...] to each sequence's first token [B, 1, ...]."""
        lengths = self.mask.sum(1)
        return packed[0].index_select(0, lengths.cumsum(0) - lengths)[:, None]

    def inputs(self, tokens: dict[str, torch.Tensor]) -> dict[str, object]:
        """A model's arguments for packed tokens, from padded [B, L] ones."""
        return {name: self.pack(tensor) for name, tensor in tokens.items()} | {"packing": self}


def is_packable(model: PreTrainedModel) -> bool:
    """Whether the model takes `packing`."""
    return _can_pack(model) and model.config._attn_implementation in _PACKED_ATTENTION


def make_packable(model: PreTrainedModel) -> None:
    """Let the model take `packing`, if its architecture can and its attention is PyTorch's."""
    if _can_pack(model) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(PACKED)


def _can_pack(model: PreTrainedModel) -> bool:
    # An encoder's architecture may be a decoder by its config, whose tokens don't see all others.
    return model.config.model_type in PACKABLE and not getattr(model.config, "is_decoder", False)


class _Move(torch.autograd.Function):
    """Rows of `places` to the front, or from there to their places; no two are alike, so that each is the other's
    gradient, where that of indexing would add them up, in 2.7 times the time on a CPU."""

    @staticmethod
    def forward(ctx, source: torch.Tensor, places: torch.Tensor, rows: int, to_front: bool) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.rows, ctx.to_front = len(source), to_front
        return (_gather if to_front else _scatter)(source, places, rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        (places,) = ctx.saved_tensors
        return (_scatter if ctx.to_front else _gather)(gradient, places, ctx.rows), None, None, None


def _gather(padded: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    packed = padded.new_empty(rows, *padded.shape[1:])
    torch.index_select(padded, 0, places, out=packed[: len(places)])
    packed[len(places) :] = 0
    return packed


def _scatter(packed: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    return packed.new_zeros(rows, *packed.shape[1:]).index_copy_(0, places, packed[: len(places)])


def register_packed(name: str, attention: Callable) -> None:
    """Register an attention function with transformers so that it also takes packed tokens, where the model is called
    with `packing`."""

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packing: Packing | None = None,
        **options,
    ) -> tuple[torch.Tensor, None]:
        if packing is None:
            return attention(module, query, key, value, attention_mask, **options)
        padded = (packing.unpack(side.transpose(1, 2)).transpose(1, 2) for side in (query, key, value))
        seen = packing.mask.bool()[:, None, None, :]
        output, weights = attention(module, *padded, seen, **options)
        return packing.pack(output), weights

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    _PACKED_ATTENTION.add(name)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options,
) -> tuple[torch.Tensor, None]:
    """transformers' call of `attention`, which knows no order: a causal layer, of a BERT that writes, has PyTorch's."""
    if getattr(module, "is_causal", False):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    output = attention(query, key, value, attention_mask, scale=scaling, dropout=dropout)
    return output.transpose(1, 2).contiguous(), None


register_packed(PACKED, _attention)
