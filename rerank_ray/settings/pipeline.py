"""What a pipeline file may say: ingests, and steps that each are one job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Fraction, Settings
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.jobs import CombineSettings, EvaluateSettings, LabelSettings, RerankSettings
from rerank_ray.settings.synthesize import SynthesizeSettings


class BeirIngestSettings(Settings):
    """A BEIR folder, with BM25 as first stage."""

    kind: Literal["beir"]
    folder: str
    """Holds corpus.jsonl, queries.jsonl and qrels/."""
    split: str | None
    """qrels/<split>.tsv names the queries; null takes all."""
    depth: PositiveInt = 100
    """Candidates a query."""
    k1: PositiveFloat = 0.9
    """BM25's term-frequency saturation."""
    b: Fraction = 0.4
    """BM25's length normalisation."""
    skip_bad_lines: bool = False
    """Count and list bad lines instead of stopping at the first."""


class HitsIngestSettings(Settings):
    """Hits files of RankGPT or RankLLM: JSON or JSONL, `.gz` included."""

    kind: Literal["hits"]
    files: Annotated[list[str], Field(min_length=1)]
    """Their queries are put one after another."""
    qrels: str | None = None
    """Sets the candidates' `label`."""
    depth: PositiveInt | None = None
    """Candidates a query; null keeps all."""
    skip_bad_lines: bool = False
    """Count and list bad lines instead of stopping at the first."""


class TrecIngestSettings(Settings):
    """A TREC run with its topics and collection."""

    kind: Literal["trec"]
    run: str
    """Six columns."""
    queries: str
    """Topics as TSV or JSONL."""
    corpus: str
    """Collection as TSV or JSONL."""
    qrels: str | None = None
    """Sets the candidates' `label`."""
    depth: PositiveInt | None = None
    """Candidates a query; null keeps all."""
    skip_bad_lines: bool = False
    """Count and list bad lines instead of stopping at the first."""


class _ListsIngestSettings(Settings):
    """What ingests of training lists share; their output is labels."""

    files: Annotated[list[str], Field(min_length=1)]
    """Their lists are put one after another."""
    depth: PositiveInt | None = None
    """Candidates a query, positives first; null keeps all."""
    skip_bad_lines: bool = False
    """Count and list bad lines instead of stopping at the first."""


class FlagEmbeddingIngestSettings(_ListsIngestSettings):
    """FlagEmbedding's JSONL: `query, pos, neg`, and `pos_scores, neg_scores` where a teacher gave some."""

    kind: Literal["flagembedding"]


class SentenceTransformersIngestSettings(_ListsIngestSettings):
    """Labelled lists of sentence-transformers, JSONL or Parquet: a query, its docs, and `labels` or `scores`."""

    kind: Literal["sentence-transformers"]


class MarginMSEIngestSettings(_ListsIngestSettings):
    """Triplets of sentence-transformers' MarginMSELoss, JSONL or Parquet: query, two passages, and `label`."""

    kind: Literal["margin-mse"]


class TevatronIngestSettings(_ListsIngestSettings):
    """Tevatron's JSONL: `query_id, query, positive_passages, negative_passages`."""

    kind: Literal["tevatron"]


class TriplesIngestSettings(_ListsIngestSettings):
    """MS MARCO triples: TSV of query, positive and negative."""

    kind: Literal["triples"]
    queries: str | None = None
    """Topics as TSV or JSONL, for triples of ids; null when the columns are texts."""
    corpus: str | None = None
    """Collection as TSV or JSONL, for triples of ids."""


class RankDistiLLMIngestSettings(TrecIngestSettings):
    """A teacher's TREC run with topics and collection: its ranks are the labels."""

    kind: Literal["rank-distillm"]


class MergeIngestSettings(Settings):
    """Candidates of several first stages over the same queries, merged by doc id."""

    kind: Literal["merge"]
    inputs: Annotated[list[str], Field(min_length=2)]
    """Candidate Parquet, or ingest steps; the order of queries is the first's."""
    method: Literal["rrf", "interleave"] = "rrf"
    """`rrf` orders by, and sets `score` to, the sum of 1/(60 + rank); `interleave` takes every first candidate, then
    every second, and leaves `score` null."""
    depth: PositiveInt | None = None
    """Candidates a query; null keeps all."""


IngestSettings = Annotated[
    BeirIngestSettings
    | HitsIngestSettings
    | TrecIngestSettings
    | MergeIngestSettings
    | FlagEmbeddingIngestSettings
    | SentenceTransformersIngestSettings
    | MarginMSEIngestSettings
    | TevatronIngestSettings
    | TriplesIngestSettings
    | RankDistiLLMIngestSettings,
    Field(discriminator="kind"),
]
JOBS = ("ingest", "synthesize", "label", "combine", "distill", "rerank", "evaluate")


class StepSettings(Settings):
    """One job of a pipeline: a name, and exactly one of the jobs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The step's run folder inside the pipeline's."""
    ingest: IngestSettings | None = None
    """Outside data to candidates."""
    synthesize: SynthesizeSettings | None = None
    """A collection to candidates of queries that an LLM writes."""
    label: LabelSettings | None = None
    """Candidates to labels."""
    combine: CombineSettings | None = None
    """Label runs to one."""
    distill: DistillSettings | None = None
    """Labels to a student."""
    rerank: RerankSettings | None = None
    """Candidates to rankings."""
    evaluate: EvaluateSettings | None = None
    """Rankings to a table."""

    @model_validator(mode="after")
    def _one_job(self) -> StepSettings:
        given = [job for job in JOBS if getattr(self, job) is not None]
        if len(given) != 1:
            raise ValueError(f"step {self.name!r} needs exactly one of {', '.join(JOBS)}; it has {given or 'none'}")
        return self

    @property
    def job(self) -> str:
        return next(job for job in JOBS if getattr(self, job) is not None)


class PipelineSettings(Settings):
    """`rerank-ray pipeline`: jobs one after another; `step://NAME` stands for the run folder of an earlier step."""

    steps: Annotated[list[StepSettings], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_are_unique_and_known(self) -> PipelineSettings:
        seen: set[str] = set()
        for step in self.steps:
            if step.name in seen:
                raise ValueError(f"two steps are called {step.name!r}")
            for reference in step_references(step.model_dump()):
                if reference not in seen:
                    raise ValueError(f"step {step.name!r}: step://{reference} is no earlier step ({sorted(seen)})")
            seen.add(step.name)
        return self


STEP_SCHEME = "step://"


def step_references(value: object) -> list[str]:
    """Names of the steps that a config's strings refer to."""
    if isinstance(value, str):
        return [value.removeprefix(STEP_SCHEME).split("/")[0]] if value.startswith(STEP_SCHEME) else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [name for item in items for name in step_references(item)]
