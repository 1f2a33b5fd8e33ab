"""Rationale distillation: a language model learns a teacher's reasoning, rankings and scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Settings
from rerank_ray.settings.distill import TrainingExecutionSettings
from rerank_ray.settings.objective import ObjectiveSettings, check_group
from rerank_ray.settings.optimizer import OptimizerSettings
from rerank_ray.settings.reinforce import PolicySettings
from rerank_ray.settings.sampling import SamplingSettings


class _TermSettings(Settings):
    """One part of the objective, over label runs of its own."""

    input: Annotated[list[str], Field(min_length=1)]
    """Label runs, or folders of label Parquet, of the teacher that this term imitates."""
    weight: PositiveFloat = 1.0
    """Factor of this term."""


class PermutationTermSettings(_TermSettings):
    """Cross-entropy on a listwise teacher's reasoning and permutation: comparison reasoning (ReasoningRank), or DeAR's
    second stage. The teacher ranked each list in one window (`window` at least its length), for its reasoning names the
    passages as that window's prompt did."""

    kind: Literal["permutation"] = "permutation"
    prompt: str = "rank_gpt_reasoning"
    """A built-in template's name or the path of a YAML template, of method rank_gpt."""
    reasoning: bool = True
    """Learn the rationale before the permutation; lists without one are skipped. false: the permutation alone."""
    passage_words: PositiveInt = 200
    """Words of a passage that the prompt shows."""


class ExplanationTermSettings(_TermSettings):
    """Cross-entropy on a pointwise teacher's reasoning and integer for single passages: explicit reasoning. Label with
    method erank and `score: integer`; of any other teacher, compositions with erank among them, no list is learnt."""

    kind: Literal["explanation"] = "explanation"
    prompt: str = "erank"
    """A built-in template's name or the path of a YAML template, of method erank."""
    sampling: SamplingSettings = SamplingSettings(group_size=4)
    """Passages of a query that are explained in one step."""


class ScoreTermSettings(_TermSettings):
    """Losses on the scores of a query's passages: the log-odds of a prompt's two answers."""

    kind: Literal["score"] = "score"
    prompt: str = "yes_no"
    """A built-in template's name or the path of a YAML template, of method yes_no."""
    sampling: SamplingSettings = SamplingSettings(group_size=8)
    """Passages of a query that are scored in one step."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """As of `rerank-ray distill`."""

    @model_validator(mode="after")
    def _groups_have_negatives(self) -> ScoreTermSettings:
        check_group(self.objective, self.sampling.group_size)
        return self


TermSettings = Annotated[
    PermutationTermSettings | ExplanationTermSettings | ScoreTermSettings, Field(discriminator="kind")
]


class RationaleValidationSettings(Settings):
    """How the kept step is chosen: by the objective on queries held out of training."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of each term's queries held out; which ones depends on their ids and the seed alone. Where that is none,
    training is refused."""
    queries: PositiveInt | None = 100
    """Held-out queries of each term, at most; null is all."""
    every_steps: PositiveInt = 50
    """Steps between validations; a checkpoint is written at each."""


class RationaleSettings(Settings):
    """`rerank-ray distill-rationales`: label runs with reasoning to a language model that reasons."""

    policy: PolicySettings
    terms: Annotated[tuple[TermSettings, ...], Field(min_length=1)]
    """The objective is Σ weight · term."""
    queries_per_step: PositiveInt = 4
    """Queries of each term in one optimizer step, over all workers."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-4)
    """`head_learning_rate` and `averaging` have no part in it."""
    validation: RationaleValidationSettings = RationaleValidationSettings()
    epochs: PositiveInt = 1
    """Passes over the queries of the term that has most; the others begin anew as often as it takes."""
    max_steps: PositiveInt | None = None
    """Ends training earlier; the learning rate's schedule follows."""
    seed: NonNegativeInt = 0
    """Of adapters, held-out queries, order, sampling and dropout."""
    execution: TrainingExecutionSettings = TrainingExecutionSettings()

    @model_validator(mode="after")
    def _scores_are_of_one_layer(self) -> RationaleSettings:
        for number, term in enumerate(self.terms):
            if isinstance(term, ScoreTermSettings) and any(t.layer_weights for t in term.objective.losses):
                raise ValueError(f"terms.{number}.objective: layer_weights are for layer-wise students: leave them out")
        return self
