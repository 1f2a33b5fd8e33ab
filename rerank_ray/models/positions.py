"""Which tokens a model can place, and which ones a token sees."""

from __future__ import annotations

import math

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rerank_ray.errors import ModelError


def first_position(model: PreTrainedModel) -> int:
    """The number that an encoder gives a sequence's first token."""
    # RoBERTa's kind counts positions from the padding token's id + 1, and marks that in its position embeddings.
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding_position = getattr(positions, "padding_idx", None)
    return 0 if padding_position is None else padding_position + 1


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions, padding's included, a batch may have; None where there is no end to them."""
    limit = min(_rotated_alike(model), _numbered(model))
    return None if math.isinf(limit) else int(limit)


def check_positions(model: PreTrainedModel, max_length: int, path: str) -> None:
    """Raise `ModelError` where sequences of `max_length` tokens, special tokens included, have no positions, or others
    than they would have by themselves."""
    if max_length > (limit := _rotated_alike(model)):
        raise ModelError(
            f"{path}: max_length is {max_length}, but beyond {limit} tokens LongRoPE rotates the positions of a whole "
            f"batch otherwise, so that a score would hang on what it is computed with: set max_length to {limit}"
        )
    limit = _numbered(model) - first_position(model)
    if max_length > limit:
        raise ModelError(f"{path}: max_length is {max_length}, but the model ends at {limit} tokens")


def check_causal(model: PreTrainedModel, name: str, instead: str) -> None:
    """Raise `ModelError` for a model whose tokens see those on their right: they would see padding, where causal ones
    need no mask for it, and what prompts share would not be the same in each. Encoders with a language model's head
    (BERT's kind, which may be run as decoders, and XLNet) are such.

    Args:
        instead: what such a model can be.
    """
    config = model.config.get_text_config()
    runs_as_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not runs_as_decoder
    if is_encoder or config.model_type == "xlnet":
        raise ModelError(
            f"{name}: the tokens of {config.model_type} see those on their right, and only a causal decoder's last "
            f"token can be read here: {instead}"
        )
    for key, looks_both_ways in (("is_causal", (False,)), ("use_bidirectional_attention", (True, "all"))):
        if getattr(config, key, None) in looks_both_ways:
            raise ModelError(
                f"{name}: with {key}: {getattr(config, key)} in its config its tokens see those on their right, and "
                f"only a causal decoder's last token can be read here: {instead}"
            )


def _numbered(model: PreTrainedModel) -> float:
    """How many positions the model has."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # XLNet, which has no such table, says -1.
    return math.inf if positions is None or positions < 0 else positions


def _rotated_alike(model: PreTrainedModel) -> float:
    """The length up to which every sequence has the same rotary frequencies, whatever stands beside it."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    return min(
        (k["original_max_position_embeddings"] for k in kinds if k.get("rope_type") == "longrope"), default=math.inf
    )
