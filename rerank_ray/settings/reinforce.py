"""Reinforcement learning: the language model that writes rankings, what it is rewarded for, and its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Settings
from rerank_ray.settings.distill import TrainingExecutionSettings
from rerank_ray.settings.models import HFCausalSettings
from rerank_ray.settings.optimizer import OptimizerSettings
from rerank_ray.settings.sampling import SamplingSettings
from rerank_ray.settings.student import LoraSettings


class PolicySettings(Settings):
    """A decoder LLM that is trained to write: what `hf_causal` runs, before and after."""

    base: str
    """Pretrained model to start from: hub id, folder, `package://` or GGUF file."""
    revision: str | None = None
    """Hub commit or tag."""
    lora: LoraSettings | None = LoraSettings()
    """Adapters, on a model that stays in `dtype`; null trains all weights, which are then float32."""
    max_length: PositiveInt = 4096
    """Tokens of prompt and answer together; passages are cut to what the answer leaves."""
    chat: bool | None = None
    """Wrap prompts in the tokenizer's chat template; null does so when it has one and the prompt is a chat prompt."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic, and with adapters the frozen weights; what is trained stays float32."""
    gradient_checkpointing: bool = False
    """Compute each layer again for its backward, for the memory of long texts and deep models."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint ships."""
    allow_pickle: bool = False
    """Load `.bin` weights; unpickling runs code of whoever made the file."""

    def model_settings(self) -> HFCausalSettings:
        return HFCausalSettings(
            path=self.base,
            revision=self.revision,
            max_length=self.max_length,
            chat=self.chat,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )


class ProRankRewardSettings(Settings):
    """One passage at a time, relevant or not: 1 for an answer that is one of the template's two labels and nothing
    else, 1 more for the right one (ProRank's warm-up, Li et al. 2025)."""

    kind: Literal["prorank"] = "prorank"
    prompt: str = "prorank"
    """A built-in template's name or the path of a YAML template, of method yes_no."""
    max_tokens: PositiveInt = 4
    """Of an answer, the end of the turn included."""


class ERankRewardSettings(Settings):
    """One passage at a time, an integer 0 to 10 after reasoning, rewarded by its rank among all of the query's (Cai et
    al. 2025). The teacher's scores are taken for those of the model before reinforcement: label with method erank and
    `score: integer`."""

    kind: Literal["erank"] = "erank"
    prompt: str = "erank"
    """A built-in template's name or the path of a YAML template, of method erank."""
    max_tokens: PositiveInt = 1024
    """Of reasoning and answer together."""
    penalty: PositiveFloat = 100.0
    """What an unreadable answer costs, and one that puts an irrelevant passage above a relevant one. The paper does not
    give it; 100 is the most that an integer's squared distance from its reference can be."""


class RankR1RewardSettings(Settings):
    """Which of the passages is the most relevant: 1 if form and passage are right, otherwise 0 (Rank-R1, Zhuang et al.
    2025). Right is any passage with the highest gain of those shown."""

    kind: Literal["rank_r1"] = "rank_r1"
    prompt: str = "rank_r1"
    """A built-in template's name or the path of a YAML template, of method rank_r1."""
    reasoning: bool = True
    """The form has a think block before the answer; false: the answer alone."""
    max_tokens: PositiveInt = 2048
    """Of reasoning and answer together."""
    passage_words: PositiveInt = 200
    """Words of a passage that the prompt shows."""


class ReasonRankRewardSettings(Settings):
    """A permutation of the passages: nDCG@10 + 0.2 · recall@10 + 0.1 · agreement with the teacher's order; 0 for no
    whole permutation, −1 for a bad form (ReasonRank, Liu et al. 2025)."""

    kind: Literal["reason_rank"] = "reason_rank"
    prompt: str = "rank_gpt_reasoning"
    """A built-in template's name or the path of a YAML template, of method rank_gpt."""
    reasoning: bool = True
    """The form has a think block before `<answer>`; false: the permutation alone."""
    max_tokens: PositiveInt = 2048
    """Of reasoning and answer together."""
    passage_words: PositiveInt = 200
    """Words of a passage that the prompt shows."""


class GroupRankRewardSettings(Settings):
    """Grades 0 to 10 of all passages as JSON: nDCG@10 + 0.2 · recall@10 + 0.1 · (1 − JS divergence of grades and
    gains); −0.1 for bad JSON, −0.5 for no answer (GroupRank, Sun et al. 2025)."""

    kind: Literal["group_rank"] = "group_rank"
    prompt: str = "group_rank"
    """A built-in template's name or the path of a YAML template, of method group_rank."""
    max_tokens: PositiveInt = 2048
    """Of reasoning and answer together."""
    passage_words: PositiveInt = 200
    """Words of a passage that the prompt shows."""


RewardSettings = Annotated[
    ProRankRewardSettings
    | ERankRewardSettings
    | RankR1RewardSettings
    | ReasonRankRewardSettings
    | GroupRankRewardSettings,
    Field(discriminator="kind"),
]


class RewardValidationSettings(Settings):
    """How the kept step is chosen: by the mean reward of greedy answers to queries held out of training."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the queries held out; which ones depends on their ids and the seed alone. Where that is none,
    training is refused."""
    queries: PositiveInt | None = 100
    """Held-out queries that are answered, at most; null is all."""
    every_steps: PositiveInt = 20
    """Steps between validations; a checkpoint is written at each."""


class ReinforceSettings(Settings):
    """`rerank-ray reinforce`: GRPO (Shao et al. 2024) on ranking rewards."""

    input: Annotated[list[str], Field(min_length=1)]
    """Label runs, or folders of label Parquet, whose candidates have known gains (`label`): rewards are by these."""
    policy: PolicySettings
    reward: RewardSettings
    sampling: SamplingSettings = SamplingSettings(group_size=8, positives=1)
    """Candidates of a query that are shown, in an order drawn anew each epoch. A group without a known gain, or with
    nothing else, is skipped."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Answers drawn to each prompt, among which rewards are compared."""
    temperature: PositiveFloat = 1.0
    """Of sampling; the policy is the model at this temperature."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Probability ratios outside 1 ± clip get no gradient that would take them further."""
    kl_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Of the KL divergence from the model without its adapters."""
    updates_per_step: PositiveInt = 1
    """Optimizer updates on the same answers; clipping acts from the second on."""
    queries_per_step: PositiveInt = 4
    """Queries whose answers are drawn in one step, over all workers."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-5, weight_decay=0.0, decay="constant")
    """`head_learning_rate` and `averaging` have no part in it."""
    validation: RewardValidationSettings = RewardValidationSettings()
    epochs: PositiveInt = 1
    """Passes over the training queries."""
    max_steps: PositiveInt | None = None
    """Ends training earlier; the learning rate's schedule follows."""
    tokens_per_micro_batch: PositiveInt = 8192
    """Tokens of one forward and backward: a prompt once, and answers to it."""
    seed: NonNegativeInt = 0
    """Of adapters, held-out queries, order, groups and answers."""
    execution: TrainingExecutionSettings = TrainingExecutionSettings()

    @model_validator(mode="after")
    def _answers_are_the_policys_own(self) -> ReinforceSettings:
        lora = self.policy.lora
        if lora is not None and lora.dropout:
            raise ValueError("policy.lora.dropout: answers are drawn without it, so they must be learnt without it")
        if lora is None and self.kl_weight:
            raise ValueError("kl_weight is of the divergence from the model without its adapters: set policy.lora")
        if self.reward.max_tokens >= self.policy.max_length:
            raise ValueError(
                f"policy.max_length ({self.policy.max_length}) leaves no room for a prompt beside an answer of "
                f"reward.max_tokens ({self.reward.max_tokens}): raise the first or lower the second"
            )
        return self
