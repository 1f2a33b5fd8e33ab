"""What the losses compare the student's scores with, and the objective they add up to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rerank_ray.distill.sampling import teacher_order
from rerank_ray.losses.cross_entropy import softmax_cross_entropy
from rerank_ray.losses.divergence import kl
from rerank_ray.losses.layerwise import self_distillation
from rerank_ray.losses.masking import masked_zscore
from rerank_ray.losses.pairwise import ranknet
from rerank_ray.records import Labels
from rerank_ray.settings.distill import LossSettings, ObjectiveSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Targets of the sampled groups of one step, all [Q, C] with the teacher's best first; padding is masked."""

    teacher: torch.Tensor
    """Teacher scores."""
    gains: torch.Tensor
    """Known gains; 0 where unjudged."""
    mask: torch.Tensor
    """True for real candidates."""

    @classmethod
    def of(cls, groups: Sequence[tuple[Labels, Sequence[int]]]) -> Targets:
        """Collect targets for (labels, sampled candidate indices) pairs."""
        width = max(len(indices) for _, indices in groups)
        teacher = torch.zeros(len(groups), width)
        gains = torch.zeros(len(groups), width)
        mask = torch.zeros(len(groups), width, dtype=torch.bool)
        for q, (labels, indices) in enumerate(groups):
            size = len(indices)
            teacher[q, :size] = torch.tensor([labels.scores[i] for i in indices])
            gains[q, :size] = torch.tensor([labels.candidate_list.candidates[i].label or 0.0 for i in indices])
            mask[q, :size] = True
        return cls(teacher=teacher, gains=gains, mask=mask)

    def to(self, device: torch.device) -> Targets:
        return Targets(teacher=self.teacher.to(device), gains=self.gains.to(device), mask=self.mask.to(device))


def objective(layer_scores: torch.Tensor, targets: Targets, settings: ObjectiveSettings) -> dict[str, torch.Tensor]:
    """Each term's unweighted loss and their weighted `total`, one value a query.

    Args:
        layer_scores: [layers, Q, C].

    Returns:
        Name -> [Q]. On several layers a term is its mean over layers, and `self_distillation` its sum over the earlier
        ones.
    """
    terms = {}
    total = torch.zeros(layer_scores.shape[1], device=layer_scores.device)
    for number, term in enumerate(settings.losses, start=1):
        value = torch.stack([_loss(scores, targets, term) for scores in layer_scores]).mean(0)
        name = term.loss if term.loss not in terms else f"{term.loss}_{number}"
        terms[name] = value
        total = total + term.weight * value
    if len(layer_scores) > 1:
        terms["self_distillation"] = self_distillation(layer_scores, targets.mask)
        total = total + settings.self_distillation * terms["self_distillation"]
    return {**terms, "total": total}


def _loss(scores: torch.Tensor, targets: Targets, term: LossSettings) -> torch.Tensor:
    if term.loss == "kl":
        teacher = masked_zscore(targets.teacher, targets.mask) if term.scores == "zscore" else targets.teacher
        return kl(scores, teacher, targets.mask, term.temperature)
    if term.loss == "ranknet":
        order = targets.teacher if term.target == "teacher" else targets.gains
        return ranknet(scores, order, targets.mask)
    if term.target == "gains":
        positives = targets.gains > 0
    else:
        positives = torch.arange(scores.shape[1], device=scores.device)[None, :].expand_as(scores) < term.positives
    return softmax_cross_entropy(scores, positives, targets.mask)


_VALIDATION_DEPTH = 10


def validation_ndcg(labels: Labels, scores: Sequence[float], gains: str) -> float | None:
    """nDCG@10 (linear gains) of a student's scores; None when no candidate has a gain.

    With `gains` = teacher, the teacher's rank r has gain 11 − r for r ≤ 10 and 0 below; with labels, the known gains of
    the candidates, whose ideal ranking is made of the candidates alone.
    """
    candidates = labels.candidate_list.candidates
    if gains == "labels":
        gain = [c.label or 0.0 for c in candidates]
    else:
        gain = [0.0] * len(candidates)
        for rank, i in enumerate(teacher_order(labels)[:_VALIDATION_DEPTH]):
            gain[i] = float(_VALIDATION_DEPTH - rank)
    ideal = _dcg(sorted(gain, reverse=True))
    if ideal == 0:
        return None
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return _dcg([gain[i] for i in order]) / ideal


def _dcg(gains: Sequence[float]) -> float:
    return sum(g / math.log2(rank + 2) for rank, g in enumerate(gains[:_VALIDATION_DEPTH]))
