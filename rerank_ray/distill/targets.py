"""What the losses compare the student's scores with, and the objective they add up to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.sampling import teacher_order
from rerank_ray.errors import InputError, RunError
from rerank_ray.losses.cross_entropy import binary_cross_entropy, localized_contrastive, softmax_cross_entropy
from rerank_ray.losses.divergence import kl
from rerank_ray.losses.lambdaloss import lambdarank, ndcg_loss2, ndcg_loss2pp
from rerank_ray.losses.layerwise import self_distillation
from rerank_ray.losses.listwise import listmle, listnet, partial_listmle, position_aware_listmle
from rerank_ray.losses.masking import differ, masked_zscore, ranks
from rerank_ray.losses.orthogonality import orthogonality
from rerank_ray.losses.pairwise import ranknet, soft_ranknet, weighted_ranknet
from rerank_ray.losses.regression import adr_mse, margin_mse, mse
from rerank_ray.metrics.agreement import ndcg
from rerank_ray.models.engine import moved
from rerank_ray.records import Labels
from rerank_ray.settings.objective import LossSettings, ObjectiveSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Targets of the sampled groups of one step, all [Q, C] with the teacher's best first; padding is masked."""

    teacher: torch.Tensor
    """Teacher scores."""
    gains: torch.Tensor
    """Known gains; 0 where unjudged."""
    mask: torch.Tensor
    """True for real candidates."""
    confidence: torch.Tensor
    """1 / (1 + mean uncertainty of the query's candidates), [Q]; 1 for labels without uncertainty."""

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
        confidence = torch.tensor([_confidence(labels) for labels, _ in groups])
        return cls(teacher=teacher, gains=gains, mask=mask, confidence=confidence)

    def to(self, device: torch.device) -> Targets:
        return Targets(
            teacher=moved(self.teacher, device),
            gains=moved(self.gains, device),
            mask=moved(self.mask, device),
            confidence=moved(self.confidence, device),
        )


def _confidence(labels: Labels) -> float:
    known = [u for u in labels.uncertainty or () if u is not None and not math.isnan(u)]
    return 1.0 / (1.0 + sum(known) / len(known)) if known else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One loss of the objective, or their weighted sum."""

    loss: torch.Tensor
    """[Q], unweighted; 0 where the query was skipped."""
    skipped: torch.Tensor
    """[Q] bool: the query's group has nothing that this loss could teach."""


def objective(
    layer_scores: torch.Tensor, targets: Targets, settings: ObjectiveSettings, views: torch.Tensor | None = None
) -> dict[str, Term]:
    """Each term of the objective, and their weighted `total`.

    A query that a term can learn nothing from (targets all alike, no positive) is skipped by it: it adds 0.

    Args:
        layer_scores: [layers, Q, C].
        views: [Q, V, H], of a student that has several.

    Returns:
        Name -> term. On several layers a term is its weighted mean over layers, and `self_distillation` its sum over
        the earlier ones; `orthogonality` is of the views.
    """
    nothing = torch.zeros_like(targets.confidence, dtype=torch.bool)
    terms = {}
    total = torch.zeros_like(targets.confidence)
    for name, term in zip(term_names(t.loss for t in settings.losses), settings.losses, strict=True):
        prepared = _Prepared.of(targets, term)
        weights = term.layer_weights or (1.0,) * len(layer_scores)
        compute = _LOSSES[term.loss]
        by_layer = [w * compute(s, prepared, term) for s, w in zip(layer_scores, weights, strict=True) if w > 0]
        skipped = ~_teaches(prepared, term)
        terms[name] = Term(loss=torch.where(skipped, 0.0, sum(by_layer) / sum(weights)), skipped=skipped)
        total = total + term.weight * terms[name].loss
    if len(layer_scores) > 1:
        terms["self_distillation"] = Term(loss=self_distillation(layer_scores, targets.mask), skipped=nothing)
        total = total + settings.self_distillation * terms["self_distillation"].loss
    if views is not None:
        terms["orthogonality"] = Term(loss=orthogonality(views), skipped=nothing)
        total = total + settings.orthogonality * terms["orthogonality"].loss
    if settings.query_weights == "uncertainty":
        total = targets.confidence * total
    return {**terms, "total": Term(loss=total, skipped=nothing)}


def term_names(kinds: Iterable[str]) -> list[str]:
    """The terms' names in metrics: the kind's own, with the term's number from its second use on."""
    names: list[str] = []
    for number, kind in enumerate(kinds, start=1):
        names.append(kind if kind not in names else f"{kind}_{number}")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """The targets of one term, all [Q, C]."""

    values: torch.Tensor
    """What the student's scores are compared with: teacher scores, reciprocal ranks or gains."""
    positives: torch.Tensor
    order: torch.Tensor
    """Teacher scores, whatever the target."""
    mask: torch.Tensor

    @classmethod
    def of(cls, targets: Targets, term: LossSettings) -> _Prepared:
        teacher, mask = targets.teacher, targets.mask
        if term.target == "gains":
            values, positives = targets.gains, targets.gains > 0
        else:
            # The teacher's best come first in a group. Of equal scores all are positives, or none where no negative
            # would be left.
            last = (mask.sum(1) - 1).clamp(min=0, max=term.positives - 1)
            lowest = teacher.gather(1, last[:, None])
            swallowed = ((teacher >= lowest) | ~mask).all(1, keepdim=True) & (
                mask.sum(1, keepdim=True) > term.positives
            )
            positives = torch.where(swallowed, teacher > lowest, teacher >= lowest)
            values = (
                teacher if term.target == "teacher" else torch.where(mask, 1 / ranks(teacher, mask).clamp(min=1), 0)
            )
            if term.scores == "zscore":
                values = masked_zscore(teacher, mask)
        return cls(values=values, positives=positives & mask, order=teacher, mask=mask)


_LOSSES: dict[str, Callable[[torch.Tensor, _Prepared, LossSettings], torch.Tensor]] = {
    "kl": lambda s, p, term: kl(s, p.values, p.mask, term.temperature),
    "ranknet": lambda s, p, term: ranknet(s, p.values, p.mask),
    "soft_ranknet": lambda s, p, term: soft_ranknet(s, p.values, p.mask, term.temperature),
    "weighted_ranknet": lambda s, p, term: weighted_ranknet(s, p.values, p.mask),
    "ce": lambda s, p, term: softmax_cross_entropy(s, p.positives, p.mask),
    "lce": lambda s, p, term: localized_contrastive(s, p.positives, p.mask),
    "bce": lambda s, p, term: binary_cross_entropy(s, p.positives, p.mask),
    "listnet": lambda s, p, term: listnet(s, p.values, p.mask, term.temperature),
    "listmle": lambda s, p, term: listmle(s, p.values, p.mask),
    "position_aware_listmle": lambda s, p, term: position_aware_listmle(s, p.values, p.mask),
    "cprd": lambda s, p, term: partial_listmle(s, p.order, p.positives, p.mask, term.cutoff),
    "mse": lambda s, p, term: mse(s, p.values, p.mask),
    "margin_mse": lambda s, p, term: margin_mse(s, p.values, p.mask),
    "adr_mse": lambda s, p, term: adr_mse(s, p.values, p.mask, term.temperature),
    "lambdarank": lambda s, p, term: lambdarank(s, p.values, p.mask, 1 / term.temperature),
    "ndcg_loss2": lambda s, p, term: ndcg_loss2(s, p.values, p.mask, 1 / term.temperature),
    "ndcg_loss2pp": lambda s, p, term: ndcg_loss2pp(s, p.values, p.mask, 1 / term.temperature),
}


def _teaches(prepared: _Prepared, term: LossSettings) -> torch.Tensor:
    """Whether each query's group holds what the loss needs: [Q] bool."""
    mask, positives, needs = prepared.mask, prepared.positives, NEEDS[term.loss]
    if needs == "ordered negatives":
        return differ(prepared.order, mask & ~positives)
    if needs == "differing gains":
        return differ(prepared.values.clamp(min=0.0), mask)
    contrast = positives.any(1) & (mask & ~positives).any(1)
    if term.target != "gains" or needs == "differing targets":
        # Without a preference of the teacher, which candidates come first is chance.
        preferred = differ(prepared.values, mask)
        return preferred & contrast if term.loss in _OF_POSITIVES else preferred
    return contrast if needs == "positive and negative" else mask.any(1)


_OF_POSITIVES = ("ce", "lce", "bce")
NEEDS = dict.fromkeys(_LOSSES, "differing targets") | {
    "ce": "positive and negative",
    "lce": "positive and negative",
    "bce": "candidates",
    "cprd": "ordered negatives",
    "lambdarank": "differing gains",
    "ndcg_loss2": "differing gains",
    "ndcg_loss2pp": "differing gains",
}
"""What a list must hold for a loss to learn from it."""


def check_objective(data: LabelSet, settings: ObjectiveSettings) -> None:
    """Refuse an objective that these labels can't serve, before anything is trained.

    Raises:
        InputError: a term would skip every training query, or queries have no uncertainty to be weighed by.
    """
    count = len(data.train)
    inputs = ", ".join(dict.fromkeys(uri for uri, _, _ in data.groups))
    for number, term in enumerate(settings.losses):
        where = f"{inputs}: objective.losses.{number} ({term.loss} on {term.target})"
        needs = NEEDS[term.loss]
        # Known gains can teach `candidates` from lists of one; all other targets are compared within a list.
        if data.single == count and not (term.target == "gains" and needs == "candidates"):
            raise InputError(
                f"{where}: each of the {count} training queries has one scored candidate alone, and nothing to compare "
                "it with, so it would learn nothing: label lists of two candidates or more, or train bce on gains"
            )
        if term.target == "gains" and (lacking := _lacking_gains(data, needs)):
            raise InputError(
                f"{where}: {lacking} (of {count} training queries), so it would learn nothing: ingest with qrels, "
                "which set the candidates' 'label', or set target to teacher"
            )
        if term.target != "gains" and data.tied == count:
            raise InputError(
                f"{where}: the teacher gave all candidates of a query the same score, in each of the {count} training "
                f"queries ({data.single} have one scored candidate alone), so it would learn nothing: "
                "look into the label run"
            )
    if settings.query_weights == "uncertainty" and data.without_uncertainty:
        raise InputError(
            f"{inputs}: objective.query_weights: uncertainty: {data.without_uncertainty} of {count} training queries "
            "have none: label with a method that tells it, such as `rerank-ray combine`, or set query_weights to equal"
        )


def _lacking_gains(data: LabelSet, needs: str) -> str | None:
    """What no training query has of that which a loss on known gains needs; None where one has it."""
    count = len(data.train)
    if needs == "positive and negative" and data.without_contrast == count:
        return "no query has both a candidate with a known gain above 0 and one without"
    if needs == "candidates" and data.without_positive == count:
        return "no query has a candidate with a known gain above 0"
    if needs == "candidates" and data.without_negative == count:
        return "all candidates of all queries have a known gain above 0"
    if needs == "ordered negatives" and data.negatives_tied == count:
        return "no query has two candidates without a known gain above 0 whose teacher scores differ"
    if needs == "differing gains" and data.without_positive == count:
        return "no query has a candidate with a known gain above 0"
    if needs.startswith("differing") and data.gains_alike == count:
        return "no query has candidates with different known gains"
    return None


_VALIDATION_DEPTH = 10


def validation_ndcg(labels: Labels, scores: Sequence[float], gains: str) -> float | None:
    """nDCG@10 (linear gains) of a student's scores; None when no candidate has a gain.

    With `gains` = teacher, the teacher's rank r has gain 11 − r for r ≤ 10 and 0 below, equal scores the mean of their
    ranks' gains, and a list of nothing but equal scores has none; with labels, the known gains of the candidates, whose
    ideal ranking is made of the candidates alone.

    Raises:
        RunError: a score is not a finite number, and no order follows from it.
    """
    if not all(map(math.isfinite, scores)):
        raise RunError(
            f"query {labels.candidate_list.query.query_id!r}: the student's score is not a finite number: training has "
            "diverged; lower optimizer.learning_rate, lengthen its warm-up, or look for huge targets in the labels"
        )
    if gains == "labels":
        gain = [c.label or 0.0 for c in labels.candidate_list.candidates]
    else:
        gain = _gains_of_teacher(labels)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return ndcg([gain[i] for i in order], gain, _VALIDATION_DEPTH)


def _gains_of_teacher(labels: Labels) -> list[float]:
    gain = [0.0] * len(labels.candidate_list.candidates)
    rank = 0
    groups = [list(group) for _, group in groupby(teacher_order(labels), key=lambda i: labels.scores[i])]
    for group in groups if len(groups) > 1 else ():
        of_ranks = [max(0, _VALIDATION_DEPTH - r) for r in range(rank, rank + len(group))]
        rank += len(group)
        for i in group:
            gain[i] = sum(of_ranks) / len(group)
    return gain
