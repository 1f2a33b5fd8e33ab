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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import nn

from rerank_ray.distill import checkpoints
from rerank_ray.distill.checkpoints import Progress
from rerank_ray.distill.exit_warm_up import is_in_warm_up, warm_up
from rerank_ray.distill.labels import LabelSet, Steps
from rerank_ray.distill.list_scorer import ListScorer
from rerank_ray.distill.optimizer import current_learning_rate, make_optimizer, set_learning_rate
from rerank_ray.distill.parallel import STRATEGIES, World
from rerank_ray.distill.sampling import sample_group
from rerank_ray.distill.seeds import seed_of
from rerank_ray.distill.start import check_labels, first_student, open_label_set
from rerank_ray.distill.step_data import Chunk, Group, MicroBatches, StepData
from rerank_ray.distill.targets import Targets, Term, objective, term_names, validation_ndcg
from rerank_ray.errors import InputError, RunError
from rerank_ray.models import engine
from rerank_ray.models.plain_attention import attention_for_training
from rerank_ray.models.student import Encoded, trained_parameters
from rerank_ray.records import Labels
from rerank_ray.settings.distill import DistillSettings

Report = Callable[[dict, Path | None], None]
"""Called by every worker at every validation with the metrics and a folder, which is deleted when the call returns: the
checkpoint is what the workers' folders hold together. None where a worker adds nothing to it, and in a warm-up, whose
steps are below 0."""


def train(
    settings: DistillSettings,
    world: World,
    report: Report,
    resume: Path | None = None,
    data: LabelSet | None = None,
    log: Callable[[dict], None] = lambda metrics: None,
) -> None:
    """Distil a student; resumes exactly from a checkpoint folder.

    Validation runs before the first step too, so that a student which training only makes worse is kept as it was.

    Args:
        log: takes the metrics between validations, which have no checkpoint.

    Raises:
        RunError: a batch does not fit the memory. It is not halved as in scoring: other workers would wait.
    """
    advice = (
        f"lower tokens_per_micro_batch ({settings.tokens_per_micro_batch:,}) and tokens_per_backward "
        f"({settings.tokens_per_backward:,}), set backward: cached, or student.gradient_checkpointing"
    )
    with out_of_memory_told(advice):
        trainer = Trainer(settings, world, resume, data, report=report)
        if not trainer.resumed:
            trainer.validate_and_report(report)
        while not trainer.finished:
            trainer.train_step()
            step = trainer.progress.step
            if step % settings.validation.every_steps == 0 or step == trainer.total_steps:
                trainer.validate_and_report(report)
            elif step % settings.log_every_steps == 0:
                log(trainer.training_metrics())


@contextmanager
def out_of_memory_told(advice: str) -> Iterator[None]:
    """Turn an error of too little memory into a `RunError` with advice: the same step would need as much again."""
    try:
        yield
    except RuntimeError as error:
        if not engine.is_out_of_memory(error):
            raise
        raise RunError(
            f"a batch of training does not fit the memory: {advice}, and start again: it goes on ({error})"
        ) from error


@dataclass(slots=True)
class _Seen:
    """What this worker's steps since the last line of metrics were; tensors stay on the device."""

    steps: int = 0
    seconds: float = 0.0
    pairs: float = 0.0
    tokens: int = 0
    positions: int = 0
    gradient_norms: torch.Tensor | float = 0.0
    losses: dict[str, torch.Tensor | float] = field(default_factory=dict)
    """Of each term, over all workers: its sum over the queries that it teaches, and their number."""


class Trainer:
    """A student, its optimizer, and its place in the data."""

    def __init__(
        self,
        settings: DistillSettings,
        world: World,
        resume: Path | None,
        data: LabelSet | None = None,
        *,
        report: Report = lambda metrics, folder: None,
    ) -> None:
        """Warms early exits up, which takes long, where the settings say so.

        Args:
            data: the labels, opened already; None opens them here, which reads all of the files.
            report: takes the warm-up's metrics and checkpoints.
        """
        self.settings, self.world = settings, world
        self.data = data or open_label_set(settings)
        check_labels(self.data, settings)
        self.reader, self.validation_reader = self.data.reader(), self.data.reader()
        self.steps = Steps(self.data, settings.seed, settings.queries_per_step)
        self.total_steps = min(settings.max_steps or math.inf, settings.epochs * self.steps.per_epoch)
        self.device = engine.pick_device("auto")
        self.dtype = engine.pick_dtype(settings.dtype, self.device)
        torch.manual_seed(settings.seed)
        warming = resume if resume is not None and is_in_warm_up(resume) else None
        resume = None if warming is not None else resume
        self.resumed = resume is not None
        self.student = first_student(settings.student, resume).to(self.device)
        self.warm_up_metrics = {} if self.resumed else self._warm_up(report, warming)
        optimizer = make_optimizer(self.student, settings.optimizer)
        self.trained = trained_parameters(self.student)
        self.average = self._copy_of_trained() if settings.optimizer.averaging else None
        self.start = self._copy_of_trained() if settings.validation.interpolation else None
        self.progress = checkpoints.load(resume, self.trained, self.average, self.start) if resume else Progress()
        self.scorer = ListScorer(self.student, self._autocast)
        self.parallel = STRATEGIES[settings.execution.strategy](self.scorer, optimizer, settings, world)
        if resume:
            self.parallel.load_state(resume)
        self._thread = ThreadPoolExecutor(1, initializer=engine.use_device, initargs=(self.device,))
        self._next: tuple[int, Future[StepData]] | None = None
        self._seen = _Seen()
        names = term_names(t.loss for t in settings.objective.losses)
        self._skipped: dict[str, int | torch.Tensor] = dict.fromkeys(names, 0)

    def _warm_up(self, report: Report, resume: Path | None) -> dict[str, float]:
        """Warm up the early exits, where the settings say so."""
        settings = self.settings.student.exit_warm_up
        if settings is None:
            return {}
        lists = self.data.text_lists()

        def keep(metrics: dict, save: Callable[[Path], None]) -> None:
            with tempfile.TemporaryDirectory() as name:
                # The workers' are the same.
                if self.world.rank == 0:
                    save(Path(name))
                report(metrics, Path(name) if self.world.rank == 0 else None)

        return warm_up(
            self.student,
            lists.reader(),
            len(lists),
            settings,
            self._autocast,
            self.settings.seed,
            self.world,
            keep,
            resume,
        )

    def _copy_of_trained(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.trained]

    @property
    def finished(self) -> bool:
        return (
            self.progress.step >= self.total_steps
            or self.progress.validations_without_best >= self.settings.validation.patience
        )

    def train_step(self) -> dict[str, torch.Tensor | float]:
        """One optimizer step; returns the mean of each loss over those of the step's queries that it teaches.

        They stay on the device, which nothing in a step waits for.
        """
        started = time.perf_counter()
        self.student.train()
        # Dropout, like the data, is a function of where a run stands: a resumed one draws the same.
        torch.manual_seed(seed_of(self.settings.seed, self.progress.step, self.world.rank))
        set_learning_rate(self.parallel.optimizer, self.settings.optimizer, self.progress.step, self.total_steps)
        losses = self.forward_backward(self._step_data())
        norm = self.parallel.step()
        if self.average is not None:
            parameters = [p.detach() for p in self.trained]
            torch._foreach_lerp_(self.average, parameters, 1.0 - self.settings.optimizer.averaging)
        self.progress.step += 1
        self._seen.steps += 1
        self._seen.gradient_norms = self._seen.gradient_norms + norm
        self._seen.seconds += time.perf_counter() - started
        return {**losses, "gradient_norm": norm}

    def _step_data(self) -> StepData:
        """This step's data. The next step's is read, tokenised and batched in a thread meanwhile."""
        step = self.progress.step
        ready = self._next is not None and self._next[0] == step
        data = self._next[1].result() if ready else self.step_data(step)
        self._next = (step + 1, self._thread.submit(self.step_data, step + 1)) if step + 1 < self.total_steps else None
        return data

    def step_data(self, step: int) -> StepData:
        """Read, sample and prepare what this worker computes in a step: a function of seed, step and rank alone."""
        positions, epoch = self.steps.at(step)
        own = positions[self.world.rank :: self.world.size]
        # The last step of an epoch can leave a worker without queries.
        rows = self.reader.read(own if len(own) else self.data.train[:1])
        groups = [(row, sample_group(row, self.settings.sampling, self.settings.seed, epoch)) for row in rows]
        return self.prepare(groups, queries=len(positions), counts=len(own) > 0)

    def prepare(self, groups: Sequence[Group], *, queries: int, counts: bool) -> StepData:
        """Bring everything that a step on these groups computes with to the device."""
        encoded = [self._encode(row, indices) for row, indices in groups]
        tokens = [sum(len(e["input_ids"]) for e in group) for group in encoded]
        chunks = [
            self._chunk([groups[q] for q in chunk], [encoded[q] for q in chunk])
            for chunk in engine.group_in_order(tokens, self.settings.tokens_per_backward)
        ]
        return StepData(groups=groups, chunks=chunks, queries=queries, counts=counts)

    def _chunk(self, groups: Sequence[Group], encoded: list[list[Encoded]]) -> Chunk:
        targets = Targets.of(groups)
        # Places instead of the mask itself: how many they are is known before the device has computed anything.
        rows, columns = (engine.moved(index, self.device) for index in targets.mask.nonzero(as_tuple=True))
        return Chunk(pairs=self._micro_batches(encoded), targets=targets.to(self.device), places=(rows, columns))

    def forward_backward(self, data: StepData) -> dict[str, torch.Tensor]:
        """Score each query's sampled group and add the gradient of the objective's mean over the step's queries.

        The objective is a sum over queries, so backward runs chunk by chunk and only one chunk's activations are held,
        or, where the forward pass is cached, one micro-batch's. A worker that is through with its own chunks while
        others are not, or that has none, takes part with a weight of 0.
        """
        # Gradients are averaged over workers; the sum over queries over the step's query count is the step's mean.
        factor = data.counts * self.world.size / data.queries
        # Of each term: its sum over the queries that it teaches, and their number.
        sums: dict[str, torch.Tensor] = {}
        chunks = data.chunks
        count = self.parallel.backwards(len(chunks))
        cached = [self._is_cached(chunk.pairs.tokens) for chunk in chunks] + [False] * (count - len(chunks))
        for number, is_cached in enumerate(self.parallel.forwards(*cached)):
            own = number < len(chunks)
            chunk = chunks[number if own else 0]
            # Around the backward pass too: with checkpoints it computes layers again.
            with (
                attention_for_training(self.device, chunk.pairs.longest),
                self.parallel.accumulate(last=number == count - 1),
            ):
                terms = self._objective(chunk, is_cached)
                self.parallel.backward((factor if own else 0.0) * terms["total"].loss.sum())
            counted = float(own and data.counts)
            self._seen.pairs += counted * chunk.pairs.count
            self._seen.tokens += chunk.pairs.tokens
            self._seen.positions += chunk.pairs.positions
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + counted * _sum_and_count(term)
        if self.world.size > 1:
            torch.distributed.all_reduce(totals := torch.stack(list(sums.values())))
            sums = dict(zip(sums, totals, strict=True))
        for name, (_, count) in sums.items():
            if name in self._skipped:
                self._skipped[name] = self._skipped[name] + data.queries - count
            self._seen.losses[name] = self._seen.losses.get(name, 0.0) + sums[name]
        return {name: total / count.clamp(min=1) for name, (total, count) in sums.items()}

    def _is_cached(self, tokens: int) -> bool:
        settings = self.settings
        return settings.backward == "cached" or (settings.backward == "auto" and tokens > settings.tokens_per_backward)

    def _objective(self, chunk: Chunk, cached: bool) -> dict[str, Term]:
        flat, views = self._scores(self.parallel.model, chunk.pairs, cached)
        layer_scores = flat.new_zeros(flat.shape[0], *chunk.targets.mask.shape)
        layer_scores[:, *chunk.places] = flat
        return objective(layer_scores, chunk.targets, self.settings.objective, views)

    def _scores(
        self, model: nn.Module, pairs: MicroBatches, cached: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores [layers, pairs], and the views of each query's list (`Student.scores`).

        Where other workers have more micro-batches, a copy of the smallest is scored as often as is left, for nothing.
        """
        (count,) = self.parallel.forwards(len(pairs.batches))
        indices, inputs = min(pairs.batches, key=lambda batch: batch[1]["input_ids"].numel())
        idle = [(indices + pairs.count, inputs)] * (count - len(pairs.batches))
        return model([*pairs.batches, *idle], pairs.sizes, cached)

    def _encode(self, labels: Labels, indices: Sequence[int]) -> list[Encoded]:
        candidates = labels.candidate_list.candidates
        documents = [candidates[i].contents for i in indices]
        return self.student.encode([labels.candidate_list.query.text] * len(documents), documents)

    def _micro_batches(self, lists: list[list[Encoded]]) -> MicroBatches:
        pairs = [pair for of_list in lists for pair in of_list]
        lengths = [len(e["input_ids"]) for e in pairs]
        planned = engine.plan_batches(lengths, self.settings.tokens_per_micro_batch)
        batches = [
            (torch.tensor(indices), self.student.batch([pairs[i] for i in indices], packed=True)) for indices in planned
        ]
        return MicroBatches(
            batches=batches,
            sizes=[len(of_list) for of_list in lists],
            tokens=sum(lengths),
            positions=sum(inputs.get("places", inputs["input_ids"]).numel() for _, inputs in batches),
            longest=max(lengths),
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def validate(self) -> list[float]:
        """Mean nDCG@10 over the held-out queries at each layer that has a head."""
        if self._next is not None:
            wait([self._next[1]])  # a tokenizer is not for two threads
        self.student.eval()
        sums = torch.zeros(len(self.student.layers) + 1, dtype=torch.float64)
        positions = self.data.validation[self.world.rank :: self.world.size]
        (count,) = self.parallel.forwards(len(positions))
        idle = np.repeat(self.data.validation[:1], count - len(positions), axis=0)
        for number, labels in enumerate(self.validation_reader.read(np.concatenate([positions, idle]))):
            encoded = self._encode(labels, range(len(labels.candidate_list)))
            flat, _ = self._scores(self.scorer, self._micro_batches([encoded]))
            values = [validation_ndcg(labels, s, self.settings.validation.gains) for s in flat.float().tolist()]
            if number < len(positions) and values[0] is not None:
                sums += torch.tensor([*values, 1.0], dtype=torch.float64)
        if self.world.size > 1:
            torch.distributed.all_reduce(sums := sums.to(self.device))
        if sums[-1] == 0:
            raise InputError(
                f"{', '.join(self.settings.input)}: no held-out query can tell students apart: the teacher's scores of "
                "each are all the same, or none has a known gain"
            )
        return (sums[:-1] / sums[-1]).tolist()

    @contextmanager
    def kept_weights(self) -> Iterator[list[torch.Tensor] | None]:
        """Put the weights that would be kept, averaged where the settings say so, into the student for a while.

        Yields the trained ones, or None where the saved student holds them: neither averaged, nor interpolated, nor
        with LoRA.
        """
        if self.average is None and self.start is None:
            yield None if self.settings.student.lora is None else [p.detach() for p in self.trained]
            return
        trained = self._copy_of_trained()
        with torch.no_grad():
            if self.average is not None:
                torch._foreach_copy_(self.trained, self.average)
            yield trained
            torch._foreach_copy_(self.trained, trained)

    def validate_and_report(self, report: Report) -> None:
        """Validate the weights that would be kept, and report them as a checkpoint."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with self.kept_weights() as trained:
                metrics = self._validation_metrics()
                self.parallel.save_student(folder / checkpoints.STUDENT)
            self.parallel.save_state(folder)
            if self.world.rank == 0:
                trained = None if self.parallel.restores_weights else trained
                # The saved student is the average, unless it has adapters merged or is on the way from the start.
                is_average = self.settings.student.lora is None and self.start is None
                average = None if is_average else self.average
                checkpoints.save(folder, self.progress, trained, average, self.start)
            report(metrics, folder if any(folder.iterdir()) else None)

    def training_metrics(self) -> dict[str, float]:
        """Where training stands, and means over the steps since the last line of metrics, which this begins anew."""
        seen, self._seen = self._seen, _Seen()
        metrics = {
            "step": self.progress.step,
            "epoch": self.progress.step / self.steps.per_epoch,
            "learning_rate": current_learning_rate(self.parallel.optimizer, self.settings.optimizer),
            "total_steps": self.total_steps,
        }
        if not seen.steps:
            return metrics
        if self.device.type == "cuda":
            # Steps are queued; what the device still has to do is time of theirs.
            started = time.perf_counter()
            torch.cuda.synchronize(self.device)
            seen.seconds += time.perf_counter() - started
        means = {name: float(total / count.clamp(min=1)) for name, (total, count) in seen.losses.items()}
        return metrics | {
            **{f"loss/{name}": value for name, value in means.items()},
            "gradient_norm": float(seen.gradient_norms) / seen.steps,
            "pairs_per_second": self.world.size * seen.pairs / seen.seconds,
            "seconds_per_step": seen.seconds / seen.steps,
            "padding_share": 1 - seen.tokens / seen.positions,
        }

    def _validation_metrics(self) -> dict[str, float]:
        """Validate, and note whether this is the best step."""
        progress = self.progress
        training = self.training_metrics() | self._skip_counts()
        started = time.perf_counter()
        share, by_layer = self._validate_shares()
        # A layer-wise student is kept for the sake of all its exits.
        ndcg = statistics.fmean(by_layer)
        progress.validations_without_best = 0 if ndcg > progress.best_score else progress.validations_without_best + 1
        # Ray Train keeps the last of equal ones.
        if ndcg >= progress.best_score:
            progress.best_score, progress.best_step = ndcg, progress.step
        metrics = {
            **training,
            "validation_ndcg@10": ndcg,
            **(self.warm_up_metrics if progress.step == 0 else {}),
            "validation_seconds": time.perf_counter() - started,
            "best_step": progress.best_step,
        }
        if self.start is not None:
            metrics["trained_share"] = share
        if len(by_layer) > 1:
            metrics |= {f"validation_ndcg@10/layer_{n}": v for n, v in zip(self.student.layers, by_layer, strict=True)}
        return metrics

    def _validate_shares(self) -> tuple[float, list[float]]:
        """Validate the student's weights, and where the settings say so what lies between the start and them.

        Returns the best share of them and its nDCG@10 at each layer, and leaves the student there.
        """
        if self.start is None or self.progress.step == 0:
            return 1.0, self.validate()
        weights = self._copy_of_trained()

        def mix(share: float) -> None:
            torch._foreach_copy_(self.trained, torch._foreach_lerp(self.start, weights, share))

        results: dict[float, list[float]] = {}
        with torch.no_grad():
            for share in (*self.settings.validation.interpolation, 1.0):
                mix(share)
                results[share] = self.validate()
            best = max(results, key=lambda share: statistics.fmean(results[share]))
            mix(best)
        return best, results[best]

    def _skip_counts(self) -> dict[str, int]:
        """How often each term skipped a query since the last validation, over all workers."""
        if not self.progress.step:
            return {}
        counts = {f"skipped_queries/{name}": int(count) for name, count in self._skipped.items()}
        self._skipped = dict.fromkeys(self._skipped, 0)
        return counts


def _sum_and_count(term: Term) -> torch.Tensor:
    return torch.stack([term.loss.detach().double().sum(), (~term.skipped).sum().double()])
