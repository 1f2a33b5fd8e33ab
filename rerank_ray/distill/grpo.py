"""Reinforcement learning on ranking rewards: GRPO (group-relative policy optimisation, Shao et al. 2024).

A step draws several answers to each of its prompts and rewards them. An answer's advantage is its reward's distance
from the mean of the answers to the same prompt, so that no value model is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from rerank_ray.distill.labels import LabelSet, Steps
from rerank_ray.distill.optimizer import set_learning_rate
from rerank_ray.distill.parallel import World
from rerank_ray.distill.policy_trainer import PolicyTrainer
from rerank_ray.distill.rewards import HIGHEST_GRADE, Reward
from rerank_ray.distill.sampling import sample_group
from rerank_ray.distill.seeds import seed_of
from rerank_ray.distill.tasks import gains_of, make_task
from rerank_ray.distill.train import Report
from rerank_ray.errors import InputError
from rerank_ray.models import engine
from rerank_ray.models.protocol import Answer, Generate, Prompt
from rerank_ray.models.student.adaptation import set_dropout
from rerank_ray.prompts.passages import has_what_is_shown
from rerank_ray.prompts.render import Template
from rerank_ray.records import Labels
from rerank_ray.settings.reinforce import ReinforceSettings

_TINY = 1e-4


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(reward − mean) / standard deviation among the answers to each prompt, [prompts, samples]; 0 where all are worth
    the same."""
    distance = rewards - rewards.mean(dim=1, keepdim=True)
    scaled = distance / (rewards.std(dim=1, correction=0, keepdim=True) + _TINY)
    return torch.where((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0, scaled)


def clipped_loss(
    log_probabilities: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip: float
) -> torch.Tensor:
    """−min(r · A, clamp(r, 1 − clip, 1 + clip) · A) of each token [T], r the ratio to the probability it was drawn with
    (PPO, Schulman et al. 2017)."""
    ratio = (log_probabilities - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def kl_estimate(log_probabilities: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """exp(d) − d − 1, d = log p_ref − log p, of each token [T]: unbiased for KL(p ‖ p_ref), and never negative."""
    difference = reference - log_probabilities
    return difference.exp() - difference - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Answers to one prompt."""

    prompt: Sequence[int]
    texts: tuple[tuple[int, ...], ...]
    """Their tokens."""
    advantages: tuple[float, ...]
    weight: float
    """Of each answer in the step's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A query's prompts, the answers to them [prompts][samples], and what these are worth."""

    prompts: list[Prompt]
    answers: list[list[Answer]]
    rewards: list[list[Reward]]


class GRPOTrainer(PolicyTrainer):
    """A policy, its optimizer, and its place in the data."""

    memory_advice = "lower tokens_per_micro_batch, or set policy.gradient_checkpointing"

    def __init__(
        self, settings: ReinforceSettings, world: World, resume: Path | None, data: LabelSet | None = None
    ) -> None:
        """`data` is what `open_labels` gives, where that was done already."""
        self.task = make_task(settings.reward)
        self.data = data or open_labels(settings)
        self.reader, self.validation_reader = self.data.reader(), self.data.reader()
        self.steps = Steps(self.data, settings.seed, settings.queries_per_step)
        total_steps = min(settings.max_steps or math.inf, settings.epochs * self.steps.per_epoch)
        super().__init__(settings, world, resume, total_steps)
        # Answers are learnt by the policy that drew them.
        set_dropout(self.policy, 0.0)
        self._check_fits()
        self._sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)

    def _check_fits(self) -> None:
        """Raise `ModelError` where a query's prompt, its passages cut to a token each, leaves no room for an answer."""
        (labels,) = self.reader.read(self.data.train[:1])
        for prompt in self._prompts(labels, self._shown(labels, 0)):
            self.policy.backend.check_fits(prompt, self.settings.reward.max_tokens)

    def train_step(self) -> None:
        """Draw answers to the step's queries and update the policy on them."""
        started = time.perf_counter()
        set_learning_rate(self.optimizer, self.settings.optimizer, self.progress.step, self.total_steps)
        groups = self.draw()
        before: list[list[torch.Tensor]] = []
        for _ in range(self.settings.updates_per_step):
            before = self._update(groups, before)
        self.progress.step += 1
        self._sums["seconds"] += time.perf_counter() - started

    def draw(self) -> list[Group]:
        """The policy's own answers to this worker's queries of the step, with their advantages.

        Prompts whose answers are all worth the same teach nothing, and are left out unless the KL is part of the loss.
        """
        positions, epoch = self.steps.at(self.progress.step)
        rows = list(self.reader.read(positions[self.world.rank :: self.world.size]))
        asked = self._ask(rows, epoch, self.settings.samples, self.settings.temperature)
        groups = []
        for query in asked:
            values = torch.tensor([[r.value for r in of_prompt] for of_prompt in query.rewards])
            by_prompt = advantages(values)
            calls = [Generate(prompt=p, max_tokens=self.settings.reward.max_tokens) for p in query.prompts]
            ids = [encoded.prompt for encoded in self.policy.backend.encoder.encode_calls(calls)]
            # Every query of all workers counts alike, however many prompts it has.
            weight = 1.0 / (len(positions) * values.numel())
            for prompt, answers, advantage in zip(ids, query.answers, by_prompt.tolist(), strict=True):
                self._sums["prompts"] += 1
                if not any(advantage):
                    self._sums["prompts_without_signal"] += 1
                if any(advantage) or self.settings.kl_weight:
                    texts = tuple(a.tokens for a in answers)
                    groups.append(Group(prompt=prompt, texts=texts, advantages=tuple(advantage), weight=weight))
            self._count(query)
        return groups

    def _ask(self, rows: Sequence[Labels], epoch: int, samples: int, temperature: float) -> list[_Asked]:
        """Answers to the prompts of all queries, drawn side by side; queries that can't be asked are left out."""
        settings = self.settings
        shown = [(labels, self._shown(labels, epoch)) for labels in rows]
        usable = [(labels, indices) for labels, indices in shown if len({g > 0 for g in gains_of(labels, indices)}) > 1]
        self._sums["skipped_queries"] += len(rows) - len(usable)
        prompts = [self._prompts(labels, indices) for labels, indices in usable]
        calls = [
            Generate(
                prompt=prompt,
                max_tokens=settings.reward.max_tokens,
                temperature=temperature,
                seed=seed_of(settings.seed, self.progress.step, labels.candidate_list.query.query_id, number, sample),
            )
            for (labels, _), of_query in zip(usable, prompts, strict=True)
            for number, prompt in enumerate(of_query)
            for sample in range(samples)
        ]
        with self.policy.autocast():
            results = iter(self.policy.backend.run(calls))
        asked = []
        for (labels, indices), of_query in zip(usable, prompts, strict=True):
            answers = [[next(results) for _ in range(samples)] for _ in of_query]
            if all(isinstance(a, Answer) for of_prompt in answers for a in of_prompt):
                worth = self.task.rewards(labels, indices, answers)
                asked.append(_Asked(prompts=of_query, answers=answers, rewards=worth))
            else:
                self._sums["skipped_queries"] += 1
        return asked

    def _prompts(self, labels: Labels, indices: Sequence[int]) -> list[Prompt]:
        prompts = self.task.prompts(labels, indices)
        if not self.task.answers_at_once:
            return prompts
        return [self.policy.backend.encoder.answering(prompt) for prompt in prompts]

    def _shown(self, labels: Labels, epoch: int) -> list[int]:
        """The epoch's candidates of a query, in the order that a prompt shows them."""
        group = sample_group(labels, self.settings.sampling, self.settings.seed, epoch)
        number = seed_of(self.settings.seed, epoch, labels.candidate_list.query.query_id)
        return np.random.default_rng(number).permutation(group).tolist()

    def _update(self, groups: Sequence[Group], before: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """One optimizer update; returns the answers' log-probabilities, of each group's micro-batches.

        `before` are those of the first update: the policy that drew the answers. Empty is that update itself.
        """
        # Only in this mode are activations computed again; nothing else hangs on it.
        self.policy.train(self.settings.policy.gradient_checkpointing)
        told = []
        for number, group in enumerate(groups):
            room = max(1, self.settings.tokens_per_micro_batch - len(group.prompt))
            parts = engine.group_in_order([len(t) for t in group.texts], room)
            told.append(
                [self._backward(group, part, before[number][i] if before else None) for i, part in enumerate(parts)]
            )
        self._sums["gradient_norm"] += self.update()
        self.policy.eval()
        self._sums["updates"] += 1
        return before or told

    def _backward(self, group: Group, part: Sequence[int], old: torch.Tensor | None) -> torch.Tensor:
        """Add the gradient of some of a group's answers; returns their tokens' log-probabilities."""
        settings, texts = self.settings, [group.texts[i] for i in part]
        now = self.policy.log_probabilities(group.prompt, texts, settings.temperature)
        old = now.detach() if old is None else old
        spread = [(group.advantages[i], group.weight / len(group.texts[i]), len(group.texts[i])) for i in part]
        advantage = torch.tensor([a for a, _, length in spread for _ in range(length)], device=now.device)
        weights = torch.tensor([w for _, w, length in spread for _ in range(length)], device=now.device)
        loss = clipped_loss(now, old, advantage, settings.clip)
        if settings.kl_weight:
            with torch.no_grad(), self.policy.without_adapters():
                reference = self.policy.log_probabilities(group.prompt, texts, settings.temperature)
            divergence = kl_estimate(now, reference)
            loss = loss + settings.kl_weight * divergence
            self._sums["kl"] += float(divergence.detach().sum())
        (weights * loss).sum().backward()
        outside = ((now.detach() - old).exp() - 1).abs() > settings.clip
        self._sums["clipped"] += float(outside.sum())
        self._sums["learnt_tokens"] += len(now)
        return now.detach()

    def _count(self, asked: _Asked) -> None:
        rewards = [r for of_prompt in asked.rewards for r in of_prompt]
        self._sums["answers"] += len(rewards)
        self._sums["reward"] += sum(r.value for r in rewards)
        self._sums["well_formed"] += sum(r.well_formed for r in rewards)
        self._sums["tokens"] += sum(len(a.tokens) for of_prompt in asked.answers for a in of_prompt)

    def validate(self) -> dict[str, float]:
        """Mean reward and share of well-formed greedy answers to held-out queries, each query counting alike."""
        positions = self.data.validation[: self.settings.validation.queries][self.world.rank :: self.world.size]
        skipped, size = self._sums["skipped_queries"], self.settings.queries_per_step
        totals = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(positions), size):
            rows = list(self.validation_reader.read(positions[start : start + size]))
            # The same groups at every validation: those of the first epoch.
            for query in self._ask(rows, 0, 1, 0.0):
                given = [r for of_prompt in query.rewards for r in of_prompt]
                mean = sum(r.value for r in given) / len(given)
                well_formed = sum(r.well_formed for r in given) / len(given)
                totals += torch.tensor([mean, well_formed, 1.0], dtype=torch.float64)
        self._sums["skipped_queries"] = skipped
        totals = self.over_workers(totals)
        if totals[2] == 0:
            raise InputError(
                f"{', '.join(self.settings.input)}: no held-out query has both candidates with a known gain and others "
                "among those shown, and a prompt that fits policy.max_length: raise validation.fraction, "
                "sampling.positives or max_length"
            )
        return {
            "validation_reward": float(totals[0] / totals[2]),
            "validation_well_formed": float(totals[1] / totals[2]),
        }

    def validate_and_report(self, report: Report) -> None:
        metrics = self._since_last() | {"step": self.progress.step, "total_steps": self.total_steps}
        started = time.perf_counter()
        metrics |= self.validate()
        progress = self.progress
        # Greedy answers stop changing while drawn ones still improve, so of equal steps the last is kept.
        if metrics["validation_reward"] >= progress.best_score:
            progress.best_score, progress.best_step = metrics["validation_reward"], progress.step
        metrics |= {
            "epoch": progress.step / self.steps.per_epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "validation_seconds": time.perf_counter() - started,
            "best_step": progress.best_step,
        }
        self.report_checkpoint(report, metrics)

    def _since_last(self) -> dict[str, float]:
        """Means since the last report, over all workers' answers."""
        sums = dict(zip(_SUMS, self.over_workers(torch.tensor(list(self._sums.values()))).tolist(), strict=True))
        self._sums = dict.fromkeys(_SUMS, 0.0)
        if not sums["answers"]:
            return {"skipped_queries": sums["skipped_queries"]} if sums["skipped_queries"] else {}
        learnt = max(1.0, sums["learnt_tokens"])
        means = {name: sums[name] / sums["answers"] for name in ("reward", "well_formed", "tokens")}
        return {
            **means,
            "prompts_without_signal": sums["prompts_without_signal"] / sums["prompts"],
            "clipped": sums["clipped"] / learnt,
            **({"kl": sums["kl"] / learnt} if self.settings.kl_weight else {}),
            "gradient_norm": sums["gradient_norm"] / sums["updates"],
            "skipped_queries": sums["skipped_queries"],
            "answers_per_second": self.world.size * sums["answers"] / sums["seconds"],
        }


_SUMS = (
    "answers",
    "reward",
    "well_formed",
    "tokens",
    "prompts",
    "prompts_without_signal",
    "skipped_queries",
    "learnt_tokens",
    "clipped",
    "kl",
    "gradient_norm",
    "updates",
    "seconds",
)
"""What is added up between two reports."""


def open_labels(settings: ReinforceSettings) -> LabelSet:
    """The labels, without lists that lack first-stage scores which the prompt shows; refused where they can't reward
    anything.

    Raises:
        InputError: no training query, or no held-out one, has candidates with different known gains, or the first-stage
            scores that the prompt shows; or scores that are to be references of ERank's integers lie outside their
            scale.
        ConfigError: the template is not there, is written for another method, or has fewer labels than a group has
            passages.
    """
    template = make_task(settings.reward).template
    if template.passage is not None:
        template.identifiers(settings.sampling.group_size)
    data = LabelSet.open(settings.input, settings.validation.fraction, settings.seed)
    lowest, highest = data.score_range
    if settings.reward.kind == "erank" and not 0 <= lowest <= highest <= HIGHEST_GRADE:
        raise InputError(
            f"{', '.join(settings.input)}: the teacher's scores go from {lowest:g} to {highest:g}; the reward erank "
            "compares the policy's integers with them, so they must lie between 0 and 10: label with the method erank"
        )
    if data.without_contrast == len(data.train):
        raise InputError(
            f"{', '.join(settings.input)}: no training query ({len(data.train)} of them) has candidates with a known "
            "gain above 0 and others without, so every answer would be worth the same: ingest with qrels, which set "
            "the candidates' 'label'"
        )
    data.require_held_out_gains(settings.input, "raise validation.fraction")
    return _with_shown_scores(data, template, settings) if template.shows_scores else data


def _with_shown_scores(data: LabelSet, template: Template, settings: ReinforceSettings) -> LabelSet:
    kept = data.where(lambda labels: has_what_is_shown(template, labels.candidate_list))
    if len(kept.train) == 0 or len(kept.validation) == 0:
        raise InputError(
            f"{', '.join(settings.input)}: of {len(data.train)} training and {len(data.validation)} held-out lists, "
            f"{len(kept.train)} and {len(kept.validation)} have the first-stage score of each passage, which "
            f"{settings.reward.prompt} shows: label candidates of a first stage, or give a prompt without {{score}}"
        )
    return kept
