"""Distillation: the student, its objective and its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Fraction, Settings
from rerank_ray.settings.models import ModelSettings

StudentHead = Literal["linear", "similarity", "yes_no", "token_logit", "bi_encoder", "colbert"]
_LAYERED: tuple[StudentHead, ...] = ("linear", "similarity")
_PROMPTED: tuple[StudentHead, ...] = ("yes_no", "token_logit")
_PREFIXED: tuple[StudentHead, ...] = ("linear", "bi_encoder")


class OptimizerSettings(Settings):
    """AdamW with a linear warm-up."""

    learning_rate: PositiveFloat = 2e-5
    """Peak rate of the backbone."""
    head_learning_rate: PositiveFloat = 1e-3
    """Peak rate of what is new: heads and gates."""
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


class ExitWarmUpSettings(Settings):
    """What early exits of a similarity student learn before the labels: to score as its untrained last layer does.

    An early layer's states were never trained to be compared. In each step one training list's query and spans of its
    passages (the inverse cloze task, Lee et al. 2019) are scored against its passages at every exit, and the KL to the
    untrained last layer's distribution is taken. No label is looked at.
    """

    steps: PositiveInt = 300
    """Optimizer steps."""
    passages: Annotated[int, Field(ge=2)] = 28
    """Passages of a list that a step draws."""
    spans: NonNegativeInt = 20
    """Spans of 3 to 9 words that a step draws from those passages, to be queries beside the list's own."""
    max_passage_length: PositiveInt = 128
    """Tokens of a passage; longer ones are cut."""
    temperature: PositiveFloat = 0.2
    """Divides the scores of both sides."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-4)
    """`averaging` has no part in it."""


class LoraSettings(Settings):
    """Low-rank adapters on linear layers in place of full training (Hu et al. 2022); new parameters are trained whole.

    Their rate is the optimizer's `learning_rate`, for which 1e-4 is usual.
    """

    rank: PositiveInt = 16
    """Of each adapter's two matrices."""
    alpha: PositiveInt = 32
    """An adapter's product is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Of what an adapter reads."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Ends of the linear layers' names, for example `[q_proj, v_proj]`; null is every linear layer but the head."""
    dora: bool = False
    """Learn the weights' magnitudes apart from their directions (DoRA, Liu et al. 2024)."""
    save: Literal["merged", "adapter"] = "merged"
    """`merged` adds the adapters to the weights of the saved student, which then loads everywhere; `adapter` saves them
    alone, in PEFT's layout, and loading needs `base`."""


class FreezeSettings(Settings):
    """Parts of the pretrained model that training leaves as they are."""

    embeddings: bool = False
    """Of tokens, and what else the architecture keeps with them; an output layer that shares their weights too."""
    layers: NonNegativeInt = 0
    """The first so many layers."""


class StudentSettings(Settings):
    """The student and how it starts."""

    base: str
    """Pretrained model to start from: hub id, folder, `package://` or GGUF file."""
    revision: str | None = None
    """Hub commit or tag."""
    head: StudentHead = "linear"
    """`linear` is the architecture's own head, on the first token of an encoder or the last of a decoder, and loads
    anywhere; `similarity` makes a cross-encoder start from a bi-encoder's cosine. Decoders and seq2seq models stay
    language models with `yes_no`, the log-odds of a prompt's two answers, and `token_logit`, one token's logit.
    `bi_encoder` (cosine) and `colbert` (MaxSim) embed query and document apart."""
    layers: tuple[PositiveInt, ...] | None = None
    """Layers that get a head, ascending, the last one included: a layer-wise student. null is the last layer only."""
    max_length: PositiveInt = 256
    """Tokens of query and document together; where they are encoded apart, the document has what the query leaves."""
    max_query_length: PositiveInt = 64
    """Tokens of the query; longer ones are cut."""
    query_prefix: str | None = None
    """linear and bi_encoder: put before every query; null is `query: ` for decoders with a linear head, as RankLLaMA's,
    `Query: ` for T5's encoder, and otherwise nothing."""
    document_prefix: str | None = None
    """linear and bi_encoder: put before every document; null as for queries."""
    instruction: str | None = None
    """linear, decoders: what stands after query and document, as FlagEmbedding's LLM rerankers have it: the pair is
    then `[bos] query "\\n" document "\\n" instruction` with the prefixes `A: ` and `B: `, and `rerank-ray export` can
    write the layer-wise student for FlagEmbedding. null joins a pair as the tokenizer does, with nothing behind."""
    prompt: str = "yes_no"
    """yes_no and token_logit: a built-in template's name or the path of a YAML template, of method yes_no."""
    token: str = "<extra_id_10>"
    """token_logit: whose logit after the prompt is the score, in place of the template's answers; the default is
    RankT5's, a word that T5 never learnt to say."""
    gate: float = -8.0
    """similarity: initial attention bias between the segments; −8 shuts it, 0 leaves attention free."""
    scale: PositiveFloat | tuple[PositiveFloat, ...] = 4.0
    """similarity, bi_encoder, colbert: initial factor of cosine and MaxSim, which sets the untrained scores on
    the scale of its labels: on SPLADE's lists of TREC-DL MiniLM's KL to z-scored labels is 0.49 at 4, 0.53 at 2 and
    1.09 at 12. A list has one for each of `layers`."""
    interaction: Annotated[float, Field(ge=0.0)] | tuple[Annotated[float, Field(ge=0.0)], ...] = 2.0
    """similarity: initial weight of MaxSim beside the cosine; 0 starts as the bi-encoder itself. Of 0, 0.5, 1, 2 and 4
    the untrained MiniLM student agrees best with SPLADE's lists of TREC-DL 2021 and 2022 at 2 (nDCG@10 against the
    teacher's first ten: 0.48, and 0.40 at 0). A list has one for each of `layers`: an early layer's cosine tells
    little (MiniLM's fourth: 0.18), its MaxSim more (0.39)."""
    exit_warm_up: ExitWarmUpSettings | None = None
    """similarity, with several `layers`: train the early exits on unlabelled text first."""
    dropout: Fraction | None = 0.0
    """Hidden and attention dropout; null keeps the checkpoint's. Any dropout on attention rules out its fused kernel,
    which doubles the memory of a step."""
    take_layers: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Start from some of the layers of `base`, which is then a smaller model: these, counted from 1 and ascending, or
    with one number n every n-th (Shleifer & Rush 2020). null is all."""
    freeze: FreezeSettings = FreezeSettings()
    lora: LoraSettings | None = None
    """null trains all weights that are not frozen."""
    gradient_checkpointing: bool = False
    """Compute each layer again for its backward, for the memory of long inputs and deep models."""
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

    @model_validator(mode="after")
    def _each_exit_starts(self) -> StudentSettings:
        count = len(self.layers or (None,))
        for name in ("scale", "interaction"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != count:
                raise ValueError(f"{name} has {len(given)} entries for {count} layer(s) with a head (layers)")
        if self.exit_warm_up is not None and (self.head != "similarity" or count == 1):
            raise ValueError("exit_warm_up is for head: similarity with several layers: leave it out")
        return self

    @model_validator(mode="after")
    def _every_option_counts(self) -> StudentSettings:
        owners = {"layers": _LAYERED, "query_prefix": _PREFIXED, "document_prefix": _PREFIXED}
        owners |= {"prompt": _PROMPTED, "token": ("token_logit",), "instruction": ("linear",)}
        for option, heads in owners.items():
            if getattr(self, option) != type(self).model_fields[option].default and self.head not in heads:
                raise ValueError(f"{option} is for head {' and '.join(heads)}, and the head is {self.head}")
        if self.lora is not None and self.freeze != FreezeSettings():
            raise ValueError("freeze changes nothing with lora, which trains adapters alone: leave it out")
        if self.lora is not None and self.lora.save == "adapter" and self.take_layers is not None:
            raise ValueError(
                "lora.save: adapter is of no use without all layers of base: leave save or take_layers out"
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


class FalseNegativeSettings(Settings):
    """Which candidates the teacher holds too close to a query's positive to be its negatives: they are never drawn.

    The positive is the candidate with a known gain that the teacher likes best, or the teacher's first when no gain is
    known; candidates with a known gain are always kept. With both rules, either drops.
    """

    margin: Annotated[float, Field(ge=0.0)] | None = None
    """Drops scores above the positive's − margin, in the teacher's units."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Drops scores above this fraction of the way from the list's lowest score to the positive's."""

    @model_validator(mode="after")
    def _a_rule(self) -> FalseNegativeSettings:
        if self.margin is None and self.fraction is None:
            raise ValueError("false_negatives drops nothing without margin or fraction: give one, or leave it out")
        return self


class CurriculumStage(Settings):
    """Bands for the first epochs."""

    until_epoch: PositiveInt
    """The stage ends after this many epochs, counted from the start of training."""
    bands: Annotated[tuple[BandSettings, ...], Field(min_length=1)]
    """In place of the sampling's own."""


class SamplingSettings(Settings):
    """Which candidates of a query are scored in one step; drawn anew each epoch."""

    group_size: PositiveInt = 16
    """Candidates a query; lists that are shorter are taken whole."""
    positives: NonNegativeInt = 0
    """Candidates with a known gain that are drawn first, if there are as many; `ce`, `lce` and the lambda losses on
    gains learn nothing from a group without one."""
    bands: tuple[BandSettings, ...] | None = None
    """null draws uniformly from all scored candidates."""
    curriculum: tuple[CurriculumStage, ...] = ()
    """Other bands for early epochs, for example easy negatives before hard ones; `bands` holds when all are over."""
    false_negatives: FalseNegativeSettings | None = None
    """null draws every scored candidate, however close to the positive."""

    def bands_of(self, epoch: int) -> tuple[BandSettings, ...] | None:
        """The bands of an epoch, counted from 0."""
        return next((s.bands for s in self.curriculum if epoch < s.until_epoch), self.bands)

    @model_validator(mode="after")
    def _bands_fill_the_group(self) -> SamplingSettings:
        if self.positives > self.group_size:
            raise ValueError(f"positives ({self.positives}) is above group_size ({self.group_size})")
        stages = {f"curriculum.{n}.bands": s.bands for n, s in enumerate(self.curriculum)}
        for name, bands in {"bands": self.bands, **stages}.items():
            count = sum(b.count for b in bands or ())
            if bands is not None and count != self.group_size - self.positives:
                less = f" − positives ({self.positives})" if self.positives else ""
                raise ValueError(
                    f"{name}: the bands' counts add up to {count}, not to group_size ({self.group_size}){less}"
                )
        return self

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> SamplingSettings:
        ends = [s.until_epoch for s in self.curriculum]
        if ends != sorted(set(ends)):
            raise ValueError(f"curriculum: until_epoch must rise from stage to stage, not {ends}")
        return self


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
    """cprd: how many of the hardest negatives are ordered; null orders all."""
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


class ObjectiveSettings(Settings):
    """Σ weight · loss, on every layer that has a head, plus what the last layer teaches the others."""

    losses: Annotated[tuple[LossSettings, ...], Field(min_length=1)] = (
        LossSettings(loss="kl", scores="zscore"),
        LossSettings(loss="ranknet"),
        LossSettings(loss="ce", weight=0.1),
    )
    self_distillation: Annotated[float, Field(ge=0.0)] = 1.0
    """Layer-wise students: weight of KL(last layer ‖ earlier layer), the last layer's gradient stopped."""
    query_weights: Literal["equal", "uncertainty"] = "equal"
    """`uncertainty` weighs a query 1 / (1 + mean of its candidates' `uncertainty`): lists that an ensemble of teachers
    disagrees on count less."""


class ValidationSettings(Settings):
    """How the kept step is chosen, on queries held out of training: by nDCG@10, of a layer-wise student the mean
    over its layers."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the queries held out, at least one; which ones depends on their ids and the seed alone."""
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
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs a worker reserves."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the run gives up; each resumes from the last checkpoint."""

    @property
    def range_of_workers(self) -> tuple[int, int] | None:
        """The fewest and the most workers; None when there are always `workers`."""
        return None


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
    tokens_per_micro_batch: PositiveInt = 2048
    """Padded tokens in one forward pass: small enough that a step falls into batches of like lengths."""
    tokens_per_backward: PositiveInt = 4096
    """Tokens whose activations are held at once: a step with more runs backward several times, to the same gradient."""
    backward: Literal["auto", "plain", "cached"] = "auto"
    """`plain` never splits a query's group. `cached` keeps nothing of the forward pass but scores and computes each
    micro-batch again for its backward: the same gradient in the memory of one micro-batch, for about a third more time.
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
    def _a_weight_for_each_layer(self) -> DistillSettings:
        layers = len(self.student.layers or (None,))
        for number, term in enumerate(self.objective.losses):
            if term.layer_weights is not None and len(term.layer_weights) != layers:
                raise ValueError(
                    f"objective.losses.{number}.layer_weights has {len(term.layer_weights)} entries for {layers} "
                    "layer(s) with a head (student.layers)"
                )
        return self
