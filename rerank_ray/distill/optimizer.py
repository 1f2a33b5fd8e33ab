"""AdamW, and how its rate rises and falls."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from rerank_ray.models.student import Student
from rerank_ray.models.student.source import embeddings_of, layers_of
from rerank_ray.settings.optimizer import OptimizerSettings


def make_optimizer(student: Student, settings: OptimizerSettings) -> torch.optim.AdamW:
    """In groups of one rate and one weight decay each: matrices are decayed, vectors and new parameters are not.

    Raises:
        ModelError: rates that fall from layer to layer, of an architecture whose layers can't be told apart.
    """
    new = {id(p) for p in student.new_parameters()}
    factors = _rate_factors(student.pretrained, settings.layer_decay) if settings.layer_decay != 1.0 else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in student.parameters():
        if not parameter.requires_grad:
            continue
        is_new = id(parameter) in new
        rate = settings.head_learning_rate if is_new else settings.learning_rate * factors.get(id(parameter), 1.0)
        decay = settings.weight_decay if parameter.ndim > 1 and not is_new else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": rate, "peak_lr": rate, "weight_decay": decay}
            for (rate, decay), members in groups.items()
        ],
        fused=True,
    )


def _rate_factors(model: PreTrainedModel, decay: float) -> dict[int, float]:
    """By parameter id: 1 for the last layer, times `decay` for each layer below it, and once more for embeddings."""
    layers = layers_of(model)
    parts = [embeddings_of(model), *layers]
    return {id(p): decay ** (len(layers) - n) for n, part in enumerate(parts) for p in part.parameters()}


def set_learning_rate(
    optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int, total_steps: int
) -> None:
    warmup = round(settings.warmup_fraction * total_steps)
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        left = (total_steps - step) / max(1, total_steps - warmup)
        factor = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[settings.decay]
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def current_learning_rate(optimizer: torch.optim.Optimizer, settings: OptimizerSettings) -> float:
    """Of the pretrained weights, as they stand; of a first step that is still to be taken, the highest."""
    group = optimizer.param_groups[0]
    return settings.learning_rate * group["lr"] / group["peak_lr"]
