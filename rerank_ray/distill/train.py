"""The training loop: train → train_step → forward_backward, on any number of data-parallel workers.

Nothing here knows Ray. A `World` says which worker this is, and `report` takes metrics and checkpoints; the Ray Train
job and the tests each bring their own.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import nn
from torch.utils.checkpoint import checkpoint

from rerank_ray.distill import checkpoints
from rerank_ray.distill.checkpoints import Progress
from rerank_ray.distill.exit_warm_up import warm_up
from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.optimizer import make_optimizer, set_learning_rate
from rerank_ray.distill.sampling import sample_group
from rerank_ray.distill.targets import Targets, Term, check_objective, objective, term_names, validation_ndcg
from rerank_ray.models import engine
from rerank_ray.models.student import Student, StudentPrompt, adapt, load_student, new_student, trained_parameters
from rerank_ray.prompts.render import load_template
from rerank_ray.records import Labels
from rerank_ray.settings.distill import DistillSettings, StudentSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This worker among all: torch.distributed is initialised when `size` > 1."""

    rank: int = 0
    size: int = 1


Encoded = dict[str, list[int]]
"""One tokenised pair, as `Student.encode` returns it."""
Report = Callable[[dict, Path | None], None]
"""Called by every worker at every validation with the metrics and, on the first worker, a checkpoint folder that is
deleted when the call returns."""


def train(settings: DistillSettings, world: World, report: Report, resume: Path | None = None) -> None:
    """Distil a student; resumes exactly from a checkpoint folder.

    Validation runs before the first step too, so that a student which training only makes worse is kept as it was.
    """
    trainer = Trainer(settings, world, resume)
    if resume is None:
        trainer.validate_and_report(report, {})
    while not trainer.finished:
        losses = trainer.train_step()
        if trainer.progress.step % settings.validation.every_steps == 0 or trainer.progress.step == trainer.total_steps:
            trainer.validate_and_report(report, losses)


class Trainer:
    """A student, its optimizer, and its place in the data."""

    def __init__(self, settings: DistillSettings, world: World, resume: Path | None) -> None:
        self.settings, self.world = settings, world
        self.data = LabelSet.open(settings.input, settings.validation.fraction, settings.seed)
        check_objective(self.data, settings.objective)
        self.reader, self.validation_reader = self.data.reader(), self.data.reader()
        self.steps_per_epoch = math.ceil(len(self.data.train) / settings.queries_per_step)
        self.total_steps = min(settings.max_steps or math.inf, settings.epochs * self.steps_per_epoch)
        self.device = engine.pick_device("auto")
        self.dtype = engine.pick_dtype(settings.dtype, self.device)
        torch.manual_seed(settings.seed)
        self.student = _student(settings.student, resume).to(self.device)
        self.warm_up_metrics = self._warm_up() if resume is None else {}
        self.optimizer = make_optimizer(self.student, settings.optimizer)
        self.trained = trained_parameters(self.student)
        self.average = [p.detach().clone() for p in self.trained] if settings.optimizer.averaging else None
        self.progress = checkpoints.load(resume, self.student, self.optimizer, self.average) if resume else Progress()
        if world.rank > 0:
            # Dropout differs between workers; the start of the student, drawn above, does not.
            torch.manual_seed(settings.seed + world.rank + world.size * self.progress.step)
        self.model: nn.Module = _Scorer(self.student)
        if world.size > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._since_validation = {"pairs": 0, "padded_tokens": 0, "tokens": 0, "seconds": 0.0}
        self._skipped = dict.fromkeys(term_names(settings.objective), 0)

    def _warm_up(self) -> dict[str, float]:
        """Let the first worker warm up the early exits, where the settings say so, and the others take its weights."""
        settings = self.settings.student.exit_warm_up
        if settings is None:
            return {}
        metrics: dict[str, float] = {}
        if self.world.rank == 0:
            started = time.perf_counter()

            def read(number: int) -> Labels:
                return next(self.reader.read(self.data.train[number : number + 1]))

            metrics = warm_up(self.student, read, len(self.data.train), settings, self._autocast, self.settings.seed)
            metrics["exit_warm_up/seconds"] = time.perf_counter() - started
        if self.world.size > 1:
            for parameter in self.student.parameters():
                torch.distributed.broadcast(parameter.data, src=0)
        return metrics

    @property
    def finished(self) -> bool:
        return (
            self.progress.step >= self.total_steps
            or self.progress.validations_without_best >= self.settings.validation.patience
        )

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns the mean of each loss over those of this worker's queries that it teaches."""
        started = time.perf_counter()
        self.student.train()
        set_learning_rate(self.optimizer, self.settings.optimizer, self.progress.step, self.total_steps)
        groups, epoch = self._groups()
        losses = self.forward_backward(groups, epoch)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optimizer.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            parameters = [p.detach() for p in self.trained]
            torch._foreach_lerp_(self.average, parameters, 1.0 - self.settings.optimizer.averaging)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self._since_validation["seconds"] += time.perf_counter() - started
        return {**losses, "gradient_norm": float(norm)}

    def forward_backward(self, rows: Sequence[Labels], epoch: int) -> dict[str, float]:
        """Score each query's sampled group and add the gradient of the objective's mean over the step's queries.

        The objective is a sum over queries, so backward runs chunk by chunk and only one chunk's activations are held,
        or, where the forward pass is cached, one micro-batch's. Only the last chunk's backward reduces gradients over
        the workers.
        """
        settings = self.settings
        # The last step of an epoch can leave a worker without queries; it takes part with a weight of 0.
        weight = 1.0 if rows else 0.0
        rows = rows or [next(self.reader.read(self.data.train[:1]))]
        groups = [(row, sample_group(row, settings.sampling, settings.seed, epoch)) for row in rows]
        encoded = [self._encode(row, indices) for row, indices in groups]
        # DDP averages gradients over workers; the sum over queries over the step's query count is the step's mean.
        factor = weight * self.world.size / self._queries_of_step()
        sums: dict[str, torch.Tensor] = {}
        counts: dict[str, torch.Tensor] = {}
        tokens = [sum(len(e["input_ids"]) for e in group) for group in encoded]
        chunks = engine.group_in_order(tokens, settings.tokens_per_backward)
        for number, chunk in enumerate(chunks):
            last = number == len(chunks) - 1
            too_large = sum(tokens[q] for q in chunk) > settings.tokens_per_backward
            cached = settings.backward == "cached" or (settings.backward == "auto" and too_large)
            with nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                terms = self._objective([groups[q] for q in chunk], [e for q in chunk for e in encoded[q]], cached)
                (factor * terms["total"].loss.sum()).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.loss.detach().sum()
                counts[name] = counts.get(name, 0) + (~term.skipped).sum()
        if weight:
            for name in self._skipped:
                self._skipped[name] += len(rows) - int(counts[name])
        return {name: float(value) / max(1, int(counts[name])) for name, value in sums.items()}

    def _objective(
        self, groups: Sequence[tuple[Labels, Sequence[int]]], encoded: list[Encoded], cached: bool
    ) -> dict[str, Term]:
        targets = Targets.of(groups).to(self.device)
        with self._autocast():
            flat = self.model(self._micro_batches(encoded), cached)
        layer_scores = flat.new_zeros(flat.shape[0], *targets.mask.shape)
        layer_scores[:, targets.mask] = flat
        self._since_validation["pairs"] += len(encoded)
        return objective(layer_scores, targets, self.settings.objective)

    def _encode(self, labels: Labels, indices: Sequence[int]) -> list[Encoded]:
        candidates = labels.candidate_list.candidates
        documents = [candidates[i].contents for i in indices]
        return self.student.encode([labels.candidate_list.query.text] * len(documents), documents)

    def _micro_batches(self, encoded: list[Encoded]) -> list[tuple[torch.Tensor, dict]]:
        """Batch encoded pairs by length: (indices of the pairs, tensors) of each batch."""
        lengths = [len(e["input_ids"]) for e in encoded]
        batches = []
        for indices in engine.plan_batches(lengths, self.settings.tokens_per_micro_batch):
            inputs = self.student.batch([encoded[i] for i in indices])
            self._since_validation["padded_tokens"] += inputs["input_ids"].numel()
            batches.append((torch.tensor(indices), inputs))
        self._since_validation["tokens"] += sum(lengths)
        return batches

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _step_positions(self) -> tuple[np.ndarray, int]:
        """The rows of the current step, for all workers, and its epoch: a function of (seed, step) alone."""
        epoch, step = divmod(self.progress.step, self.steps_per_epoch)
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, self.data.order(self.settings.seed, epoch))
        size = self.settings.queries_per_step
        return self._epoch_order[1][step * size : (step + 1) * size], epoch

    def _queries_of_step(self) -> int:
        return len(self._step_positions()[0])

    def _groups(self) -> tuple[list[Labels], int]:
        positions, epoch = self._step_positions()
        return list(self.reader.read(positions[self.world.rank :: self.world.size])), epoch

    @torch.no_grad()
    def validate(self) -> list[float]:
        """Mean nDCG@10 over the held-out queries at each layer that has a head."""
        self.student.eval()
        sums = torch.zeros(len(self.student.layers) + 1, dtype=torch.float64)
        for labels in self.validation_reader.read(self.data.validation[self.world.rank :: self.world.size]):
            encoded = self._encode(labels, range(len(labels.candidate_list)))
            with self._autocast():
                flat = _Scorer(self.student)(self._micro_batches(encoded))
            values = [validation_ndcg(labels, s, self.settings.validation.gains) for s in flat.float().tolist()]
            if values[0] is not None:
                sums += torch.tensor([*values, 1.0], dtype=torch.float64)
        if self.world.size > 1:
            torch.distributed.all_reduce(sums := sums.to(self.device))
        if sums[-1] == 0:
            raise ValueError("no held-out query has a gain: validation.gains: labels needs qrels in the candidates")
        return (sums[:-1] / sums[-1]).tolist()

    @contextmanager
    def averaged(self) -> Iterator[list[torch.Tensor] | None]:
        """Put the averaged weights into the student for a while.

        Yields the trained ones, or None where the saved student holds them: without averaging and without LoRA.
        """
        if self.average is None:
            yield None if self.settings.student.lora is None else [p.detach() for p in self.trained]
            return
        trained = [p.detach().clone() for p in self.trained]
        with torch.no_grad():
            torch._foreach_copy_(self.trained, self.average)
            yield trained
            torch._foreach_copy_(self.trained, trained)

    def validate_and_report(self, report: Report, losses: dict[str, float]) -> None:
        """Validate the weights that would be kept, and report them as a checkpoint."""
        with self.averaged() as trained:
            self._validate_and_report(report, losses, trained)

    def _validate_and_report(
        self, report: Report, losses: dict[str, float], trained: list[torch.Tensor] | None
    ) -> None:
        progress = self.progress
        rates = self._rates() | self._skip_counts()
        started = time.perf_counter()
        by_layer = self.validate()
        # A layer-wise student is kept for the sake of all its exits.
        ndcg = statistics.fmean(by_layer)
        if ndcg > progress.best_score:
            progress.best_score, progress.best_step, progress.validations_without_best = ndcg, progress.step, 0
        else:
            progress.validations_without_best += 1
        metrics = {
            "step": progress.step,
            "epoch": progress.step / self.steps_per_epoch,
            "validation_ndcg@10": ndcg,
            **(self.warm_up_metrics if progress.step == 0 else {}),
            **{f"loss/{name}": value for name, value in losses.items()},
            **rates,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "validation_seconds": time.perf_counter() - started,
            "best_step": progress.best_step,
            "total_steps": self.total_steps,
        }
        if len(by_layer) > 1:
            metrics |= {f"validation_ndcg@10/layer_{n}": v for n, v in zip(self.student.layers, by_layer, strict=True)}
        self._since_validation = dict.fromkeys(self._since_validation, 0)
        if self.world.rank != 0:
            report(metrics, None)
            return
        with tempfile.TemporaryDirectory() as folder:
            average = self.average if self.settings.student.lora else None
            checkpoints.save(Path(folder), self.student, self.optimizer, progress, trained, average)
            report(metrics, Path(folder))

    def _rates(self) -> dict[str, float]:
        seen = self._since_validation
        if not seen["seconds"]:
            return {}
        return {
            "pairs_per_second": self.world.size * seen["pairs"] / seen["seconds"],
            "padding_share": 1 - seen["tokens"] / seen["padded_tokens"],
        }

    def _skip_counts(self) -> dict[str, int]:
        """How often each term skipped a query since the last validation, over all workers."""
        if not self._since_validation["seconds"]:
            return {}
        counts = torch.tensor(list(self._skipped.values()), device=self.device)
        if self.world.size > 1:
            torch.distributed.all_reduce(counts)
        named = zip(self._skipped, counts.tolist(), strict=True)
        self._skipped = dict.fromkeys(self._skipped, 0)
        return {f"skipped_queries/{name}": count for name, count in named}


class _Scorer(nn.Module):
    """Scores micro-batches in one forward call, so that DDP sees one forward before each backward."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, batches: list[tuple[torch.Tensor, dict]], cached: bool = False) -> torch.Tensor:
        """Scores [layers, pairs] of all micro-batches, in the pairs' order.

        With `cached`, nothing of a micro-batch is kept but its scores. Backward, which has the objective's gradient on
        the scores by then, computes each micro-batch again, with the dropout it had, and frees it before the next one:
        gradient caching (Gao et al. 2021, GradCache) by way of torch's checkpointing.
        """
        order = torch.cat([indices for indices, _ in batches])
        if cached:
            parts = [checkpoint(self._score, inputs, use_reentrant=False) for _, inputs in batches]
        else:
            parts = [self._score(inputs) for _, inputs in batches]
        scores = torch.cat(parts, dim=1)
        return scores[:, torch.argsort(order).to(scores.device)]

    def _score(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        # One positional argument: checkpointing looks for the devices whose random state it restores in those alone.
        if not torch.is_grad_enabled():
            return self.student(**inputs).float()
        # Here, because checkpointing comes back to it from within the backward pass.
        with engine.attention_for_training(inputs["input_ids"].device):
            return self.student(**inputs).float()


def _student(settings: StudentSettings, resume: Path | None) -> Student:
    # A checkpoint's folder has LoRA merged into the weights; the adapters are in the trainer's state.
    if resume is not None and settings.lora is None:
        saved = {"path": str(resume / checkpoints.STUDENT), "revision": None}
        student = load_student(settings.model_settings().model_copy(update=saved))
    else:
        student = new_student(settings, _prompt(settings))
    adapt(student, settings)
    return student


def _prompt(settings: StudentSettings) -> StudentPrompt | None:
    """The template as the student keeps it: its instruction is part of it, and the labels are what it is scored by.

    Raises:
        ConfigError: no such template, or a bad one.
    """
    if settings.head not in ("yes_no", "token_logit"):
        return None
    template = load_template(settings.prompt, "yes_no")
    return StudentPrompt(
        text=template.text.replace("{instruction}", template.instruction),
        system=template.system,
        chat=template.chat,
        prefill=template.prefill,
        labels=template.labels if settings.head == "yes_no" else (settings.token,),
    )
