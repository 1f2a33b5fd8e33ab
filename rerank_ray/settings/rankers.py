"""Ranking methods: what a teacher, a baseline or a reranker is made of. Those that show a model several passages in one
prompt are in `listwise`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Fraction, Settings, refuse_idle
from rerank_ray.settings.listwise import (
    CoReHeadsSettings,
    E2RankSettings,
    FirstSettings,
    GroupRankSettings,
    ICRSettings,
    PermutationSelfConsistencySettings,
    RankGPTSettings,
    RankR1Settings,
    RebelSettings,
    SetwiseSettings,
)
from rerank_ray.settings.models import (
    BiEncoderSettings,
    ColBERTSettings,
    CrossEncoderSettings,
    FakeSettings,
    LanguageModelSettings,
    LayerwiseSettings,
    ScalarHeadSettings,
)
from rerank_ray.uncertainty import UncertaintyCriterion

FusionMethod = Literal["zscore", "minmax", "rrf", "borda", "kemeny"]


class YesNoSettings(Settings):
    """Relevance generation: logit(yes) − logit(no) at the next position."""

    method: Literal["yes_no"] = "yes_no"
    model: LanguageModelSettings
    prompt: str = "yes_no"
    """A built-in template's name or the path of a YAML template."""
    score: Literal["log_odds", "probability", "sampled", "logit"] = "log_odds"
    """log_odds: log p(yes) − log p(no); probability: p(yes) among the two; sampled: 1 + p if the answer is yes and
    1 − p if it is no, for servers that tell the probability of a sampled token only; logit: the logit of yes alone, for
    FlagEmbedding's LLM rerankers (prompt: bge_reranker_llm)."""


class FineGrainedSettings(Settings):
    """Relevance on a scale, or in several levels in words."""

    method: Literal["fine_grained"] = "fine_grained"
    model: LanguageModelSettings
    prompt: str = "fine_grained"
    """A built-in template's name (`fine_grained`: 0 to 4; `fine_grained_levels`: three levels in words) or the path of
    a YAML template."""
    score: Literal["expectation", "top"] = "expectation"
    """expectation: Σ p_k·k over the levels 0..K; top: the log-likelihood of the most relevant level."""
    read: Literal["next_token", "log_likelihood"] = "next_token"
    """expectation: levels of one token from the next token's logits, one call a candidate; or levels of any length from
    their log-likelihoods, one call a candidate and level."""

    @model_validator(mode="after")
    def _every_option_counts(self) -> FineGrainedSettings:
        return refuse_idle(self, "read", "score", "top")


class ERankSettings(Settings):
    """An integer 0 to 10 after reasoning; the reasoning is kept as the rationale."""

    method: Literal["erank"] = "erank"
    model: LanguageModelSettings
    prompt: str = "erank"
    """A built-in template's name or the path of a YAML template."""
    score: Literal["weighted", "integer"] = "weighted"
    """weighted: the integer times its probability, which takes a second call a candidate; integer: as it is."""
    max_tokens: PositiveInt = 1024
    """Of reasoning and answer together."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 is greedy."""
    seed: NonNegativeInt = 0
    """Of sampling."""


class QueryLikelihoodSettings(Settings):
    """Mean log-probability of the query's tokens after the passage."""

    method: Literal["query_likelihood"] = "query_likelihood"
    model: LanguageModelSettings
    prompt: str = "query_likelihood"
    """A built-in template's name or the path of a YAML template."""


class PRPSettings(Settings):
    """Pairwise ranking prompting: which of two passages is more relevant, asked in both orders."""

    method: Literal["prp"] = "prp"
    model: LanguageModelSettings
    prompt: str = "prp"
    """A built-in template's name or the path of a YAML template."""
    strategy: Literal["allpair", "heapsort", "sliding"] = "heapsort"
    """allpair compares every two passages and counts; heapsort and sliding (k passes from the bottom up) sort the first
    k places and leave the first stage's order below."""
    k: PositiveInt = 10
    """heapsort, sliding: places that are sorted."""
    mode: Literal["scoring", "generation"] = "scoring"
    """scoring compares the logits of the two labels; generation reads the label off a generated text."""
    max_tokens: PositiveInt = 16
    """generation: tokens of the text."""

    @model_validator(mode="after")
    def _every_option_counts(self) -> PRPSettings:
        refuse_idle(self, "k", "strategy", "allpair")
        return refuse_idle(self, "max_tokens", "mode", "scoring")


class DuoT5Settings(Settings):
    """The probability that one passage is more relevant than another, over all ordered pairs of the first passages."""

    method: Literal["duot5"] = "duot5"
    model: LanguageModelSettings
    prompt: str = "duot5"
    """A built-in template's name or the path of a YAML template."""
    top: PositiveInt = 50
    """Candidates that are compared, top × (top − 1) prompts; the others follow in their order."""
    aggregation: Literal["sum", "sum_log", "sym_sum", "sym_sum_log"] = "sym_sum"
    """How the probabilities of a passage's pairs become its score: of p_ij alone (sum), or of p_ij and 1 − p_ji
    (sym_sum), as they are or as logarithms."""


class CrossEncoderRankerSettings(Settings):
    """The score of a model that reads query and document together."""

    method: Literal["cross_encoder"] = "cross_encoder"
    model: Annotated[
        CrossEncoderSettings | ScalarHeadSettings | LayerwiseSettings | FakeSettings, Field(discriminator="kind")
    ]


class BiEncoderRankerSettings(Settings):
    """Cosine of the query's and the document's embeddings."""

    method: Literal["bi_encoder"] = "bi_encoder"
    model: Annotated[BiEncoderSettings | FakeSettings, Field(discriminator="kind")]


class MaxSimSettings(Settings):
    """Late interaction: each query token's best match in the document, added up."""

    method: Literal["maxsim"] = "maxsim"
    model: Annotated[ColBERTSettings | FakeSettings, Field(discriminator="kind")]


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


class CompositionSettings(Settings):
    """Base of the rankers that are made of other rankers, which may be compositions themselves."""

    @property
    @abstractmethod
    def children(self) -> dict[str, RankerSettings]:
        """The rankers by their path in this config."""


class EnsembleSettings(CompositionSettings):
    """Several rankers' scores, made comparable within each query and averaged; `uncertainty` is their disagreement."""

    method: Literal["ensemble"] = "ensemble"
    rankers: Annotated[list[RankerSettings], Field(min_length=1)]
    """Each ranks every query."""
    combine: FusionMethod = "zscore"
    """How scores of one query become comparable before they are averaged; kemeny: the order that disagrees least with
    the rankers'."""
    weights: list[PositiveFloat] | None = None
    """One weight a ranker; null weighs all alike."""

    @model_validator(mode="after")
    def _a_weight_for_each_ranker(self) -> EnsembleSettings:
        if self.weights is not None and len(self.weights) != len(self.rankers):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.rankers)} rankers")
        return self

    @property
    def children(self) -> dict[str, RankerSettings]:
        return {f"rankers.{i}": ranker for i, ranker in enumerate(self.rankers)}


class CascadeStageSettings(Settings):
    """One stage of a cascade."""

    ranker: RankerSettings
    """Reranks what the stages before it left on top."""
    keep: PositiveInt | None = None
    """How many candidates of the order so far it reranks; the others keep their order below. null is all of them."""


class CascadeSettings(CompositionSettings):
    """Stages one after another, each of which reranks the top of the order that the one before it left."""

    method: Literal["cascade"] = "cascade"
    stages: Annotated[list[CascadeStageSettings], Field(min_length=1)]
    """From the cheapest to the most expensive."""

    @property
    def children(self) -> dict[str, RankerSettings]:
        return {f"stages.{i}.ranker": stage.ranker for i, stage in enumerate(self.stages)}


class SelectiveSettings(CompositionSettings):
    """An expensive ranker for the queries alone whose cheap ranking is uncertain."""

    method: Literal["selective"] = "selective"
    cheap: RankerSettings
    """Ranks every query."""
    expensive: RankerSettings
    """Reranks the top `k` of the uncertain ones."""
    k: PositiveInt
    """Candidates that the expensive ranker reranks; uncertainty is read off the same top `k` of the cheap scores."""
    criterion: UncertaintyCriterion = "entropy"
    """With p the softmax of the top `k` scores: `entropy` is p's entropy / log k, `margin` is 1 − (p₁ − p₂)."""
    threshold: Annotated[float, Field(ge=-1.0, le=1.0)]
    """Queries whose uncertainty, between 0 and 1, lies above it take the expensive ranker: −1 sends all, 1 none.
    `rerank-ray selectivity` finds the threshold for a budget."""

    @property
    def children(self) -> dict[str, RankerSettings]:
        return {"cheap": self.cheap, "expensive": self.expensive}


RankerSettings = Annotated[
    YesNoSettings
    | FineGrainedSettings
    | ERankSettings
    | QueryLikelihoodSettings
    | PRPSettings
    | DuoT5Settings
    | SetwiseSettings
    | RankR1Settings
    | ICRSettings
    | CoReHeadsSettings
    | CrossEncoderRankerSettings
    | BiEncoderRankerSettings
    | MaxSimSettings
    | BM25Settings
    | RankGPTSettings
    | FirstSettings
    | PermutationSelfConsistencySettings
    | GroupRankSettings
    | RebelSettings
    | E2RankSettings
    | FirstStageSettings
    | ImportedSettings
    | EnsembleSettings
    | CascadeSettings
    | SelectiveSettings,
    Field(discriminator="method"),
]
for _recursive in (EnsembleSettings, CascadeStageSettings, CascadeSettings, SelectiveSettings):
    _recursive.model_rebuild()
