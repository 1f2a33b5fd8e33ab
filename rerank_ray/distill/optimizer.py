"""AdamW, and how its rate rises and falls."""

from __future__ import annotations

import math

import torch

from rerank_ray.models.student import Student
from rerank_ray.settings.distill import OptimizerSettings


def make_optimizer(student: Student, settings: OptimizerSettings) -> torch.optim.AdamW:
    """In four groups: backbone or new parameters, with weight decay (matrices) or without (vectors)."""
    new = {id(p) for p in student.new_parameters()}
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = []
    for is_new, rate in ((False, settings.learning_rate), (True, settings.head_learning_rate)):
        for decayed in (True, False):
            members = [p for p in parameters if (id(p) in new) is is_new and (p.ndim > 1 and not is_new) is decayed]
            if members:
                decay = settings.weight_decay if decayed else 0.0
                groups.append({"params": members, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, fused=True)


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
