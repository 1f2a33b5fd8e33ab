"""What a label or rerank job will take, from a sample of its rows: `rerank-ray plan`.

The sample is ranked here, on the device at hand, as a replica would rank it. What it took a row and a token is what the
rows that are left will take, less what the label store answers. The forecast is kept in the run folder, and the
finished job sets its own figures beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from rerank_ray import config, storage
from rerank_ray.accounting import committed
from rerank_ray.errors import ConfigError, InputError, RowError
from rerank_ray.label_store import LabelStore, StoredBackend
from rerank_ray.models.protocol import Answer, Backend, Call, Embed, EmbedTokens, Result
from rerank_ray.parquet import InputSummary, id_hash, inspect_input, open_parquet
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.records import CandidateList, Usage
from rerank_ray.report.tables import duration
from rerank_ray.runs import RunFolder, resolve_input
from rerank_ray.schema import CANDIDATES, candidate_list_from_row
from rerank_ray.settings.jobs import ExecutionSettings, LabelSettings, RerankSettings
from rerank_ray.settings.models import ModelSettings
from rerank_ray.shares import share_out

FILE = "plan.json"
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a job will take; figures a row are means over the sample and leave the label store out."""

    job: str
    """Digest of the config and the input: a forecast of another job is compared with nothing."""
    rows: int
    finished: int
    """Rows that the run holds already."""
    sampled: int
    failed: int
    """Sampled rows that ended with an error."""
    device: str
    calls: float
    """Model calls a row."""
    prompt_tokens: float
    shared_tokens: float
    """Prompt tokens a row that are computed once for several calls."""
    output_tokens: float
    tokens_error: float | None
    """Standard error of the tokens to compute, as a share of them; None for a single row."""
    stored_calls: float
    """The share of calls that the label store answers."""
    stored_tokens: float
    """The share of the tokens to compute that are theirs."""
    seconds_per_token: float
    seconds_beside: float
    """A row's time outside the models: prompts, parsing, the store."""
    load_seconds: float
    """Until a replica is at its speed: what its first row takes longer than others is in it, compilation above all."""
    flops_per_token: float
    """0 where torch does not run the model."""
    memory_gib: float
    """Peak of the process's main memory."""
    gpu_memory_gib: float | None
    embeds: bool = False
    """Whether texts are embedded by themselves: a replica keeps documents' embeddings for when they come again."""

    @property
    def left(self) -> int:
        return self.rows - self.finished

    @property
    def computed_tokens(self) -> float:
        """Tokens a row that go through a model."""
        return self.prompt_tokens - self.shared_tokens + self.output_tokens

    def work(self, rows: int) -> dict[str, float]:
        """What so many rows take, less what the store answers."""
        tokens = rows * self.computed_tokens * (1 - self.stored_tokens)
        return {
            "calls": rows * self.calls * (1 - self.stored_calls),
            "tokens": tokens,
            "replica_seconds": rows * self.seconds_beside + tokens * self.seconds_per_token,
        }


def load_job(path: str, overrides: Sequence[str]) -> LabelSettings | RerankSettings:
    """Read the config of a label or a rerank job; which it is, its keys tell."""
    content = config.apply_overrides(config.read_yaml(path), overrides)
    kinds = {"teacher": LabelSettings, "ranker": RerankSettings}
    found = [model for key, model in kinds.items() if key in content]
    if not found:
        raise ConfigError(f"{path}: has neither teacher: nor ranker: and plans are of label and rerank jobs")
    return config.load(found[0], path, overrides)


def plan(settings: LabelSettings | RerankSettings, run_uri: str, *, sample: int) -> Forecast:
    """Rank a random sample of the rows that are left and forecast the job; writes `plan.json` into the run folder.

    The model is asked, also where it costs money. Nothing is written into the label store or the run's output.

    Raises:
        ConfigError: no row is to be sampled.
        InputError: no row is left, or none of the sample can be ranked.
        RunError: the run folder is another job's.
    """
    if sample < 1:
        raise ConfigError(f"--sample {sample}: a forecast needs at least one row")
    kind, ranker = ("label", settings.teacher) if isinstance(settings, LabelSettings) else ("rerank", settings.ranker)
    source_uri = resolve_input(settings.input)
    source = inspect_input(source_uri, CANDIDATES)
    inputs = preflight(ranker) | {settings.input: source.fingerprint}
    run = RunFolder(uri=run_uri)
    if run.state():
        run.check_same(kind, settings, inputs)
    finished = _finished(run)
    left = source.rows - len(finished)
    if not source.rows:
        raise InputError(f"{settings.input}: has no rows to plan for: ingest candidates first")
    if not left:
        raise InputError(f"{settings.input}: no row is left to plan: {source.rows:,} rows, all of them in {run_uri}")
    sampled, size = min(sample, left), share_out(left, settings.execution).batch
    if size < sampled < left:
        # Whole batches: a last one of a row would take as long as another where calls are waited for.
        sampled -= sampled % size
    requests = _sample(source_uri, source, finished, sampled)

    from rerank_ray.models.engine import set_up_replica

    set_up_replica(settings.execution.cpus_per_actor, settings.execution.gpus_per_actor)
    started = time.perf_counter()
    meter = _Meter(None if settings.store is None else LabelStore(settings.store))
    loaded = Ranker(ranker, wrap=meter.wrap)
    load_seconds = time.perf_counter() - started
    other = _with_other_texts(requests[0])
    # Of no row's time: a first one compiles, and fills the allocator.
    loaded.rank([other])
    ready_seconds = time.perf_counter() - started
    meter.totals = _Totals()
    started = time.perf_counter()
    outcomes = [o for i in range(0, len(requests), size) for o in loaded.rank(requests[i : i + size])]
    seconds = time.perf_counter() - started
    figures = meter.figures(seconds, sampled)
    # Last: what is counted is not compiled, and what was run while it was counted never is.
    flops_per_token = _flops_per_token(loaded, meter, _with_other_texts(other)) if meter.runs_here else 0.0
    forecast = Forecast(
        job=_job_digest(settings, source.fingerprint),
        rows=source.rows,
        finished=len(finished),
        load_seconds=max(load_seconds, ready_seconds - seconds / len(requests)),
        flops_per_token=flops_per_token,
        **_per_row(outcomes, sampled),
        **figures,
        **_device(),
    )
    storage.write_text(run.path(FILE), json.dumps(asdict(forecast), indent=1) + "\n")
    return forecast


def compare(
    run: RunFolder, settings: LabelSettings | RerankSettings, fingerprint: str, rows: int, actual: Mapping[str, float]
) -> dict | None:
    """The forecast in a run's folder, for so many rows, beside what they took; None where nobody made one of this job.

    Args:
        fingerprint: of the input.
        actual: `calls`, `tokens` that were computed, and `replica_seconds`.
    """
    if not storage.exists(run.path(FILE)):
        return None
    try:
        forecast = Forecast(**json.loads(storage.read_text(run.path(FILE))))
    except TypeError:  # one of another version
        return None
    if forecast.job != _job_digest(settings, fingerprint):
        return None
    predicted = {name: round(value, 2) for name, value in forecast.work(rows).items()}
    return {"rows": rows, "predicted": predicted, "actual": dict(actual)}


def _job_digest(settings: LabelSettings | RerankSettings, fingerprint: str) -> str:
    content = settings.model_dump_json(exclude={"execution", "limits"})
    return hashlib.blake2b(f"{content}\n{fingerprint}".encode(), digest_size=8).hexdigest()


def print_forecast(
    forecast: Forecast,
    execution: ExecutionSettings,
    console: Console,
    *,
    gpus: float | None = None,
    price_per_hour: float | None = None,
) -> None:
    """Print the totals of the rows that are left.

    Args:
        gpus: how many there are; None is what `execution` asks for. A replica without a GPU counts as one.
        price_per_hour: of one of them.
    """
    left, per_replica = forecast.left, execution.gpus_per_actor or 1.0
    gpus = execution.actors * per_replica if gpus is None else gpus
    work = forecast.work(left)
    wall = forecast.load_seconds + work["replica_seconds"] * per_replica / gpus
    hours = gpus * wall / 3600
    unit = "GPU" if execution.gpus_per_actor else "replica"
    rows = {
        "rows": f"{forecast.rows:,}, {forecast.finished:,} of them finished: {left:,} left",
        "sample": f"{forecast.sampled:,} rows, {forecast.failed:,} of them with error, on {forecast.device}",
        "model calls": f"{left * forecast.calls:,.0f}, {forecast.stored_calls:.1%} of them in the label store",
        "prompt tokens": f"{left * forecast.prompt_tokens:,.0f}, {left * forecast.shared_tokens:,.0f} of them shared",
        "output tokens": f"{left * forecast.output_tokens:,.0f}",
        "tokens to compute": f"{work['tokens']:,.0f}{_plus_minus(forecast.tokens_error)}",
        "floating-point operations": _flops(forecast, work["tokens"]),
        "memory of a replica": _memory(forecast),
        "time": f"{duration(wall)} on {gpus:g} {unit}{'s' if gpus != 1 else ''}, "
        f"{duration(forecast.load_seconds)} of it to load the model",
        f"{unit}-hours": f"{hours:,.2f}",
        "cost": "" if price_per_hour is None else f"{hours * price_per_hour:,.2f}",
    }
    table = Table(title="plan", show_header=False)
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    console.print(table)
    if execution.gpus_per_actor and forecast.gpu_memory_gib is None:
        console.print("The job's replicas have GPUs and this machine has none: its times are those of a CPU.")
    side_by_side = share_out(left, execution).batch
    if forecast.sampled < side_by_side:
        console.print(
            f"The sample has fewer rows than the {side_by_side} that a replica ranks side by side: where a "
            f"call is mostly waited for, as a server's is, the time is too high: --sample {side_by_side}."
        )
    if forecast.embeds:
        console.print("Documents that come again are embedded once: tokens and time are an upper bound.")
    if gpus != execution.actors * per_replica:
        actors = max(1, int(gpus / per_replica))
        console.print(f"The config has execution.actors {execution.actors}: set it to {actors} for {gpus:g} {unit}s.")


def _plus_minus(share: float | None) -> str:
    return "" if share is None else f" ± {share:.1%} (one standard error)"


def _flops(forecast: Forecast, tokens: float) -> str:
    if not forecast.flops_per_token:
        return ""
    speed = forecast.flops_per_token / forecast.seconds_per_token / 1e12
    return f"{forecast.flops_per_token * tokens:.3g}, {speed:.3g} · 10¹² a second in the sample"


def _memory(forecast: Forecast) -> str:
    gpu = "" if forecast.gpu_memory_gib is None else f", {forecast.gpu_memory_gib:.1f} GiB of the GPU's"
    return f"{forecast.memory_gib:.1f} GiB{gpu}"


def _finished(run: RunFolder) -> np.ndarray:
    """Hashes of the query ids that a run's checkpoint holds."""
    fs, _ = storage.open_filesystem(run.checkpoint)

    def hashes(path: str) -> list[int]:
        ids = pq.read_table(path, filesystem=fs, columns=["query_id"])["query_id"]
        return [id_hash(query_id) for query_id in ids.to_pylist()]

    every_hash = chain.from_iterable(storage.of_each_file(hashes, committed(run.checkpoint)))
    return np.unique(np.fromiter(every_hash, dtype=np.uint64))


def _sample(uri: str, source: InputSummary, finished: np.ndarray, count: int) -> list[CandidateList]:
    """Rows at random out of those that are not finished, the same ones every time; rows that break the contract are
    left out.

    Raises:
        InputError: none is left after that.
    """
    left = np.setdiff1d(source.id_hashes, finished)
    chosen = set(np.random.default_rng(_SEED).choice(left, count, replace=False).tolist())
    requests, faults = [], []
    for row in _rows_with(uri, source.files, chosen):
        try:
            requests.append(candidate_list_from_row(row))
        except RowError as error:
            faults.append(str(error))
    if not requests:
        raise InputError(f"{uri}: none of {len(chosen)} sampled rows can be ranked: {faults[0]}")
    return requests


def _rows_with(uri: str, files: Sequence[str], hashes: set[int]):
    """Rows whose query id has one of these hashes; texts are read of their row groups only."""
    fs, _ = storage.open_filesystem(uri)
    for path in files:
        with open_parquet(fs, path) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["query_id"])["query_id"].to_pylist()
                found = [n for n, query_id in enumerate(ids) if id_hash(query_id) in hashes]
                if found:
                    yield from file.read_row_group(group, columns=CANDIDATES.names).take(found).to_pylist()


@dataclass(slots=True, kw_only=True)
class _Totals:
    seconds: float = 0.0
    calls: int = 0
    tokens: int = 0
    stored_calls: int = 0
    stored_tokens: int = 0
    embeds: bool = False


class _Meter:
    """What the models of a ranker are asked, how long they take, and which of it a label store holds."""

    def __init__(self, store: LabelStore | None) -> None:
        self.store = store
        self.totals = _Totals()
        self.runs_here = False
        """Whether this process computes a model, and no server."""

    def wrap(self, backend: Backend, settings: ModelSettings) -> _Metered:
        self.runs_here |= hasattr(backend, "device")
        return _Metered(backend, None if self.store is None else StoredBackend(backend, settings, self.store), self)

    def figures(self, seconds: float, rows: int) -> dict[str, float | bool]:
        """The forecast's figures, when `rows` took so many seconds altogether. Where a model counts no tokens, as some
        servers don't, its time is a row's."""
        totals = self.totals
        by_token = totals.seconds if totals.tokens else 0.0
        return {
            "stored_calls": totals.stored_calls / max(1, totals.calls),
            "stored_tokens": totals.stored_tokens / max(1, totals.tokens),
            "seconds_per_token": by_token / max(1, totals.tokens),
            "seconds_beside": (seconds - by_token) / rows,
            "embeds": totals.embeds,
        }


class _Metered:
    """A backend as the scheduler sees it, and its clock."""

    def __init__(self, backend: Backend, stored: StoredBackend | None, meter: _Meter) -> None:
        self._backend, self._stored, self._meter = backend, stored, meter

    def run(self, calls: Sequence[Call]) -> list[Result]:
        held = [False] * len(calls) if self._stored is None else self._stored.holds(calls)
        started = time.perf_counter()
        results = self._backend.run(calls)
        totals = self._meter.totals
        totals.seconds += time.perf_counter() - started
        totals.embeds |= any(isinstance(call, Embed | EmbedTokens) for call in calls)
        for result, is_held in zip(results, held, strict=True):
            if isinstance(result, Answer):
                tokens = result.usage.computed_tokens
                totals.calls += result.usage.calls
                totals.tokens += tokens
                totals.stored_calls += result.usage.calls * is_held
                totals.stored_tokens += tokens * is_held
        return results


def _with_other_texts(request: CandidateList) -> CandidateList:
    """A row as long as this one, of which nothing that an engine remembers is of use to this one."""
    candidates = tuple(replace(c, text=f". {c.contents}", title=None) for c in request.candidates)
    return CandidateList(query=replace(request.query, text=f". {request.query.text}"), candidates=candidates)


def _flops_per_token(ranker: Ranker, meter: _Meter, request: CandidateList) -> float:
    """Operations of one row's matrix products and attention, padding included, a computed token.

    Counted, not derived from the model's config: adapters, exit layers, encoders and decoders differ in what they
    compute. A model that torch does not run here counts 0.
    """
    from torch.utils.flop_counter import FlopCounterMode

    meter.totals = _Totals()
    with FlopCounterMode(display=False, custom_mapping=_cpu_operations()) as counter:
        ranker.rank([request])
    return counter.get_total_flops() / max(1, meter.totals.tokens)


def _cpu_operations() -> dict[Any, Callable[..., int]]:
    """How torch's counter counts what it does not know: attention on a CPU, and the products of `models.prepacked` and
    `models.acceleration`. It hands over shapes for tensors."""
    import torch
    from torch.utils.flop_counter import sdpa_flop_count

    def attention(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    def product(rows, *_, out_shape, **__) -> int:
        return 2 * math.prod(rows) * out_shape[-1]

    products = [("mkldnn", "_linear_pointwise"), ("onednn", "qlinear_pointwise"), ("aten", "_int_mm")]
    # A torch without oneDNN lacks its operations.
    there = [getattr(getattr(torch.ops, library), name, None) for library, name in products]
    attentions = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    return attentions | {operation: product for operation in there if operation is not None}


def _per_row(outcomes: Sequence[Outcome], sampled: int) -> dict:
    """Means over the rows of a sample; those that were not ranked took nothing.

    Raises:
        InputError: every row failed.
    """
    errors = [o.error for o in outcomes if o.error is not None]
    if len(errors) == len(outcomes):
        raise InputError(f"every row of the sample failed ({len(errors)}), for example: {errors[0]}")
    usages = [o.usage for o in outcomes] + [Usage()] * (sampled - len(outcomes))
    tokens = [u.computed_tokens for u in usages]
    error = statistics.stdev(tokens) / sampled**0.5 / (statistics.mean(tokens) or 1.0) if sampled > 1 else None
    return {
        "sampled": sampled,
        "failed": sampled - len(outcomes) + len(errors),
        "calls": statistics.mean(u.calls for u in usages),
        "prompt_tokens": statistics.mean(u.prompt_tokens for u in usages),
        "shared_tokens": statistics.mean(u.cached_tokens for u in usages),
        "output_tokens": statistics.mean(u.output_tokens for u in usages),
        "tokens_error": error,
    }


def _device() -> dict:
    """What the sample ran on, and the most memory it took."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if not torch.cuda.is_available():
        name, gpu = f"CPU, {torch.get_num_threads()} of its threads", None
    else:
        name, gpu = torch.cuda.get_device_name(), torch.cuda.max_memory_reserved() / 2**30
    return {"device": name, "memory_gib": peak / 2**30, "gpu_memory_gib": gpu}
