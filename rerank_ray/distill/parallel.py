"""How training is spread over data-parallel workers: whole replicas (DDP), or DeepSpeed's ZeRO, which partitions them.

Both average the gradient over workers and take the same steps; they differ in what each worker holds (Rajbhandari et
al. 2020, ZeRO) and in when workers have to meet. Partitioned gradients are reduced in every backward pass, and
partitioned weights are gathered in every forward pass, so that all workers have to make as many of them.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed
from torch import nn

from rerank_ray.distill import checkpoints
from rerank_ray.errors import ConfigError
from rerank_ray.models.student import Student, trained_parameters
from rerank_ray.settings.distill import DistillExecutionSettings, DistillSettings

_SHARDS = "deepspeed"
# DeepSpeed's default, which it allocates whatever the model's size.
_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This worker among all: torch.distributed is initialised when `size` > 1, and for ZeRO always."""

    rank: int = 0
    size: int = 1


def sum_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Add up the workers' gradients in place; of each parameter all workers have one, or none has."""
    if world.size > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)


def check_installed(settings: DistillExecutionSettings) -> None:
    """Raise `ConfigError` when the strategy's library is missing."""
    if settings.strategy != "ddp" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f'execution.strategy: {settings.strategy} needs the extra `deepspeed`: pip install "rerank_ray[deepspeed]"'
        )


class Replicas:
    """Weights, gradients and optimizer state whole on every worker."""

    restores_weights = False
    """Whether `load_state` brings back the trained weights too."""

    def __init__(
        self, scorer: nn.Module, optimizer: torch.optim.Optimizer, settings: DistillSettings, world: World
    ) -> None:
        self.model = scorer
        self.optimizer = optimizer
        self._student: Student = scorer.student
        self._clip_norm = settings.optimizer.clip_norm
        self._world = world
        if world.size > 1:
            self.model = nn.parallel.DistributedDataParallel(scorer, find_unused_parameters=True)
        elif next(scorer.parameters()).device.type == "cpu":
            # Or each micro-batch's gradient would be as large as the vocabulary, and mostly zeros. On a GPU the CPU
            # would wait for the number of rows. T5's stacks have each a module of their own for the one matrix.
            for module in scorer.modules():
                if isinstance(module, nn.Embedding) and module.num_embeddings > settings.tokens_per_micro_batch:
                    module.sparse = True

    def forwards(self, *counts: int) -> tuple[int, ...]:
        """How many forward passes to make, where this worker has so many of its own."""
        return counts

    def backwards(self, count: int) -> int:
        """How many backward passes to make, where this worker has so many of its own."""
        return count

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Around a forward and its backward pass: only a step's last one reduces gradients over the workers."""
        with nullcontext() if last or self._world.size == 1 else self.model.no_sync():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        # A row of each token is kept, also of a word that was met before: many tokens' are more than a whole matrix.
        for parameter in self._sparse():
            if parameter.grad._nnz() > len(parameter):
                parameter.grad = parameter.grad.to_dense()

    def _sparse(self) -> list[nn.Parameter]:
        return [p for p in self._student.parameters() if p.grad is not None and p.grad.is_sparse]

    def step(self) -> torch.Tensor | float:
        """Clip the gradient, take the optimizer's step and drop the gradient; returns its norm before clipping."""
        for parameter in self._sparse():
            parameter.grad = parameter.grad.to_dense()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save_student(self, folder: Path) -> None:
        """Write the student as it would be deployed, on the first worker."""
        if self._world.rank == 0:
            self._student.save(folder)

    def save_state(self, folder: Path) -> None:
        """Write what the optimizer needs to go on."""
        if self._world.rank == 0:
            checkpoints.save_optimizer(folder, self.optimizer)

    def load_state(self, folder: Path) -> None:
        checkpoints.load_optimizer(folder, self.optimizer)


class Zero:
    """Gradients and optimizer state (`zero2`), and weights too (`zero3`), partitioned over the workers by DeepSpeed."""

    restores_weights = True

    def __init__(
        self, scorer: nn.Module, optimizer: torch.optim.Optimizer, settings: DistillSettings, world: World
    ) -> None:
        self._student: Student = scorer.student
        self._world = world
        self._device = next(scorer.parameters()).device
        self._gathers_weights = settings.execution.strategy == "zero3"
        # The partitioned student is saved through this copy, one parameter at a time.
        self._whole = copy.deepcopy(scorer.student).cpu() if self._gathers_weights and world.rank == 0 else None
        self._deepspeed = _import_deepspeed(self._device)
        self.model, self.optimizer, _, _ = self._deepspeed.initialize(
            model=scorer, optimizer=optimizer, config=_config(settings, scorer.student), dist_init_required=False
        )

    def forwards(self, *counts: int) -> tuple[int, ...]:
        return self._highest(*counts) if self._gathers_weights else counts

    def backwards(self, count: int) -> int:
        return self._highest(count)[0]

    def _highest(self, *counts: int) -> tuple[int, ...]:
        of_all = torch.tensor(counts, device=self._device)
        torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MAX)
        return tuple(of_all.tolist())

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)

    def step(self) -> torch.Tensor | float:
        self.model.step()
        return self.model.get_global_grad_norm()

    def save_student(self, folder: Path) -> None:
        if self._gathers_weights:
            self._gather()
        if self._world.rank == 0:
            (self._whole or self._student).save(folder)

    @torch.no_grad()
    def _gather(self) -> None:
        whole = list(self._whole.parameters()) if self._whole is not None else None
        for number, parameter in enumerate(self._student.parameters()):
            with self._deepspeed.zero.GatheredParameters([parameter]):
                if whole is not None:
                    whole[number].copy_(parameter)

    def save_state(self, folder: Path) -> None:
        """Write this worker's shards."""
        self.model.save_checkpoint(str(folder), tag=_SHARDS, save_latest=False)

    def load_state(self, folder: Path) -> None:
        self.model.load_checkpoint(str(folder), tag=_SHARDS)


STRATEGIES = {"ddp": Replicas, "zero2": Zero, "zero3": Zero}


def _import_deepspeed(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device.type == "cpu":
        # DeepSpeed would compile an all-reduce in shared memory, minutes at the first start, and a worker that is
        # killed meanwhile leaves a lock that all later ones wait for. torch.distributed's does.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _config(settings: DistillSettings, student: Student) -> dict:
    elements = sum(p.numel() for p in trained_parameters(student))
    zero: dict = {
        "stage": int(settings.execution.strategy.removeprefix("zero")),
        "reduce_bucket_size": min(_BUCKET_ELEMENTS, elements),
    }
    if settings.execution.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if zero["stage"] == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        # Of DeepSpeed's own accounting alone: a step's queries are split here.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": settings.optimizer.clip_norm,
        "zero_optimization": zero,
        # torch's AdamW, as without ZeRO; DeepSpeed's own would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
