"""How many tokens a model has positions for."""

from __future__ import annotations

from transformers import PreTrainedModel

from rerank_ray.errors import ModelError


def first_position(model: PreTrainedModel) -> int:
    """The number that an encoder gives a sequence's first token."""
    # RoBERTa's kind counts positions from the padding token's id + 1, and marks that in its position embeddings.
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding_position = getattr(positions, "padding_idx", None)
    return 0 if padding_position is None else padding_position + 1


def check_positions(model: PreTrainedModel, max_length: int, path: str) -> None:
    """Raise `ModelError` where sequences of `max_length` tokens, special tokens included, have no positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # XLNet, which has no such table, says -1.
    if positions is None or positions < 0:
        return
    limit = positions - first_position(model)
    if max_length > limit:
        raise ModelError(f"{path}: max_length is {max_length}, but the model ends at {limit} tokens")
