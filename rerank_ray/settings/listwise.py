"""Ranking methods that show a model several passages in one prompt: sets, windows, groups, and attention over them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from rerank_ray.config import Fraction, Settings, refuse_idle
from rerank_ray.settings.models import BiEncoderSettings, FakeSettings, HFCausalSettings, LanguageModelSettings


class _SetsSettings(Settings):
    """What methods that ask for the best of a set share."""

    strategy: Literal["heapsort", "bubblesort"] = "heapsort"
    """Both sort the first k places; bubblesort asks more and is steadier against wrong answers."""
    k: PositiveInt = 10
    """Places that are sorted; below them the first stage's order stays."""
    children: PositiveInt
    """A prompt shows a passage and this many others."""
    permutations: PositiveInt = 1
    """Orders in which each set is asked; the most votes win."""

    @property
    def passages_at_once(self) -> int:
        """Passages in one prompt, at most."""
        return self.children + 1

    @model_validator(mode="after")
    def _a_heap_has_branches(self) -> _SetsSettings:
        if self.strategy == "heapsort" and self.children == 1:
            raise ValueError(
                "children: a heap with one child a node is a chain; take 2 or more, or strategy bubblesort"
            )
        return self


class SetwiseSettings(_SetsSettings):
    """Which of several passages is the most relevant."""

    method: Literal["setwise"] = "setwise"
    model: LanguageModelSettings
    prompt: str = "setwise"
    """A built-in template's name or the path of a YAML template."""
    children: PositiveInt = 2
    """A prompt shows a passage and this many others."""
    mode: Literal["likelihood", "generation"] = "likelihood"
    """likelihood takes the label of the highest logit; generation reads the label off a generated text."""
    max_tokens: PositiveInt = 16
    """generation: tokens of the text."""

    @model_validator(mode="after")
    def _every_option_counts(self) -> SetwiseSettings:
        return refuse_idle(self, "max_tokens", "mode", "likelihood")


class RankR1Settings(_SetsSettings):
    """Setwise with reasoning before the answer (Rank-R1)."""

    method: Literal["rank_r1"] = "rank_r1"
    model: LanguageModelSettings
    prompt: str = "rank_r1"
    """A built-in template's name or the path of a YAML template."""
    children: PositiveInt = 19
    """A prompt shows a passage and this many others."""
    max_tokens: PositiveInt = 2048
    """Tokens of reasoning and answer."""

    @property
    def mode(self) -> Literal["reasoning"]:
        return "reasoning"


class _InContextSettings(Settings):
    """What methods that read attention share."""

    model: Annotated[HFCausalSettings | FakeSettings, Field(discriminator="kind")]
    """Its `max_length` must hold a prompt's documents: where it doesn't, all are cut to the same length."""
    prompt: str = "icr"
    """A built-in template's name or the path of a YAML template."""
    documents_per_prompt: Annotated[int, Field(ge=2)] = 100
    """A longer list is ordered window by window, half a window apart, and its scores are N − rank."""

    @property
    def passages_at_once(self) -> int:
        """Passages in one prompt, at most."""
        return self.documents_per_prompt


class ICRSettings(_InContextSettings):
    """In-context re-ranking: attention from the query to the documents of one prompt, less that from "N/A"."""

    method: Literal["icr"] = "icr"


class CoReHeadsSettings(_InContextSettings):
    """In-context re-ranking over the heads that tell relevant documents from others best."""

    method: Literal["core_heads"] = "core_heads"
    heads_file: str
    """What `rerank-ray detect-heads` wrote for this model."""
    count: PositiveInt = 8
    """How many of its best heads are read."""
    prune: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the layers, the last ones, that are not computed; heads are chosen from the others."""


class ListwiseSettings(Settings):
    """What methods that show the model a list of passages share."""

    passage_words: PositiveInt = 300
    """A passage is cut to so many words; a prompt that is still too long has all its passages cut alike."""


class WindowSettings(ListwiseSettings):
    """A window that slides over the list from its back to its front."""

    window: Annotated[int, Field(ge=2)] = 20
    """Passages in one prompt."""
    step: PositiveInt = 10
    """How far the window moves; window − step passages are carried to the next one."""

    @property
    def passages_at_once(self) -> int:
        """Passages in one prompt, at most."""
        return self.window

    @model_validator(mode="after")
    def _windows_overlap(self) -> WindowSettings:
        if self.step >= self.window:
            raise ValueError(
                f"step ({self.step}) must be smaller than window ({self.window}): windows that don't overlap carry no "
                "passage to the front"
            )
        return self


class RankGPTSettings(WindowSettings):
    """Listwise permutations over sliding windows (RankGPT). The prompt `insert_rank` also shows first-stage scores,
    `rank_gpt_reasoning` lets the model reason first."""

    method: Literal["rank_gpt"] = "rank_gpt"
    model: LanguageModelSettings
    prompt: str = "rank_gpt"
    """A built-in template's name (rank_gpt, rank_gpt_reasoning, insert_rank) or the path of a YAML template."""
    passes: PositiveInt = 1
    """How often the window passes over the whole list."""
    max_tokens: PositiveInt = 256
    """Tokens of one answer, reasoning included, which takes thousands."""


class FirstSettings(WindowSettings):
    """Listwise ranking by the first token of the answer: the logits of the passages' letters (FIRST)."""

    method: Literal["first"] = "first"
    model: LanguageModelSettings
    prompt: str = "first"
    """A built-in template's name or the path of a YAML template; its `labels` are the passages' letters."""
    window: Annotated[int, Field(ge=2, le=26)] = 20
    """Passages in one prompt, a letter each."""
    passes: PositiveInt = 1
    """How often the window passes over the whole list."""


class PermutationSelfConsistencySettings(WindowSettings):
    """Rankings of shuffled lists, aggregated to one (permutation self-consistency)."""

    method: Literal["permutation_self_consistency"] = "permutation_self_consistency"
    model: LanguageModelSettings
    prompt: str = "rank_gpt"
    """A template of rank_gpt: a built-in one's name or the path of a YAML template."""
    permutations: Annotated[int, Field(ge=2)] = 20
    """Shuffles of the list, each ranked by sliding windows of its own."""
    aggregation: Literal["borda", "rrf", "kemeny"] = "kemeny"
    """How the rankings become one: mean rank, mean reciprocal rank, or the order that disagrees least with them."""
    seed: int = 0
    """With the query id, what the shuffles are drawn from."""
    max_tokens: PositiveInt = 256
    """Tokens of one answer, reasoning included, which takes thousands."""


class _GroupsSettings(ListwiseSettings):
    """What methods that grade the passages of a group share."""

    group_size: PositiveInt = 10
    """Passages in one prompt, at most."""
    max_tokens: PositiveInt = 512
    """Tokens of one answer, reasoning included, which takes thousands."""

    @property
    def passages_at_once(self) -> int:
        """Passages in one prompt, at most."""
        return self.group_size


class GroupRankSettings(_GroupsSettings):
    """Grades from 0 to 10 for every passage of random groups; a score is their mean over shuffles / 10 (GroupRank)."""

    method: Literal["group_rank"] = "group_rank"
    model: LanguageModelSettings
    prompt: str = "group_rank"
    """A built-in template's name or the path of a YAML template."""
    shuffles: PositiveInt = 1
    """How often the list is shuffled, divided into groups, whose sizes differ by one at most, and scored."""
    rerank_weight: Fraction = 1.0
    """w in w · score + (1 − w) · first-stage score scaled to 0 … 1 within the query; the paper has 0.6, and 1 leaves
    the first stage out."""
    seed: int = 0
    """With the query id, what the groups are drawn from."""


class RebelSettings(_GroupsSettings):
    """Relevance and criteria that the model first writes for the query (REBEL)."""

    method: Literal["rebel"] = "rebel"
    model: LanguageModelSettings
    prompt: str = "rebel"
    """The scoring template: a built-in one's name or the path of a YAML template."""
    criteria_prompt: str = "rebel_criteria"
    """The template that asks for criteria: a built-in one's name or the path of a YAML template."""
    criteria: PositiveInt = 3
    """Criteria asked for, beside relevance."""


class E2RankSettings(ListwiseSettings):
    """Cosine with a query that is embedded together with its first passages (E²Rank)."""

    method: Literal["e2rank"] = "e2rank"
    model: Annotated[BiEncoderSettings | FakeSettings, Field(discriminator="kind")]
    prompt: str = "e2rank"
    """A built-in template's name or the path of a YAML template."""
    documents: Annotated[int, Field(ge=1, le=20)] = 20
    """Documents beside the query, those of highest cosine with it alone."""
    passage_words: PositiveInt = 300
    """A document beside the query is cut to so many words; a text too long for the model is an error of the row."""

    @property
    def passages_at_once(self) -> int:
        """Passages in one prompt, at most."""
        return self.documents
