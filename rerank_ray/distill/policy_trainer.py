"""What training a policy by reinforcement and from texts have in common: the run's loop, the update, the checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed
from torch import nn

from rerank_ray.distill import checkpoints
from rerank_ray.distill.checkpoints import Progress
from rerank_ray.distill.optimizer import make_optimizer
from rerank_ray.distill.parallel import World, sum_gradients
from rerank_ray.distill.policy import Policy
from rerank_ray.distill.train import Report, out_of_memory_told
from rerank_ray.errors import RunError
from rerank_ray.settings.rationale import RationaleSettings
from rerank_ray.settings.reinforce import ReinforceSettings


class PolicyTrainer:
    """A policy, its optimizer, and its place in the data; subclasses say what a step and a validation are."""

    memory_advice = "set policy.gradient_checkpointing"
    """What a run may do that is out of memory."""

    def __init__(
        self, settings: ReinforceSettings | RationaleSettings, world: World, resume: Path | None, total_steps: int
    ) -> None:
        """`resume` is the folder of a checkpoint, from which training goes on exactly."""
        self.settings, self.world, self.total_steps, self.resumed = settings, world, total_steps, resume is not None
        torch.manual_seed(settings.seed)
        self.policy = Policy(settings.policy)
        self.trained = self.policy.trained
        self.optimizer = make_optimizer(self.policy, settings.optimizer)
        self.progress = Progress()
        if resume:
            self.progress = checkpoints.load(resume, self.trained)
            checkpoints.load_optimizer(resume, self.optimizer)

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps

    def train_step(self) -> None:
        raise NotImplementedError  # abstract

    def validate_and_report(self, report: Report) -> None:
        """Validate the policy, and report it as a checkpoint."""
        raise NotImplementedError  # abstract

    def run(self, report: Report) -> None:
        """Train to the end; a run that begins is validated before its first step too.

        Raises:
            RunError: a batch does not fit the memory.
        """
        with out_of_memory_told(self.memory_advice):
            if not self.resumed:
                self.validate_and_report(report)
            while not self.finished:
                self.train_step()
                if self.progress.step % self.settings.validation.every_steps == 0 or self.finished:
                    self.validate_and_report(report)

    def update(self) -> float:
        """Take the optimizer's step on the gradient of all workers; returns its norm before clipping.

        Raises:
            RunError: the gradient is not finite; every worker finds the same.
        """
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sum_gradients(self.trained, self.world)
        norm = nn.utils.clip_grad_norm_(self.trained, self.settings.optimizer.clip_norm)
        if not torch.isfinite(norm):
            raise RunError(
                f"step {self.progress.step}: the gradient's norm is {float(norm)}: training has diverged: lower "
                "optimizer.learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def over_workers(self, totals: torch.Tensor) -> torch.Tensor:
        """The sum of all workers' totals."""
        if self.world.size > 1:
            torch.distributed.all_reduce(totals := totals.to(self.policy.device))
        return totals

    def report_checkpoint(self, report: Report, metrics: dict) -> None:
        """Report metrics with, on the first worker, what a run goes on from and the policy as it would be deployed."""
        if self.world.rank != 0:
            report(metrics, None)
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.policy.save(folder / checkpoints.STUDENT)
            checkpoints.save(folder, self.progress, [p.detach() for p in self.trained])
            checkpoints.save_optimizer(folder, self.optimizer)
            report(metrics, folder)
