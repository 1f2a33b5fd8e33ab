"""Supervised training of a policy on what teachers wrote: permutations and explanations with their reasoning, beside
losses on scores (ReasoningRank, Ji et al. 2024; DeAR's second stage, Abdallah et al. 2025)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed

from rerank_ray.distill.labels import LabelSet, Steps
from rerank_ray.distill.optimizer import set_learning_rate
from rerank_ray.distill.parallel import World
from rerank_ray.distill.policy import Policy
from rerank_ray.distill.policy_trainer import PolicyTrainer
from rerank_ray.distill.sampling import sample_group, teacher_order
from rerank_ray.distill.seeds import seed_of
from rerank_ray.distill.targets import Targets, check_objective, objective, term_names
from rerank_ray.distill.train import Report
from rerank_ray.errors import ConfigError, InputError, RunError
from rerank_ray.models.continuations import THINK
from rerank_ray.models.protocol import Failure, NextToken, Prompt
from rerank_ray.models.tokenizing import PromptTooLongError
from rerank_ray.prompts.passages import has_what_is_shown, prompt_over
from rerank_ray.prompts.render import Template, load_template
from rerank_ray.records import Labels
from rerank_ray.settings.rationale import (
    ExplanationTermSettings,
    PermutationTermSettings,
    RationaleSettings,
    ScoreTermSettings,
    TermSettings,
)

# Methods whose reasoning names passages by their places in a list that was shuffled.
_OF_SHUFFLES = ("group_rank:", "permutation_self_consistency:")
# The method whose score of a passage is the grade that this passage's text ends with. Others' texts compare passages,
# and a composition passes texts on beside scores of its own; either's scores may look like grades.
_OF_GRADES = "erank:"
# What its teacher is called where scores are grades times probabilities, of which 0 alone looks like a grade.
_NO_GRADES = ":score=weighted:"


class Term(Protocol):
    """One part of the objective."""

    settings: TermSettings
    template: Template

    def teaches(self, labels: Labels) -> bool:
        """Whether a list has what the term learns from."""
        ...

    def loss(self, policy: Policy, labels: Labels, seed: int, epoch: int) -> torch.Tensor | None:
        """The term of one query, or None where nothing of it can be learnt in this epoch."""
        ...


class PermutationTerm:
    """Mean negative log-likelihood of the tokens of a listwise teacher's text."""

    def __init__(self, settings: PermutationTermSettings) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "rank_gpt")
        _check_prefill(self.template, settings.reasoning)

    def teaches(self, labels: Labels) -> bool:
        """Raises `ConfigError` where the template has fewer labels than a list that it would show has passages."""
        texts = () if labels.teacher.startswith(_OF_SHUFFLES) else labels.rationales or ()
        told = len(texts) == 1 and bool(texts[0].strip())
        learnable = not any(map(math.isnan, labels.scores)) and (told or not self.settings.reasoning)
        if not (learnable and has_what_is_shown(self.template, labels.candidate_list)):
            return False
        self.template.identifiers(len(labels.candidate_list))
        return True

    def prompt(self, labels: Labels) -> Prompt:
        request = labels.candidate_list
        return prompt_over(self.template, request, range(len(request)), self.settings.passage_words)

    def text(self, labels: Labels) -> str:
        """What the model shall write, after the prefill."""
        names = self.template.identifiers(len(labels.candidate_list))
        answer = " > ".join(f"[{names[i]}]" for i in teacher_order(labels))
        return _turn(labels.rationales[0], answer, self.template) if self.settings.reasoning else answer

    def loss(self, policy: Policy, labels: Labels, seed: int, epoch: int) -> torch.Tensor | None:
        return _mean(_likelihood_loss(policy, self.prompt(labels), self.text(labels)))


class ExplanationTerm:
    """Mean negative log-likelihood of the tokens of a pointwise teacher's texts, passages counting alike."""

    def __init__(self, settings: ExplanationTermSettings) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "erank")
        _check_prefill(self.template, reasoning=True)

    def teaches(self, labels: Labels) -> bool:
        return any(self._explained(labels, i) for i in range(len(labels.candidate_list)))

    def _explained(self, labels: Labels, index: int) -> bool:
        graded = labels.teacher.startswith(_OF_GRADES) and _NO_GRADES not in labels.teacher
        texts = (labels.rationales or ()) if graded else ()
        aligned = len(texts) == len(labels.candidate_list)
        return aligned and bool(labels.rationales[index].strip()) and labels.scores[index] in range(11)

    def text(self, labels: Labels, index: int) -> str:
        """What the model shall write about one passage, after the prefill."""
        return _turn(labels.rationales[index], f"{labels.scores[index]:g}", self.template)

    def loss(self, policy: Policy, labels: Labels, seed: int, epoch: int) -> torch.Tensor | None:
        drawn = sample_group(labels, self.settings.sampling, seed, epoch)
        request = labels.candidate_list
        return _mean(
            *(
                _likelihood_loss(
                    policy, self.template.prompt(request.query, request.candidates[i]), self.text(labels, i)
                )
                for i in drawn
                if self._explained(labels, i)
            )
        )


class ScoreTerm:
    """Losses on the log-odds of a prompt's two answers, one passage at a time."""

    def __init__(self, settings: ScoreTermSettings) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "yes_no")

    def teaches(self, labels: Labels) -> bool:
        return sum(not math.isnan(s) for s in labels.scores) > 1

    def loss(self, policy: Policy, labels: Labels, seed: int, epoch: int) -> torch.Tensor | None:
        drawn = sample_group(labels, self.settings.sampling, seed, epoch)
        encoder = policy.backend.encoder
        asked = [NextToken(prompt=self._prompt(labels, i), labels=self.template.labels) for i in drawn]
        encoded = encoder.encode_calls(asked, room=1)
        if any(isinstance(e, Failure) for e in encoded):
            return None
        logs = [policy.log_probabilities(e.prompt, [[token] for token in e.labels]) for e in encoded]
        scores = torch.stack([of_two[0] - of_two[1] for of_two in logs])
        targets = Targets.of([(labels, drawn)]).to(scores.device)
        return objective(scores[None, None], targets, self.settings.objective)["total"].loss[0]

    def _prompt(self, labels: Labels, index: int) -> Prompt:
        return self.template.prompt(labels.candidate_list.query, labels.candidate_list.candidates[index])


_TERMS: dict[str, type] = {"permutation": PermutationTerm, "explanation": ExplanationTerm, "score": ScoreTerm}


def make_terms(settings: RationaleSettings) -> list[Term]:
    """Raises `ConfigError` when a term's template is not there, or is written for another method."""
    return [_TERMS[term.kind](term) for term in settings.terms]


def _turn(rationale: str, answer: str, template: Template) -> str:
    text = f"{THINK}\n{rationale.strip()}\n</think>\n<answer>{answer}</answer>"
    return text.removeprefix(template.prefill)


def _check_prefill(template: Template, reasoning: bool) -> None:
    begin = f"{THINK}\n" if reasoning else ""
    if not begin.startswith(template.prefill):
        raise ConfigError(f"prompt: the template's prefill is {template.prefill!r}, but the texts begin with {begin!r}")


def _in_turn(prompt: Prompt, text: str, opened: str) -> tuple[Prompt, str]:
    """A prompt and the text behind it, where the chat template opens the model's turn with a think tag, `opened`.

    A text that begins with its reasoning goes on within the block, and one without any ends the block first: what ranks
    takes everything before the block's end for reasoning.
    """
    if not opened:
        return prompt, text
    # The same text as the template's own; what follows is tokenised behind it.
    prompt = replace(prompt, prefill=opened)
    if not text.startswith(THINK):
        return prompt, f"\n</think>\n\n{text}"
    within = text.removeprefix(THINK)
    return prompt, within.lstrip() if opened[-1].isspace() else within


def _likelihood_loss(policy: Policy, prompt: Prompt, text: str) -> torch.Tensor | None:
    """Mean negative log-likelihood of a text's tokens and of the end of the turn; None where they don't fit."""
    prompt, text = _in_turn(prompt, text, policy.backend.encoder.opened_reasoning(prompt))
    tokens = [*policy.backend.encoder.continuation(prompt, text), policy.turn_end(prompt)]
    if len(tokens) >= policy.settings.max_length:
        return None
    (ids,) = policy.backend.encoder.encode([prompt], [len(tokens)])
    return None if isinstance(ids, PromptTooLongError) else -policy.log_probabilities(ids, [tokens]).mean()


def _mean(*losses: torch.Tensor | None) -> torch.Tensor | None:
    known = [loss for loss in losses if loss is not None]
    return torch.stack(known).mean() if known else None


def open_terms(settings: RationaleSettings) -> list[LabelSet]:
    """Each term's labels, without the lists that the term can't learn from.

    Raises:
        InputError: a term has none left to train on or to validate with.
        ConfigError: a term's template is not there, is written for another method, or has too few labels for a list.
    """
    sets = []
    for number, (term, made) in enumerate(zip(settings.terms, make_terms(settings), strict=True)):
        data = LabelSet.open(term.input, settings.validation.fraction, settings.seed)
        if isinstance(term, ScoreTermSettings):
            check_objective(data, term.objective)
        kept = data.where(made.teaches)
        if len(kept.train) == 0 or len(kept.validation) == 0:
            raise InputError(
                f"terms.{number} ({term.kind}): of {len(data.train)} training and {len(data.validation)} held-out "
                f"lists of {', '.join(term.input)}, {len(kept.train)} and {len(kept.validation)} have what it learns "
                f"from: {_WANTED[term.kind]}"
            )
        sets.append(kept)
    return sets


_WANTED = {
    "permutation": "every passage ranked in one window, with its reasoning (a `window` as long as the lists, and a "
    "prompt such as rank_gpt_reasoning), and a first-stage score where the prompt shows them",
    "explanation": "reasoning and an integer 0 to 10 for a passage (method erank with `score: integer`, not in an "
    "ensemble, a cascade or selective)",
    "score": "two scores",
}


class RationaleTrainer(PolicyTrainer):
    """A policy, its optimizer, and its place in each term's data."""

    def __init__(
        self, settings: RationaleSettings, world: World, resume: Path | None, data: Sequence[LabelSet] | None = None
    ) -> None:
        """`data` is what `open_terms` gives, where that was done already."""
        self.data = list(data or open_terms(settings))
        self.terms = make_terms(settings)
        self.readers = [d.reader() for d in self.data]
        self.steps = [Steps(d, settings.seed, settings.queries_per_step) for d in self.data]
        longest = max(steps.per_epoch for steps in self.steps)
        super().__init__(settings, world, resume, min(settings.max_steps or math.inf, settings.epochs * longest))
        for term in self.terms:
            if isinstance(term, ScoreTerm):
                self.policy.backend.check_labels(term.template.labels, term.template.example())
        self._since = torch.zeros(len(self.terms), 2, dtype=torch.float64)
        self._skipped = 0

    def train_step(self) -> None:
        """One optimizer step on Σ weight · mean of each term over its queries of the step."""
        settings = self.settings
        self.policy.train()
        # Dropout, like the data, is a function of where a run stands: a resumed one draws the same.
        torch.manual_seed(seed_of(settings.seed, self.progress.step, self.world.rank))
        set_learning_rate(self.optimizer, settings.optimizer, self.progress.step, self.total_steps)
        for number, (term, of_settings) in enumerate(zip(self.terms, settings.terms, strict=True)):
            positions, epoch = self.steps[number].at(self.progress.step)
            for labels in self.readers[number].read(positions[self.world.rank :: self.world.size]):
                loss = term.loss(self.policy, labels, settings.seed, epoch)
                if loss is None:
                    self._skipped += 1
                    continue
                (of_settings.weight / len(positions) * loss).backward()
                self._since[number] += torch.tensor([float(loss.detach()), 1.0], dtype=torch.float64)
        self.update()
        self.progress.step += 1

    @torch.no_grad()
    def validate(self) -> list[float]:
        """Mean of each term over its held-out queries, each with its first epoch's passages."""
        self.policy.eval()
        sums = torch.zeros(len(self.terms), 2, dtype=torch.float64)
        for number, term in enumerate(self.terms):
            positions = self.data[number].validation[: self.settings.validation.queries]
            for labels in self.data[number].reader().read(positions[self.world.rank :: self.world.size]):
                loss = term.loss(self.policy, labels, self.settings.seed, 0)
                if loss is not None:
                    sums[number] += torch.tensor([float(loss), 1.0], dtype=torch.float64)
        sums = self.over_workers(sums)
        if (sums[:, 1] == 0).any():
            raise InputError("no held-out text of a term fits policy.max_length: raise it")
        means = (sums[:, 0] / sums[:, 1]).tolist()
        if not all(map(math.isfinite, means)):
            raise RunError(f"the model's held-out losses are {means}: training has diverged: lower learning_rate")
        return means

    def validate_and_report(self, report: Report) -> None:
        progress, names = self.progress, term_names(t.kind for t in self.settings.terms)
        metrics = {"step": progress.step, "total_steps": self.total_steps}
        since = self.over_workers(self._since).tolist()
        metrics |= {f"loss/{n}": total / count for n, (total, count) in zip(names, since, strict=True) if count}
        metrics["skipped_queries"] = float(self.over_workers(torch.tensor([float(self._skipped)])))
        self._since, self._skipped = torch.zeros_like(self._since), 0
        started = time.perf_counter()
        by_term = self.validate()
        loss = sum(t.weight * value for t, value in zip(self.settings.terms, by_term, strict=True))
        if -loss >= progress.best_score:
            progress.best_score, progress.best_step = -loss, progress.step
        metrics |= {
            "validation_score": -loss,
            **{f"validation_loss/{name}": value for name, value in zip(names, by_term, strict=True)},
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "validation_seconds": time.perf_counter() - started,
            "best_step": progress.best_step,
        }
        self.report_checkpoint(report, metrics)
