"""Distillation: validation, execution, and all of a distill job's settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Settings
from rerank_ray.settings.objective import ObjectiveSettings, check_group
from rerank_ray.settings.optimizer import OptimizerSettings
from rerank_ray.settings.resources import Needs, Resources
from rerank_ray.settings.sampling import SamplingSettings
from rerank_ray.settings.student import StudentSettings


class ValidationSettings(Settings):
    """How the kept step is chosen, on queries held out of training: by nDCG@10, of a layer-wise student the mean
    over its layers."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the queries held out; which ones depends on their ids and the seed alone. Where that is none, training
    is refused."""
    every_steps: PositiveInt = 50
    """Steps between validations; a checkpoint is written at each."""
    patience: PositiveInt = 5
    """Validations without a new best after which training stops."""
    interpolation: Annotated[tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...], Field(max_length=8)] = ()
    """Shares of the trained weights in the student, the rest being the start's (WiSE-FT, Wortsman et al. 2022): each
    validation tries every share, and 1, and keeps the best. Few labels spoil less of what the start knows so."""
    gains: Literal["teacher", "labels"] = "teacher"
    """nDCG@10 against the teacher (its rank r has gain 11 − r for r ≤ 10, 0 below) or against known gains."""


class TrainingExecutionSettings(Settings):
    """Ray Train workers."""

    workers: PositiveInt = 1
    """Data-parallel workers."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs a worker reserves; on a CPU also its torch threads, at least one."""
    gpus_per_worker: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """The GPU that a worker reserves; a share of one, for a worker that trains alone."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the run gives up; each resumes from the last checkpoint."""

    @model_validator(mode="after")
    def _workers_have_gpus_of_their_own(self) -> TrainingExecutionSettings:
        if self.workers > 1 and 0 < self.gpus_per_worker < 1:
            raise ValueError(
                f"gpus_per_worker: {self.gpus_per_worker:g} with workers: {self.workers}: NCCL connects no two that "
                "share a GPU: set it to 1, or workers to 1"
            )
        return self

    @property
    def range_of_workers(self) -> tuple[int, int] | None:
        """The fewest and the most workers; None when there are always `workers`."""
        return None

    @property
    def needs(self) -> Needs:
        """Of the fewest workers that training goes on with."""
        fewest, _ = self.range_of_workers or (self.workers, self.workers)
        one = Resources(self.cpus_per_worker, self.gpus_per_worker)
        return Needs(total=Resources(*(fewest * amount for amount in one)), one=one)


class DistillExecutionSettings(TrainingExecutionSettings):
    """Ray Train workers, and what each of them holds."""

    min_workers: PositiveInt | None = None
    """ddp: go on with as few while not all `workers` can be had, as after the loss of a node, and with more when they
    can be again. null waits for all."""
    strategy: Literal["ddp", "zero2", "zero3"] = "ddp"
    """What a worker holds: all (`ddp`), or, with DeepSpeed, its share of gradients and optimizer state (`zero2`) and of
    the weights too (`zero3`). The steps are the same. A run stays with the strategy that it was started with, and with
    ZeRO with its number of workers."""
    offload: bool = False
    """zero2, zero3: keep the optimizer's state, and with zero3 the weights, in the CPU's memory, not in the GPU's."""

    @property
    def range_of_workers(self) -> tuple[int, int] | None:
        return None if self.min_workers is None else (self.min_workers, self.workers)

    @property
    def fixed(self) -> tuple[str, ...]:
        """What may not change while a run has checkpoints: how they are divided among files."""
        return ("strategy",) if self.strategy == "ddp" else ("strategy", "offload", "workers")

    @model_validator(mode="after")
    def _every_option_counts(self) -> DistillExecutionSettings:
        if self.offload and self.strategy == "ddp":
            raise ValueError("offload moves what ZeRO divides: set strategy to zero2 or zero3, or leave it out")
        if self.min_workers is not None and self.strategy != "ddp":
            raise ValueError(
                f"min_workers: {self.strategy}'s checkpoints are divided among {self.workers} workers, and fewer can't "
                "read them: leave it out, or use strategy: ddp"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) is above workers ({self.workers})")
        return self


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
    log_every_steps: PositiveInt = 10
    """Between two validations: how often losses, gradient norm, learning rate and speed are written, as means since the
    last line."""
    tokens_per_micro_batch: PositiveInt = 2048
    """Padded tokens in one forward pass: small enough that a step falls into batches of like lengths. A pair that is
    longer is a pass alone."""
    tokens_per_backward: PositiveInt = 4096
    """Tokens whose activations are held at once: a step with more runs backward several times, to the same gradient. In
    bfloat16 each micro-batch among them holds the weights in that type, too: where they are many, raise
    tokens_per_micro_batch with it."""
    backward: Literal["auto", "plain", "cached"] = "auto"
    """`plain` never splits a query's group. `cached` keeps nothing of the forward pass but scores (head mvp: the views
    of each passage, and the decoder's pass over them) and computes each micro-batch again for its backward: the same
    gradient in the memory of one micro-batch, in 0.8 to 1.1 times the time (MiniLM on a CPU).
    `auto` caches the groups that are larger than tokens_per_backward."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; weights and optimizer stay float32."""
    seed: NonNegativeInt = 0
    """Of heads, held-out queries, order, sampling and dropout."""
    execution: DistillExecutionSettings = DistillExecutionSettings()

    @model_validator(mode="after")
    def _copies_are_whole(self) -> DistillSettings:
        copies = {
            "optimizer.averaging": self.optimizer.averaging,
            "validation.interpolation": self.validation.interpolation,
        }
        for name, wanted in copies.items():
            if wanted and self.execution.strategy == "zero3":
                raise ValueError(
                    f"{name} keeps a second copy of all weights on every worker, which zero3 divides: leave it out, or "
                    "use execution.strategy: zero2"
                )
        return self

    @model_validator(mode="after")
    def _interpolates_weights(self) -> DistillSettings:
        if self.validation.interpolation and self.student.lora is not None:
            raise ValueError(
                "validation.interpolation is between weights, and student.lora trains adapters, whose share is alpha / "
                "rank: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _there_are_views(self) -> DistillSettings:
        default = ObjectiveSettings.model_fields["orthogonality"].default
        if self.objective.orthogonality != default and self.student.head != "mvp":
            raise ValueError(
                f"objective.orthogonality is for student.head mvp, and the head is {self.student.head}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _groups_have_negatives(self) -> DistillSettings:
        check_group(self.objective, self.sampling.group_size)
        return self

    @model_validator(mode="after")
    def _a_weight_for_each_layer(self) -> DistillSettings:
        layers = len(self.student.layers or (None,))
        for number, term in enumerate(self.objective.losses):
            if term.layer_weights is not None and len(term.layer_weights) != layers:
                raise ValueError(
                    f"objective.losses.{number}.layer_weights has {len(term.layer_weights)} entries for {layers} "
                    "layer(s) with a head (student.layers)"
                )
        return self
