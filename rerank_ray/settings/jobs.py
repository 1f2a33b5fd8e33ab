"""Jobs over rows: label, rerank, combine, evaluate."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Fraction, Settings
from rerank_ray.records import DefectKind
from rerank_ray.settings.models import FakeSettings, HFCausalSettings
from rerank_ray.settings.rankers import FusionMethod, RankerSettings
from rerank_ray.settings.resources import GPUs, Needs, Resources

_CPUS_OF_READING_AND_WRITING = 1.5
_ROWS_OF_A_BLOCK = 32


class ExecutionSettings(Settings):
    """How rows are spread over the cluster; none of it changes a score, so a resumed run may change it."""

    actors: PositiveInt = 1
    """Model replicas."""
    cpus_per_actor: PositiveFloat = 1.0
    """Logical CPUs a replica reserves; on a CPU replica also its torch threads, at least one. Reading, dividing and
    writing rows needs 1.5 more of the cluster's."""
    gpus_per_actor: GPUs = 0.0
    """GPUs a replica reserves."""
    memory_gb_per_actor: Annotated[float, Field(ge=0.0)] = 0.0
    """Memory a replica reserves, in GiB; 0 reserves none."""
    rows_per_batch: PositiveInt = 16
    """Queries that one call of a replica ranks side by side, at most; fewer where a job's last batches would leave
    replicas without work."""
    rows_per_block: PositiveInt | None = None
    """Queries per output file, at most, and so per batch: what a crash may cost, and what one replica takes at a time.
    null: 32, or `rows_per_batch` where that is more."""
    max_crashes_per_row: PositiveInt = 2
    """A row whose work ended the replica's process this often becomes a row with `error`."""
    no_progress_timeout_s: PositiveInt = 21_600
    """A run that finished no block for this long ends with an error, whether replicas hang, or wait for a cluster to
    grow."""

    @property
    def block_rows(self) -> int:
        """`rows_per_block`, given or not."""
        return self.rows_per_block or max(_ROWS_OF_A_BLOCK, self.rows_per_batch)

    @property
    def needs(self) -> Needs:
        """Of all replicas, and of what reads, divides and writes rows beside them."""
        one = Resources(self.cpus_per_actor, self.gpus_per_actor, self.memory_gb_per_actor)
        cpus, gpus, memory_gb = (self.actors * amount for amount in one)
        return Needs(total=Resources(cpus + _CPUS_OF_READING_AND_WRITING, gpus, memory_gb), one=one)


class StoreSettings(Settings):
    """Answers of models, shared by any number of jobs and kept between them: a call that is there is not made again.
    Attention, token embeddings (ColBERT) and scores of whole lists (adaptive exits, MVP) are not kept.

    It changes no score, so a resumed run may change it. Give hub models a `revision`: without one, answers of an
    earlier version are taken for the present one's; so are those of a server whose model changed behind its name. A
    text that could not be read is an answer too: `--retry-errors --set store=null` asks for another.
    """

    uri: str
    """Folder of the store, made if missing: any pyarrow filesystem that every replica sees."""
    max_gb: PositiveFloat = 2.0
    """GiB beyond which no answer is added while a job runs, and the job says how many were not. Before a job the oldest
    are dropped until a tenth is free. A yes/no answer takes some 40 bytes, and 12 of each replica's memory."""


class LimitSettings(Settings):
    """Bounds beyond which a finished job counts as failed; its output is kept."""

    max_error_rate: Fraction = 0.01
    """Rows with `error` / rows."""
    max_defect_rate: Fraction = 0.05
    """Rows that were scored, with at least one defect / rows."""
    max_defect_rates: dict[DefectKind, Fraction] = Field(default={})
    """Bounds for single kinds of defects, for example `{refusal: 0.001}`: rows with at least one of the kind, scored or
    not / rows."""


class RankJobSettings(Settings):
    """What the label and the rerank job share."""

    input: str
    """Candidate Parquet: a file, a folder or a run folder."""
    execution: ExecutionSettings = ExecutionSettings()
    limits: LimitSettings = LimitSettings()
    store: StoreSettings | None = None
    """The label store: `{uri: FOLDER}`; null asks the model for everything."""


class LabelSettings(RankJobSettings):
    """`rerank-ray label`: candidate lists to soft labels."""

    teacher: RankerSettings


class RerankSettings(RankJobSettings):
    """`rerank-ray rerank`: candidate lists to rankings."""

    ranker: RankerSettings
    trec_run: bool = True
    """Also write `run.trec` into the run folder."""


class DetectHeadsSettings(Settings):
    """`rerank-ray detect-heads`: labelled candidate lists to a heads file for the method `core_heads`."""

    input: str
    """Candidate Parquet with labels: a file, a folder or a run folder."""
    model: Annotated[HFCausalSettings | FakeSettings, Field(discriminator="kind")]
    """Its `max_length` must hold a prompt's documents: where it doesn't, all are cut to the same length."""
    prompt: str = "icr"
    """A built-in template's name or the path of a YAML template."""
    output: str
    """The heads file (JSON)."""
    documents_per_prompt: Annotated[int, Field(ge=2)] = 20
    """The first candidates of each list, in random order: the relevant ones and the hard negatives of the first stage.
    A list without either is left out."""
    min_gain: float = 1.0
    """Candidates with this label or a higher one are relevant; all others, unlabelled ones too, are not."""
    temperature: PositiveFloat = 0.01
    """T of the softmax: the smaller it is, the more only the highest of the negatives counts."""
    max_queries: PositiveInt | None = None
    """Queries to use; null uses all."""
    queries_per_batch: PositiveInt = 4
    """Queries that the model reads side by side; it changes no score."""
    seed: int = 0
    """Of the documents' order."""


class CombineSettings(Settings):
    """`rerank-ray combine`: several label runs over the same candidates to one."""

    inputs: Annotated[list[str], Field(min_length=2)]
    """Label runs (folders)."""
    method: FusionMethod = "zscore"
    """How scores of one query become comparable before they are averaged; kemeny instead takes the order that disagrees
    least with all of them."""
    weights: list[PositiveFloat] | None = None
    """One weight a run; null weighs all alike."""
    limits: LimitSettings = LimitSettings(max_error_rate=0.05)
    """A query that any run failed on, or of which it labelled other candidates, is a row with `error`."""

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
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ("ndcg@10", "mrr@10")
    """ranx names: ndcg@k, mrr@k, map@k, recall@k, precision@k; `-l2` counts gains from 2 as relevant."""
