"""What a student is trained to do."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Settings

LossName = Literal[
    "kl",
    "ranknet",
    "soft_ranknet",
    "weighted_ranknet",
    "ce",
    "lce",
    "bce",
    "listnet",
    "listmle",
    "position_aware_listmle",
    "cprd",
    "mse",
    "margin_mse",
    "adr_mse",
    "lambdarank",
    "ndcg_loss2",
    "ndcg_loss2pp",
]
_NEED_GAINS = ("lambdarank", "ndcg_loss2", "ndcg_loss2pp")
# Which losses an option changes; given to another, it would do nothing without saying so.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "temperature": ("kl", "listnet", "soft_ranknet", "adr_mse", *_NEED_GAINS),
    "scores": ("kl", "listnet", "soft_ranknet", "mse", "margin_mse"),
    "positives": ("ce", "lce", "bce", "cprd"),
    "cutoff": ("cprd",),
}


class LossSettings(Settings):
    """One term of the objective; rerank_ray/losses holds each loss with its formula and paper."""

    loss: LossName
    """Of distributions: kl, listnet. Of pairs: ranknet, soft_ranknet (the teacher's confidence in each pair),
    weighted_ranknet (1/(rank + rank)). Of positives: ce (softmax), lce (each positive among the negatives alone), bce
    (pointwise). Of the order: listmle, position_aware_listmle, cprd (of the hardest negatives), adr_mse (ranks). Of
    numbers: mse, margin_mse. Of nDCG: lambdarank, ndcg_loss2, ndcg_loss2pp."""
    weight: PositiveFloat = 1.0
    """Factor of this term."""
    target: Literal["teacher", "ranks", "gains"] = "teacher"
    """What it learns: the teacher's scores, the reciprocals of the teacher's ranks within the group (1, ½, ⅓ …), or the
    candidates' known gains (`label`; 0 where unknown). ce, lce, bce and cprd take their positives from it."""
    scores: Literal["raw", "zscore"] = "raw"
    """kl, listnet, soft_ranknet, mse and margin_mse: teacher scores as they are, or with mean 0 and deviation 1 within
    each group."""
    temperature: PositiveFloat = 1.0
    """kl, listnet and soft_ranknet: divides both sides' scores. adr_mse: of its approximate ranks. The lambda losses:
    1/σ₀ of the logistic loss."""
    positives: PositiveInt = 1
    """ce, lce, bce and cprd, unless the target is gains: this many of the teacher's first candidates in the group are
    the positives."""
    cutoff: PositiveInt | None = None
    """cprd: how many of the hardest negatives are ordered, and those that equal the last of them; null orders all."""
    layer_weights: tuple[Annotated[float, Field(ge=0.0)], ...] | None = None
    """Layer-wise students: the term is the mean over layers with these weights, one for each of `student.layers`; null
    weighs all alike."""

    @model_validator(mode="after")
    def _every_option_counts(self) -> LossSettings:
        for option, losses in _OPTIONS.items():
            if getattr(self, option) != type(self).model_fields[option].default and self.loss not in losses:
                raise ValueError(
                    f"{option} changes nothing for {self.loss}, only for {', '.join(losses)}: leave it out"
                )
        if self.scores == "zscore" and self.target != "teacher":
            raise ValueError(f"scores: zscore is of teacher scores, and the target is {self.target}: leave it out")
        if self.positives > 1 and self.target == "gains":
            raise ValueError("positives: with target gains the positives are the candidates with a gain: leave it out")
        if self.loss in _NEED_GAINS and self.target == "teacher":
            raise ValueError(
                f"{self.loss} needs gains, which teacher scores are not (2^score): set target to ranks or to gains"
            )
        if self.layer_weights is not None and sum(self.layer_weights) == 0:
            raise ValueError("layer_weights: all are 0, so the term would teach nothing")
        return self


def check_group(objective: ObjectiveSettings, group_size: int) -> None:
    """Raise `ValueError` where a term would find no negative in any group of `sampling.group_size` candidates."""
    for number, term in enumerate(objective.losses):
        if term.target != "gains" and term.positives >= group_size:
            raise ValueError(
                f"objective.losses.{number}: {term.loss} tells the teacher's first {term.positives} from others, and a "
                f"group has no more (sampling.group_size: {group_size}): raise that"
            )


class ObjectiveSettings(Settings):
    """Σ weight · loss, on every layer that has a head, plus what the last layer teaches the others and what keeps the
    views of a list apart."""

    losses: Annotated[tuple[LossSettings, ...], Field(min_length=1)] = (
        LossSettings(loss="kl", scores="zscore"),
        LossSettings(loss="ranknet"),
        LossSettings(loss="ce", weight=0.1),
    )
    self_distillation: Annotated[float, Field(ge=0.0)] = 1.0
    """Layer-wise students: weight of KL(last layer ‖ earlier layer), the last layer's gradient stopped."""
    orthogonality: Annotated[float, Field(ge=0.0)] = 1.0
    """Students with head mvp: weight of ‖A Aᵀ − I‖² of the views' anchors at unit length, by which each looks another
    way; MVP's own weight is 1."""
    query_weights: Literal["equal", "uncertainty"] = "equal"
    """`uncertainty` weighs a query 1 / (1 + mean of its candidates' `uncertainty`): lists that an ensemble of teachers
    disagrees on count less."""
