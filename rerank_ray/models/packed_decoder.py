"""A decoder's sequences end to end without padding, each behind the prefix that it shares with others, if any.

Of a batch only attention sees the sequences apart, and adds the keys and values of prefixes, which are there already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rerank_ray.models import engine
from rerank_ray.models.acceleration import compiles_in_parts
from rerank_ray.models.last_token import compute_last_token_alone, computes_last_token_alone
from rerank_ray.models.packing import Packing
from rerank_ray.models.plain_attention import attention, is_taken_apart
from rerank_ray.models.prefixes import Prefixes
from rerank_ray.settings.models import TorchSettings

_PACKED = "rerank_ray_packed_decoder"
PACKABLE_DECODERS = ("gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2")
"""Model types that take a token's position from `position_ids` alone, and hand on to attention what they are given."""
_ROW_MULTIPLE = 16
_BLOCK = 64
"""Tokens that attend together."""


def make_packable(model: PreTrainedModel, max_length: int) -> bool:
    """Let a decoder take what `CausalPacking` gives, and say whether it can: its architecture is known, its attention
    PyTorch's, and no layer's window is shorter than the `max_length` of its sequences."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if config.model_type not in PACKABLE_DECODERS or config._attn_implementation != "sdpa":
        return False
    # A checkpoint's own code may have the name of an architecture that transformers has.
    if (window is not None and window < max_length) or not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(_PACKED)
    compute_last_token_alone(model)
    return is_packable(model)


def packs_in_scoring(model: PreTrainedModel, settings: TorchSettings) -> bool:
    """Make a loaded decoder packable where that was measured to be faster, and say whether it is: on CPUs, unless the
    whole is compiled."""
    compiles_whole = settings.compile and not compiles_in_parts(model)
    return not compiles_whole and model.device.type == "cpu" and make_packable(model, settings.max_length)


def is_packable(model: PreTrainedModel) -> bool:
    """Whether the model takes what `CausalPacking` gives."""
    return model.config._attn_implementation == _PACKED


def collate_packed(sequences: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """What a `CausalPacking` is made of: `input_ids` and `attention_mask` [B, L], padded, and `places` [T] of the
    tokens among the B·L."""
    ids, lengths = engine.right_pad(sequences, pad_id=0)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "places": mask.flatten().nonzero()[:, 0]}


def collate_padded(sequences: Sequence[Sequence[int]], limit: int | None) -> dict[str, torch.Tensor]:
    """`input_ids` [B, L], padded on the right, and `last` [B], the position that each sequence ends at.

    No mask is needed: a causal model's real tokens never see the padding on their right.
    """
    ids, lengths = engine.right_pad(sequences, pad_id=0, limit=limit)
    return {"input_ids": ids, "last": lengths - 1}


class CausalPacking:
    """One batch, of B sequences of at most L tokens."""

    def __init__(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        places: torch.Tensor,
        prefixes: DynamicCache | None = None,
        shared: torch.Tensor | None = None,
        keep: bool = False,
        last_alone: bool = False,
    ) -> None:
        """Take what `collate_packed` gives.

        Args:
            prefixes: keys and values [B, K, P, D] of each layer, of prefixes that end at the last column.
            shared: how many tokens each sequence's prefix has, [B], at most P.
            keep: also keep the keys and values that are computed, as `kept`.
            last_alone: the model's states are those of each sequence's last token, [1, B, H], and not of all; the
                model `computes_last_token_alone`.
        """
        self.last_alone = last_alone
        self._ids = input_ids
        self._packing = Packing(places=places, mask=attention_mask, multiple=_ROW_MULTIPLE)
        self._prefixes = prefixes
        self._shared = (
            torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device) if shared is None else shared
        )
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] | None = [] if keep else None

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int]],
        device: torch.device,
        prefixes: Prefixes | None = None,
        rows: Sequence[int] = (),
        *,
        keep: bool = False,
        last_alone: bool = False,
    ) -> CausalPacking:
        """Pack the tokens to compute of each sequence.

        Args:
            rows: which of the prefixes each sequence stands behind.
        """
        batch = {name: engine.moved(tensor, device) for name, tensor in collate_packed(sequences).items()}
        if prefixes is None:
            return cls(**batch, keep=keep, last_alone=last_alone)
        index = torch.tensor(rows, device=device)
        return cls(
            **batch,
            prefixes=prefixes.cache(index),
            shared=prefixes.lengths[index],
            keep=keep,
            last_alone=last_alone,
        )

    def inputs(self) -> dict[str, object]:
        """A model's arguments, of T' tokens in one row."""
        positions = self._shared[:, None] + torch.arange(self._ids.shape[1], device=self._ids.device)
        return {
            "input_ids": self._packing.pack(self._ids),
            "position_ids": self._packing.pack(positions),
            # Of four dimensions, so that the model leaves it as it is.
            "attention_mask": self._allowed(),
            "use_cache": False,
            "packing": self,
        }

    @property
    def starts(self) -> torch.Tensor:
        """Where each sequence's first token stands in the row, [B]."""
        lengths = self._packing.mask.sum(1)
        return lengths.cumsum(0) - lengths

    @property
    def ends(self) -> torch.Tensor:
        """Where each sequence's last token stands in the row, [B]."""
        return self._packing.mask.sum(1).cumsum(0) - 1

    def _allowed(self) -> torch.Tensor:
        """[B or 1, 1, L, P + L], True where a sequence's token may attend to a column, of which the first P are the
        prefix's."""
        width, device = self._ids.shape[1], self._ids.device
        tokens = torch.arange(width, device=device)[:, None]
        if self._prefixes is None:
            return (tokens >= tokens.T)[None, None]
        front = self._prefixes.get_seq_length()
        columns = torch.arange(front + width, device=device)
        causal = columns <= front + tokens
        return (causal & (columns >= front - self._shared[:, None, None]))[:, None]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            query: [1, H, T', D], packed.
            key, value: [1, K, T', D], packed; H is a multiple of K.
            allowed: of `inputs`.

        Returns:
            [1, T', H, D], packed.
        """
        query = self._unpacked(query)
        key, value = self._behind_prefixes(layer, key, value)
        if is_taken_apart(query):
            output = _by_blocks(query, key, value, allowed, scale, dropout)
        elif self._prefixes is None:
            output = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=True
            )
        else:
            output = attention(query, key, value, allowed, scale=scale, dropout=dropout)
        return self._packing.pack(output.transpose(1, 2))

    def attend_from_ends(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attention of one layer for each sequence's last token.

        Args:
            query: [1, H, B, D].
            key, value: [1, K, T', D], packed; H is a multiple of K.
            allowed: of `inputs`.

        Returns:
            [1, B, H, D].
        """
        key, value = self._behind_prefixes(layer, key, value)
        last = self._packing.mask.sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        allowed = allowed.expand(len(last), -1, -1, -1)[rows, :, last]
        output = attention(query.transpose(0, 2), key, value, allowed[:, :, None], scale=scale, dropout=dropout)
        return output.permute(2, 0, 1, 3)

    def _unpacked(self, states: torch.Tensor) -> torch.Tensor:
        """[1, H, T', D] to [B, H, L, D]."""
        return self._packing.unpack(states.transpose(1, 2)).transpose(1, 2)

    def _behind_prefixes(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, K, P + L, D] of packed ones, which are kept if that was asked for."""
        key, value = self._unpacked(key), self._unpacked(value)
        if self.kept is not None:
            self.kept.append((key, value))
        if self._prefixes is None:
            return key, value
        cached = self._prefixes.layers[layer]
        return torch.cat([cached.keys, key], 2), torch.cat([cached.values, value], 2)


def _by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """Causal attention [B, H, L, D] of L tokens behind others, as plain products without most of the columns that a
    block of tokens may not attend to."""
    length, width = query.shape[2], key.shape[2]
    blocks = []
    for start in range(0, length, _BLOCK):
        rows, columns = slice(start, start + _BLOCK), slice(width - length + min(start + _BLOCK, length))
        seen = key[:, :, columns], value[:, :, columns], allowed[..., rows, columns]
        blocks.append(attention(query[:, :, rows], *seen, scale=scale, dropout=dropout))
    return torch.cat(blocks, 2)


def inputs_and_ends(
    model: PreTrainedModel,
    *,
    input_ids: torch.Tensor,
    last: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    all_states: bool = False,
) -> tuple[dict[str, object], tuple]:
    """A decoder's arguments for what `collate_padded` or `collate_packed` gives, and the index of each sequence's last
    token in its states.

    Args:
        all_states: other layers' states are read too, and have the index that the last one's have.
    """
    every = torch.arange(len(input_ids), device=input_ids.device)
    if places is None:
        return {"input_ids": input_ids, "use_cache": False}, (every, last)
    alone = computes_last_token_alone(model) and not all_states
    packing = CausalPacking(input_ids=input_ids, attention_mask=attention_mask, places=places, last_alone=alone)
    return packing.inputs(), (0, every if alone else packing.ends)


def last_states(model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, packed: bool) -> torch.Tensor:
    """What a decoder without a head gives [B, H] at the last token of each sequence.

    Args:
        packed: the model `is_packable`.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    batch = collate_packed(sequences) if packed else collate_padded(sequences, limit)
    moved = {name: engine.moved(tensor, model.device) for name, tensor in batch.items()}
    inputs, ends = inputs_and_ends(model, **moved)
    return model(**inputs).last_hidden_state[ends]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: CausalPacking | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    return packing.attend(module.layer_idx, query, key, value, attention_mask, scale=scaling, dropout=dropout), None


AttentionInterface.register(_PACKED, _attention)
AttentionMaskInterface.register(_PACKED, sdpa_mask)
