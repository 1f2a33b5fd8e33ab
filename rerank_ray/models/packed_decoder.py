"""A decoder's sequences end to end without padding, each behind the prefix that it shares with others, if any.

Of a batch only attention sees the sequences apart, and adds the keys and values of prefixes, which are there already.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rerank_ray.models import engine
from rerank_ray.models.packing import Packing
from rerank_ray.models.plain_attention import attention, is_taken_apart
from rerank_ray.models.prefixes import Prefixes

_PACKED = "rerank_ray_packed_decoder"
PACKABLE_DECODERS = ("gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2")
"""Model types that take a token's position from `position_ids` alone, and hand on to attention what they are given."""


def make_packable(model: PreTrainedModel, max_length: int) -> bool:
    """Let a decoder take `CausalPacking.inputs`, if it can: its architecture is known, its attention PyTorch's, and no
    layer's window is shorter than the `max_length` of its sequences."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if config.model_type not in PACKABLE_DECODERS or config._attn_implementation != "sdpa":
        return False
    if window is not None and window < max_length:
        return False
    model.set_attn_implementation(_PACKED)
    return True


class CausalPacking:
    """One batch, of B sequences of at most L tokens."""

    def __init__(self, sequences: Sequence[Sequence[int]], model: PreTrainedModel, *, keep: bool = False) -> None:
        """Args:
        sequences: the tokens to compute of each sequence.
        keep: also keep the keys and values that are computed, as `kept`.
        """
        self._lengths = [len(s) for s in sequences]
        self._tokens = [token for s in sequences for token in s]
        self._device, self._dtype = model.device, model.dtype
        width = engine.padded_length(max(self._lengths), None)
        mask = torch.arange(width) < torch.tensor(self._lengths)[:, None]
        places = mask.flatten().nonzero()[:, 0]
        self._packing = Packing(places=places.to(self._device), mask=mask.to(self._device), multiple=16)
        self._prefixes: DynamicCache | None = None
        self._shared = torch.zeros(len(sequences), dtype=torch.long)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] | None = [] if keep else None

    def behind(self, prefixes: Prefixes, rows: Sequence[int]) -> None:
        """Put each sequence behind one of the prefixes, by its index."""
        index = torch.tensor(rows, device=self._device)
        self._prefixes = prefixes.cache(index)
        self._shared = prefixes.lengths[index].cpu()

    def inputs(self) -> dict[str, object]:
        """A model's arguments."""
        ids, positions = torch.zeros(2, 1, self._packing.rows, dtype=torch.long)
        ids[0, : len(self._tokens)] = torch.tensor(self._tokens)
        counted = [range(s, s + n) for s, n in zip(self._shared.tolist(), self._lengths, strict=True)]
        positions[0, : len(self._tokens)] = torch.tensor([p for span in counted for p in span])
        return {
            "input_ids": ids.to(self._device),
            "position_ids": positions.to(self._device),
            # Of four dimensions, so that the model leaves it as it is.
            "attention_mask": self._bias(),
            "use_cache": False,
            "packing": self,
        }

    def places(self, wanted: Sequence[range]) -> list[int]:
        """Where the wanted positions of each sequence stand in the row, sequence after sequence."""
        starts = itertools.accumulate(self._lengths[:-1], initial=0)
        return [start + position for start, span in zip(starts, wanted, strict=True) for position in span]

    def _bias(self) -> torch.Tensor:
        """[B or 1, 1, L, P + L] to add to the products of queries and keys, of which the first P are the prefixes'."""
        front = int(self._shared.max())
        width = self._packing.mask.shape[1]
        columns = torch.arange(front + width)
        allowed = (columns <= front + torch.arange(width)[:, None])[None, None]
        if self._shared.min() < front:
            allowed = allowed & (columns >= front - self._shared[:, None])[:, None, None]
        bias = torch.zeros(allowed.shape, dtype=self._dtype).masked_fill(~allowed, torch.finfo(self._dtype).min)
        return bias.to(self._device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            query: [1, H, T, D], packed.
            key, value: [1, K, T, D], packed; H is a multiple of K.
            bias: of `inputs`.

        Returns:
            [1, T, H, D], packed.
        """
        query, key, value = (self._packing.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
        if self.kept is not None:
            self.kept.append((key, value))
        if self._prefixes is not None:
            cached = self._prefixes.layers[layer]
            key, value = torch.cat([cached.keys, key], 2), torch.cat([cached.values, value], 2)
        elif not is_taken_apart(query):
            output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
            return self._packing.pack(output.transpose(1, 2))
        return self._packing.pack(attention(query, key, value, bias, scale=scale).transpose(1, 2))


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    packing: CausalPacking | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return packing.attend(module.layer_idx, query, key, value, attention_mask, scaling), None


AttentionInterface.register(_PACKED, _attention)
AttentionMaskInterface.register(_PACKED, sdpa_mask)
