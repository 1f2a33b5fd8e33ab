"""How weights are moved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from rerank_ray.config import Fraction, Settings


class OptimizerSettings(Settings):
    """AdamW with a linear warm-up."""

    learning_rate: PositiveFloat = 2e-5
    """Peak rate of the backbone."""
    head_learning_rate: PositiveFloat = 1e-3
    """Peak rate of heads and gates, those of a student that is trained on too."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The last layer of the backbone has its peak rate, and each below it that of the one above times this, down to the
    embeddings (Howard & Ruder 2018): what lies deeper is more general, and few labels should move it less."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Of weight matrices; vectors are not decayed."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps in which the rate rises from 0."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls afterwards."""
    averaging: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of an exponential moving average of the weights, which is what is validated and kept; 0.95 remembers some
    20 steps, the starting weights included. 0 keeps the weights as they are."""
    clip_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to it."""
