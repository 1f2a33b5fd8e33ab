"""What each job's config may say: the models that YAML files are validated against."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Settings

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
StudentHead = Literal["linear", "similarity"]


# Models


class ModelSettings(Settings):
    """A model and how its engine runs it."""

    path: str
    """Hub id (`org/name`), local folder, or `package://NAME/path` of an installed Python package; a path that ends in
    `.gguf` is a GGUF file."""
    revision: str | None = None
    """Hub commit or tag; refused for folders and packages, which have none."""
    device: str = "auto"
    """`auto` takes CUDA when there is one, or any torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is bfloat16 where the device computes it natively and float32 elsewhere."""
    max_length: PositiveInt = 512
    """Tokens per sequence, template included; only the passage is truncated to fit."""
    tokens_per_batch: PositiveInt | None = None
    """Padded tokens in one forward pass; null is 4,096 on a CPU, whose caches hold no more, and 65,536 on a GPU."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint ships."""
    allow_pickle: bool = False
    """Load `.bin` weights; unpickling runs code of whoever made the file."""

    @model_validator(mode="after")
    def _a_sequence_fits_a_batch(self) -> ModelSettings:
        if self.tokens_per_batch is not None and self.tokens_per_batch < self.max_length:
            raise ValueError(
                f"tokens_per_batch ({self.tokens_per_batch}) is smaller than max_length ({self.max_length}): one "
                "sequence would not fit a batch; raise the first or lower the second"
            )
        return self


class HFCausalSettings(ModelSettings):
    """A decoder LLM run by transformers (safetensors or GGUF)."""

    kind: Literal["hf_causal"] = "hf_causal"
    max_length: PositiveInt = 1024
    chat: bool | None = None
    """Wrap prompts in the tokenizer's chat template; null does so when it has one and the prompt is a chat prompt."""


class CrossEncoderSettings(ModelSettings):
    """A cross-encoder: a sequence-classification checkpoint with one output, or a student of ours."""

    kind: Literal["cross_encoder"] = "cross_encoder"
    exit_layer: PositiveInt | None = None
    """Layer-wise students only: the layer to stop at; null is the last."""


class BiEncoderSettings(ModelSettings):
    """A sentence encoder; pooling and normalisation come from its sentence-transformers files when it has them."""

    kind: Literal["bi_encoder"] = "bi_encoder"
    pooling: Literal["mean", "cls", "last"] | None = None
    """null reads it from the checkpoint, or takes the mean."""
    query_prefix: str = ""
    """Put before every query, for example `query: ` for E5."""
    document_prefix: str = ""
    """Put before every document."""


class FakeSettings(Settings):
    """Answers made from a hash of the call: for tests of everything around a model."""

    kind: Literal["fake"] = "fake"
    seed: int = 0
    """Another seed gives other answers."""
    seconds_per_call: Annotated[float, Field(ge=0.0)] = 0.0
    """Time each call takes."""
    fail_on: str | None = None
    """Calls whose text holds this string fail."""
    crash_on: str | None = None
    """Calls whose text holds this string end the process at once, like a segmentation fault."""


# Rankers


class YesNoSettings(Settings):
    """Relevance generation: logit(yes) − logit(no) at the next position."""

    method: Literal["yes_no"] = "yes_no"
    model: Annotated[HFCausalSettings | FakeSettings, Field(discriminator="kind")]
    prompt: str = "yes_no"
    """A built-in template's name or the path of a YAML template."""


class QueryLikelihoodSettings(Settings):
    """Mean log-probability of the query's tokens after the passage."""

    method: Literal["query_likelihood"] = "query_likelihood"
    model: Annotated[HFCausalSettings | FakeSettings, Field(discriminator="kind")]
    prompt: str = "query_likelihood"
    """A built-in template's name or the path of a YAML template."""


class CrossEncoderRankerSettings(Settings):
    """The score of a cross-encoder."""

    method: Literal["cross_encoder"] = "cross_encoder"
    model: Annotated[CrossEncoderSettings | FakeSettings, Field(discriminator="kind")]


class BiEncoderRankerSettings(Settings):
    """Cosine of the query's and the document's embeddings."""

    method: Literal["bi_encoder"] = "bi_encoder"
    model: Annotated[BiEncoderSettings | FakeSettings, Field(discriminator="kind")]


class BM25Settings(Settings):
    """BM25 over a collection (Lucene's idf), whatever the first stage was."""

    method: Literal["bm25"] = "bm25"
    corpus: str
    """The collection: `corpus.jsonl` in BEIR form, or TSV `id<tab>text`; each worker holds its index in memory."""
    k1: PositiveFloat = 0.9
    """Term-frequency saturation."""
    b: Fraction = 0.4
    """Length normalisation."""


class FirstStageSettings(Settings):
    """The first stage's score, as the candidates carry it."""

    method: Literal["first_stage"] = "first_stage"


class ImportedSettings(Settings):
    """Scores read from a run file, for example another system's."""

    method: Literal["imported"] = "imported"
    run: Annotated[list[str], Field(min_length=1)]
    """TREC run or hits files (JSON, JSONL, `.gz`); each worker holds them in memory."""
    outside: Literal["missing", "lowest"] = "missing"
    """A candidate outside the query's imported list: `missing` leaves it without a score (losses ignore it); `lowest`
    gives it the list's lowest score, right when the list is the top of a full ranking, so that whatever it leaves out
    scores no higher."""


RankerSettings = Annotated[
    YesNoSettings
    | QueryLikelihoodSettings
    | CrossEncoderRankerSettings
    | BiEncoderRankerSettings
    | BM25Settings
    | FirstStageSettings
    | ImportedSettings,
    Field(discriminator="method"),
]


# Jobs over rows


class ExecutionSettings(Settings):
    """How rows are spread over the cluster; none of it changes a score, so a resumed run may change it."""

    actors: PositiveInt = 1
    """Model replicas."""
    cpus_per_actor: PositiveFloat = 1.0
    """Logical CPUs a replica reserves; on a CPU replica also its torch threads, at least one."""
    gpus_per_actor: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs a replica reserves."""
    memory_gb_per_actor: Annotated[float, Field(ge=0.0)] = 0.0
    """Memory a replica reserves, in GiB; 0 reserves none."""
    rows_per_batch: PositiveInt = 16
    """Queries that one call of a replica ranks side by side."""
    rows_per_block: PositiveInt = 32
    """Queries per output file: what a crash may cost."""
    max_crashes_per_row: PositiveInt = 2
    """A row whose work ended the replica's process this often becomes a row with `error`."""
    no_progress_timeout_s: PositiveInt = 1800
    """A run in which nothing finished for this long ends with an error."""


class LimitSettings(Settings):
    """Bounds beyond which a finished job counts as failed; its output is kept."""

    max_error_rate: Fraction = 0.01
    """Rows with `error` / rows."""
    max_defect_rate: Fraction = 0.05
    """Rows with at least one defect / rows."""


class RankJobSettings(Settings):
    """What the label and the rerank job share."""

    input: str
    """Candidate Parquet: a file, a folder or a run folder."""
    execution: ExecutionSettings = ExecutionSettings()
    limits: LimitSettings = LimitSettings()


class LabelSettings(RankJobSettings):
    """`rerank-ray label`: candidate lists to soft labels."""

    teacher: RankerSettings


class RerankSettings(RankJobSettings):
    """`rerank-ray rerank`: candidate lists to rankings."""

    ranker: RankerSettings
    trec_run: bool = True
    """Also write `run.trec` into the run folder."""


class CombineSettings(Settings):
    """`rerank-ray combine`: several label runs over the same candidates to one."""

    inputs: Annotated[list[str], Field(min_length=2)]
    """Label runs (folders)."""
    method: Literal["zscore", "minmax", "rrf", "borda"] = "zscore"
    """How scores of one query become comparable before they are averaged."""
    weights: list[PositiveFloat] | None = None
    """One weight a run; null weighs all alike."""

    @model_validator(mode="after")
    def _a_weight_for_each_input(self) -> CombineSettings:
        if self.weights is not None and len(self.weights) != len(self.inputs):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.inputs)} inputs")
        return self


class EvaluateSettings(Settings):
    """`rerank-ray evaluate`: rankings against qrels."""

    rankings: Annotated[dict[str, str], Field(min_length=1)]
    """Name in the table -> run folder, candidate Parquet or TREC run."""
    qrels: str
    """TREC qrels or BEIR TSV."""
    metrics: tuple[str, ...] = ("ndcg@10", "mrr@10")
    """ranx names: ndcg@k, mrr@k, map@k, recall@k, precision@k; `-l2` counts gains from 2 as relevant."""


# Distillation


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
    scale: PositiveFloat = 20.0
    """similarity: initial factor of the cosine."""
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
