"""Synthetic queries: an LLM writes them for passages of a collection."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from rerank_ray.config import Fraction, Settings
from rerank_ray.settings.jobs import ExecutionSettings, LimitSettings, StoreSettings
from rerank_ray.settings.models import LanguageModelSettings
from rerank_ray.settings.rankers import RankerSettings


class QueryWriterSettings(Settings):
    """The LLM that writes queries, and how."""

    method: Literal["write_query"] = "write_query"
    model: LanguageModelSettings
    prompt: str = "write_query"
    """A built-in template's name or the path of a YAML template."""
    max_tokens: PositiveInt = 64
    """Tokens of an answer; a query that is cut off there is an error of its row."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.7
    """0 writes the likeliest query; above, each query is a sample with a seed of its own."""


class RoundTripSettings(Settings):
    """A ranker that has to find the way back from a query to its passage."""

    ranker: RankerSettings
    """Ranks the query's candidates, with `bi_encoder` by cosine."""
    top: PositiveInt = 1
    """The query stays if its passage is among the first so many."""


class SynthesizeSettings(Settings):
    """`rerank-ray synthesize`: passages of a collection to candidate lists of queries that an LLM wrote for them."""

    corpus: str
    """Collection as TSV or JSONL, or candidates, whose lists' documents are the collection then."""
    writer: QueryWriterSettings
    passages: PositiveInt = 1000
    """Passages drawn from the collection; which ones depends on their ids and the seed alone."""
    queries_per_passage: PositiveInt = 1
    """Queries written for each, every one with a seed of its own."""
    depth: PositiveInt = 100
    """Candidates a query, by BM25."""
    k1: Annotated[float, Field(ge=0.0)] = 0.9
    """BM25's term-frequency saturation."""
    b: Fraction = 0.4
    """BM25's length normalisation."""
    bm25_top: PositiveInt | None = 10
    """A query stays if BM25 finds its passage among the first so many; null asks for the candidates only."""
    round_trip: RoundTripSettings | None = None
    """A second way back that has to be found; null leaves it at BM25's."""
    max_copied_words: PositiveInt | None = 8
    """A query with a longer run of words that stands in its passage, title included, word for word is left out: it
    teaches to match words. null allows any."""
    seed: NonNegativeInt = 0
    """Of the passages drawn and of what is sampled."""
    execution: ExecutionSettings = ExecutionSettings()
    limits: LimitSettings = LimitSettings(max_error_rate=0.1)
    """Of the passages' rows: refusals and answers that hold no query are errors."""
    store: StoreSettings | None = None
    """The label store: `{uri: FOLDER}`; null asks the models for everything."""

    @model_validator(mode="after")
    def _queries_of_one_passage_differ(self) -> SynthesizeSettings:
        if self.queries_per_passage > 1 and self.writer.temperature == 0:
            raise ValueError("queries_per_passage: at temperature 0 all queries of a passage are the same: sample them")
        if self.bm25_top is not None and self.bm25_top > self.depth:
            raise ValueError(f"bm25_top ({self.bm25_top}) is above depth ({self.depth})")
        return self
