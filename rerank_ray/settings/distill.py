"""Distillation: the student, its objective and its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Fraction, Settings
from rerank_ray.settings.models import ModelSettings

StudentHead = Literal["linear", "similarity"]


class StudentSettings(Settings):
    """The student and how it starts."""

    base: str
    """Pretrained encoder to start from: hub id, folder or `package://`."""
    revision: str | None = None
    """Hub commit or tag."""
    head: StudentHead = "linear"
    """`linear` is the architecture's own head and loads anywhere; `similarity` starts from a bi-encoder's cosine."""
    layers: tuple[PositiveInt, ...] | None = None
    """Layers that get a head, ascending, the last one included: a layer-wise student. null is the last layer only."""
    max_length: PositiveInt = 256
    """Tokens of query and document together."""
    max_query_length: PositiveInt = 64
    """Tokens of the query; longer ones are cut."""
    gate: float = -8.0
    """similarity: initial attention bias between the segments; −8 shuts it, 0 leaves attention free."""
    scale: PositiveFloat = 8.0
    """similarity: initial factor of the cosine, which sets the untrained student's scores on the scale of its labels:
    on SPLADE's lists of TREC-DL 2021 MiniLM's KL to z-scored labels is 0.54 at 8 and 0.86 at 20."""
    dropout: Fraction | None = 0.0
    """Hidden and attention dropout; null keeps the checkpoint's. Any dropout on attention rules out its fused kernel,
    which doubles the memory of a step."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint ships."""

    @model_validator(mode="after")
    def _the_query_leaves_room(self) -> StudentSettings:
        if self.max_query_length > self.max_length - 8:
            raise ValueError(
                f"max_query_length ({self.max_query_length}) must be at most max_length ({self.max_length}) − 8, or no "
                "token is left for the document"
            )
        return self

    def model_settings(self) -> ModelSettings:
        return ModelSettings(
            path=self.base,
            revision=self.revision,
            max_length=self.max_length,
            trust_remote_code=self.trust_remote_code,
        )


class BandSettings(Settings):
    """How many candidates of a group come from a range of teacher ranks."""

    ranks: tuple[PositiveInt, PositiveInt]
    """First and last teacher rank, from 1, both included."""
    count: PositiveInt
    """Candidates drawn from them."""

    @model_validator(mode="after")
    def _ascending(self) -> BandSettings:
        if self.ranks[0] > self.ranks[1]:
            raise ValueError(f"ranks: {list(self.ranks)}: the first must not be above the last")
        return self


class SamplingSettings(Settings):
    """Which candidates of a query are scored in one step; drawn anew each epoch."""

    group_size: PositiveInt = 16
    """Candidates a query; lists that are shorter are taken whole."""
    bands: tuple[BandSettings, ...] | None = None
    """null draws uniformly from all scored candidates."""

    @model_validator(mode="after")
    def _bands_fill_the_group(self) -> SamplingSettings:
        if self.bands is not None and sum(b.count for b in self.bands) != self.group_size:
            raise ValueError(
                f"the bands' counts add up to {sum(b.count for b in self.bands)}, not to group_size ({self.group_size})"
            )
        return self


class LossSettings(Settings):
    """One term of the objective."""

    loss: Literal["kl", "ranknet", "ce"]
    """kl: of the score distributions; ranknet: of each pair's order; ce: softmax cross-entropy of the positives."""
    weight: PositiveFloat = 1.0
    """Factor of this term."""
    temperature: PositiveFloat = 1.0
    """kl: divides both sides' scores."""
    scores: Literal["raw", "zscore"] = "raw"
    """kl: teacher scores as they are, or with mean 0 and deviation 1 within each list."""
    target: Literal["teacher", "gains"] = "teacher"
    """ranknet and ce: the teacher's order, or the candidates' known gains (`label`)."""
    positives: PositiveInt = 1
    """ce with target teacher: this many of the teacher's first candidates in the group are the positives."""


class ObjectiveSettings(Settings):
    """Σ weight · loss, on every layer that has a head, plus what the last layer teaches the others."""

    losses: Annotated[tuple[LossSettings, ...], Field(min_length=1)] = (
        LossSettings(loss="kl", scores="zscore"),
        LossSettings(loss="ranknet"),
        LossSettings(loss="ce", weight=0.1),
    )
    self_distillation: Annotated[float, Field(ge=0.0)] = 1.0
    """Layer-wise students: weight of KL(last layer ‖ earlier layer), the last layer's gradient stopped."""


class OptimizerSettings(Settings):
    """AdamW with a linear warm-up."""

    learning_rate: PositiveFloat = 2e-5
    """Peak rate of the backbone."""
    head_learning_rate: PositiveFloat = 1e-3
    """Peak rate of what is new: heads and gates."""
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


class ValidationSettings(Settings):
    """How the kept step is chosen, on queries held out of training."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the queries held out, at least one; which ones depends on their ids and the seed alone."""
    every_steps: PositiveInt = 50
    """Steps between validations; a checkpoint is written at each."""
    patience: PositiveInt = 5
    """Validations without a new best after which training stops."""
    gains: Literal["teacher", "labels"] = "teacher"
    """nDCG@10 against the teacher (its rank r has gain 11 − r for r ≤ 10, 0 below) or against known gains."""


class TrainingExecutionSettings(Settings):
    """Ray Train workers."""

    workers: PositiveInt = 1
    """Data-parallel workers."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs a worker reserves; on a CPU also its torch threads, at least one."""
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs a worker reserves."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the run gives up; each resumes from the last checkpoint."""


class DistillSettings(Settings):
    """`rerank-ray distill`: soft labels to a student."""

    input: Annotated[list[str], Field(min_length=1)]
    """Label runs, or folders of label Parquet; query ids are unique over all of them."""
    student: StudentSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    sampling: SamplingSettings = SamplingSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    validation: ValidationSettings = ValidationSettings()
    epochs: PositiveInt = 1
    """Passes over the training queries."""
    max_steps: PositiveInt | None = None
    """Ends training earlier; the learning rate's schedule follows."""
    queries_per_step: PositiveInt = 4
    """Queries in one optimizer step, over all workers."""
    tokens_per_micro_batch: PositiveInt = 2048
    """Padded tokens in one forward pass: small enough that a step falls into batches of like lengths."""
    tokens_per_backward: PositiveInt = 8192
    """Tokens whose activations are held at once: a step with more runs backward several times, to the same gradient. A
    query's group is never split."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; weights and optimizer stay float32."""
    seed: NonNegativeInt = 0
    """Of heads, held-out queries, order, sampling and dropout."""
    execution: TrainingExecutionSettings = TrainingExecutionSettings()
