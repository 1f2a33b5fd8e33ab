"""Forecasts of jobs: what a sample takes is what the rows that are left will take, less what is there already."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fixtures.rows import make_list
from rich.console import Console
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from rerank_ray import config, planning, storage
from rerank_ray.cli import main
from rerank_ray.errors import ConfigError, InputError, RunError
from rerank_ray.label_store import LabelStore, StoredBackend
from rerank_ray.models.acceleration import Int8Linear
from rerank_ray.models.engine import padded_length
from rerank_ray.models.fake import Fake
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.prepacked import PrepackedLinear
from rerank_ray.parquet import inspect_input, write_candidates, write_rows
from rerank_ray.planning import Forecast, compare, load_job, plan, print_forecast
from rerank_ray.ranking import rankers
from rerank_ray.ranking.rankers import Ranker, preflight
from rerank_ray.records import Usage
from rerank_ray.runs import RunFolder
from rerank_ray.schema import CANDIDATES, candidate_row
from rerank_ray.settings.jobs import ExecutionSettings, LabelSettings, RerankSettings, StoreSettings
from rerank_ray.settings.models import HFCausalSettings

SIZE = 3


@pytest.fixture
def source(tmp_path: Path) -> str:
    """20 queries of 3 candidates, prompts of the same number of words."""
    write_candidates((make_list(f"q{n:02d}", SIZE) for n in range(20)), str(tmp_path / "in"), rows_per_file=8)
    return str(tmp_path / "in")


@pytest.fixture
def clock(monkeypatch) -> None:
    """Time passes in the model alone, half a second a call, and in loading it, 7 seconds."""
    now = [0.0]

    class Slow(Fake):
        def __init__(self, settings) -> None:
            super().__init__(settings)
            now[0] += 7.0

        def run(self, calls):
            now[0] += 0.5 * len(calls)
            return super().run(calls)

    monkeypatch.setattr(planning.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("rerank_ray.ranking.rankers.load_backend", Slow)


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many calls the model, which is elsewhere, was asked at a time."""
    counts = []

    class Server(Fake):
        def run(self, calls):
            counts.append(len(calls))
            return super().run(calls)

    monkeypatch.setattr("rerank_ray.ranking.rankers.load_backend", Server)
    return counts


def job(source: str, *, model: dict | None = None, **content) -> LabelSettings:
    teacher = {"method": "yes_no", "model": {"kind": "fake", **(model or {})}}
    content = {"input": source, "teacher": teacher, "execution": {"rows_per_batch": 4}} | content
    return config.validate(LabelSettings, content, "test")


def forecast(**changes) -> Forecast:
    """1,000 rows of 10 calls, 200 of them finished; half of the calls, and a quarter of the tokens, are stored."""
    values = {
        "job": "0123",
        "rows": 1000,
        "finished": 200,
        "sampled": 16,
        "failed": 1,
        "device": "a device",
        "calls": 10.0,
        "prompt_tokens": 1000.0,
        "shared_tokens": 300.0,
        "output_tokens": 100.0,
        "tokens_error": 0.02,
        "stored_calls": 0.5,
        "stored_tokens": 0.25,
        "seconds_per_token": 0.01,
        "seconds_beside": 1.0,
        "load_seconds": 20.0,
        "flops_per_token": 1e9,
        "memory_gib": 1.5,
        "gpu_memory_gib": None,
    }
    return Forecast(**values | changes)


def test_what_so_many_rows_take():
    """100 rows: 100 · 10 · 0.5 calls, 100 · 800 · 0.75 tokens, 100 · 1 s beside 60,000 · 0.01 s."""
    assert forecast().work(100) == {"calls": 500.0, "tokens": 60_000.0, "replica_seconds": 700.0}


def test_rows_alike_are_foreseen_exactly(source, tmp_path, clock):
    """Of a fifth of the rows: 20 rows · 3 calls · 0.5 s; tokens as the whole input takes."""
    seen = plan(job(source), str(tmp_path / "run"), sample=4)
    outcomes = Ranker(job(source).teacher).rank([make_list(f"q{n:02d}", SIZE) for n in range(20)])
    tokens = sum(o.usage.computed_tokens for o in outcomes)
    assert seen.work(20) == {"calls": 60.0, "tokens": tokens, "replica_seconds": pytest.approx(30.0)}
    assert (seen.rows, seen.finished, seen.sampled, seen.failed) == (20, 0, 4, 0)
    assert (seen.tokens_error, seen.load_seconds, seen.seconds_beside) == (0.0, 7.0, pytest.approx(0.0))


def test_the_error_of_the_mean():
    """Tokens 10, 20 and 30: standard deviation 10, error 10 / √3 of a mean of 20. A row that broke the contract took
    nothing: with it 0, 10, 20, 30 have a mean of 15."""
    requests = [make_list(f"q{n}") for n in range(3)]
    outcomes = [
        planning.Outcome(request=r, scores=None, usage=planning.Usage(calls=1, prompt_tokens=10 * n), error=e)
        for n, (r, e) in enumerate(zip(requests, (None, None, "no"), strict=True), start=1)
    ]
    three = planning._per_row(outcomes, 3)
    assert three["tokens_error"] == pytest.approx(10 / 3**0.5 / 20)
    assert (three["failed"], three["sampled"], three["prompt_tokens"]) == (1, 3, 20)
    four = planning._per_row(outcomes, 4)
    assert (four["failed"], four["prompt_tokens"], four["calls"]) == (2, 15, 0.75)
    assert planning._per_row(outcomes[:1], 1)["tokens_error"] is None


def test_what_the_store_holds_is_not_asked_again(source, tmp_path, clock):
    """Answers of 8 of 20 queries are there: 12 · 3 calls are left, and their time. The plan itself stores nothing."""
    store = StoreSettings(uri=str(tmp_path / "store"))
    wrap = partial(StoredBackend, store=LabelStore(store))
    Ranker(job(source).teacher, wrap=wrap).rank([make_list(f"q{n:02d}", SIZE) for n in range(8)])
    files = set(Path(store.uri).iterdir())
    seen = plan(job(source, store=store.model_dump()), str(tmp_path / "run"), sample=20)
    assert (seen.stored_calls, seen.stored_tokens) == (pytest.approx(0.4), pytest.approx(0.4))
    assert seen.calls == SIZE
    assert seen.work(20)["calls"] == pytest.approx(36)
    assert seen.work(20)["replica_seconds"] == pytest.approx(18.0)
    assert set(Path(store.uri).iterdir()) == files


def finish(run: str, ids: list[str], *, name: str = "part.parquet") -> None:
    folder = Path(run, "checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"query_id": ids}), folder / name)


def test_finished_rows_are_neither_sampled_nor_counted(source, tmp_path):
    """Every row but the last five is finished; the model fails on those that are."""
    run = str(tmp_path / "run")
    finish(run, [f"q{n:02d}" for n in range(15)])
    finish(run, ["q15"], name="part.pending.parquet")
    seen = plan(job(source, model={"fail_on": "of q0"}), run, sample=20)
    assert (seen.rows, seen.finished, seen.left, seen.sampled, seen.failed) == (20, 15, 5, 5, 0)


def test_a_bad_row_of_the_sample_counts_as_failed(tmp_path):
    source = str(tmp_path / "in")
    bad = {"query_id": "bad", "query": "", "instruction": None, "candidates": []}
    write_rows([*(candidate_row(make_list(f"q{n}", SIZE)) for n in range(3)), bad], source, CANDIDATES)
    seen = plan(job(source), str(tmp_path / "run"), sample=4)
    assert (seen.sampled, seen.failed, seen.calls) == (4, 1, SIZE * 3 / 4)


def test_nothing_to_sample_is_an_error(source, tmp_path):
    run = str(tmp_path / "run")
    with pytest.raises(ConfigError, match="--sample 0: a forecast needs at least one row"):
        plan(job(source), run, sample=0)
    with pytest.raises(InputError, match=r"every row of the sample failed \(4\), for example: .*document"):
        plan(job(source, model={"fail_on": "document"}), run, sample=4)
    write_rows([{"query_id": "x", "query": "", "candidates": []}], str(tmp_path / "bad"), CANDIDATES)
    with pytest.raises(InputError, match=r"none of 1 sampled rows can be ranked: query 'x': 'query' is empty"):
        plan(job(str(tmp_path / "bad")), run, sample=4)
    finish(run, [f"q{n:02d}" for n in range(20)])
    with pytest.raises(InputError, match="no row is left to plan: 20 rows"):
        plan(job(source), run, sample=4)
    assert not Path(run, planning.FILE).exists()


def test_an_input_without_rows_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(CANDIDATES.empty_table(), tmp_path / "in" / "part.parquet")
    with pytest.raises(InputError, match="in: has no rows to plan for"):
        plan(job(str(tmp_path / "in")), str(tmp_path / "run"), sample=4)


def test_a_run_of_another_config_is_refused(source, tmp_path):
    run = RunFolder(uri=str(tmp_path / "run"))
    run.start("label", job(source, model={"seed": 1}), {source: "0"})
    with pytest.raises(RunError, match=r"teacher\.model\.seed: 1 -> 0"):
        plan(job(source), run.uri, sample=4)


def test_a_run_that_was_started_can_be_planned(source, tmp_path):
    """As the label job starts it: with the digests of its prompt and its model beside the input's."""
    run, settings = RunFolder(uri=str(tmp_path / "run")), job(source)
    digests = preflight(settings.teacher) | {source: inspect_input(source, CANDIDATES).fingerprint}
    run.start("label", settings, digests)
    assert plan(settings, run.uri, sample=4).left == 20
    run.update(inputs=dict.fromkeys(digests, "0"))
    with pytest.raises(RunError, match="content of input"):
        plan(settings, run.uri, sample=4)


def test_the_config_tells_which_job_it_is(tmp_path):
    file = tmp_path / "job.yaml"
    for key, model in {"teacher": LabelSettings, "ranker": RerankSettings}.items():
        file.write_text(f"input: x\n{key}: {{method: first_stage}}\n")
        assert isinstance(load_job(str(file), ["execution.actors=3"]), model)
    file.write_text("input: x\n")
    with pytest.raises(ConfigError, match=r"job\.yaml: has neither teacher: nor ranker:"):
        load_job(str(file), [])


def test_a_ranker_without_a_model_takes_its_own_time(tmp_path):
    source = str(tmp_path / "in")
    write_candidates([make_list(f"q{n}", scores=(3.0, 2.0, 1.0)) for n in range(4)], source)
    settings = config.validate(RerankSettings, {"input": source, "ranker": {"method": "first_stage"}}, "test")
    seen = plan(settings, str(tmp_path / "run"), sample=4)
    assert (seen.calls, seen.computed_tokens, seen.flops_per_token) == (0, 0, 0)
    assert seen.seconds_beside > 0


def test_the_sample_is_timed_as_a_replica_runs(source, tmp_path, monkeypatch):
    """While operations are counted nothing is compiled, nor ever after: they are counted last."""
    modes = []

    class Here(Fake):
        device = torch.device("cpu")

        def run(self, calls):
            modes.append(_get_current_dispatch_mode())
            return super().run(calls)

    monkeypatch.setattr("rerank_ray.ranking.rankers.load_backend", Here)
    plan(job(source), str(tmp_path / "run"), sample=8)
    assert [mode is None for mode in modes] == [True] * (len(modes) - 1) + [False]
    assert len(modes) == 1 + 8 // 4 + 1


def test_a_model_elsewhere_is_not_asked_for_a_count(source, tmp_path, asked):
    """Servers are paid for each call: one row warms them up, and none is asked to count operations."""
    assert plan(job(source), str(tmp_path / "run"), sample=8).flops_per_token == 0
    assert sum(asked) == (1 + 8) * SIZE


def test_as_many_rows_side_by_side_as_in_the_job(source, tmp_path, asked):
    """Its blocks are of three rows, however many a batch may have; of a sample of eight six are whole batches."""
    execution = {"rows_per_batch": 8, "rows_per_block": 3}
    assert plan(job(source, execution=execution), str(tmp_path / "run"), sample=8).sampled == 6
    assert asked == [SIZE, *[3 * SIZE] * 2]


def test_time_without_tokens_is_the_rows(source, tmp_path, monkeypatch, clock):
    """A server that counts no tokens: 20 rows · 3 calls · 0.5 s all the same."""
    load = rankers.load_backend

    class Uncounted(load):
        def run(self, calls):
            return [replace(r, usage=Usage(calls=1)) for r in super().run(calls)]

    monkeypatch.setattr("rerank_ray.ranking.rankers.load_backend", Uncounted)
    seen = plan(job(source), str(tmp_path / "run"), sample=5)
    assert seen.work(20) == {"calls": 60.0, "tokens": 0.0, "replica_seconds": pytest.approx(30.0)}
    assert printed(seen, ExecutionSettings())["time"].startswith("0:00:37 ")


def test_a_first_row_that_takes_longer_is_the_loadings(source, tmp_path, monkeypatch, clock):
    """Compiling takes 40 s at the first call, beside 7 s of loading."""
    load, now = rankers.load_backend, planning.time.perf_counter
    late = []

    class Compiled(load):
        def run(self, calls):
            late.append(40.0)
            return super().run(calls)

    monkeypatch.setattr(planning.time, "perf_counter", lambda: now() + (40.0 if late else 0.0))
    monkeypatch.setattr("rerank_ray.ranking.rankers.load_backend", Compiled)
    seen = plan(job(source), str(tmp_path / "run"), sample=5)
    assert (seen.load_seconds, seen.work(20)["replica_seconds"]) == (pytest.approx(47.0), pytest.approx(30.0))


@pytest.mark.parametrize("gpus", [0, 0.5])
def test_a_job_without_gpus_is_planned_without(source, tmp_path, monkeypatch, gpus: float):
    """As its replicas, which see none; on a machine that has one `device: auto` would time that."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    plan(job(source, execution={"gpus_per_actor": gpus}), str(tmp_path / "run"), sample=2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0" if gpus else "")


def test_shared_tokens_are_those_of_the_job(tiny_llama, tmp_path):
    """A query's prompts share its beginning, in the plan as in the job: both compute as many tokens."""
    rows = [make_list(f"q{n:02d}", SIZE) for n in range(6)]
    rows = [replace(r, query=replace(r.query, text=r.query.text + " the cat of alpha" * 8)) for r in rows]
    write_candidates(rows, str(tmp_path / "in"))
    model = {"kind": "hf_causal", "path": str(tiny_llama), "dtype": "float32", "max_length": 256}
    settings = job(str(tmp_path / "in"), teacher={"method": "yes_no", "model": model}, execution={"rows_per_batch": 6})
    seen = plan(settings, str(tmp_path / "run"), sample=6)
    usages = [o.usage for o in Ranker(settings.teacher).rank(rows)]
    assert seen.shared_tokens == pytest.approx(sum(u.cached_tokens for u in usages) / 6)
    assert seen.shared_tokens > 0.2 * seen.prompt_tokens
    assert seen.work(6)["tokens"] == pytest.approx(sum(u.computed_tokens for u in usages))


def test_what_warmed_the_engine_up_is_not_taken_for_work_saved(tiny_bert, source, tmp_path):
    """A worker remembers embeddings of documents; in the plan as in the job, each row's are new to it."""
    teacher = {"method": "bi_encoder", "model": {"kind": "bi_encoder", "path": str(tiny_bert), "dtype": "float32"}}
    settings = job(source, teacher=teacher, execution={"rows_per_batch": 20})
    seen = plan(settings, str(tmp_path / "run"), sample=20)
    outcomes = Ranker(settings.teacher).rank([make_list(f"q{n:02d}", SIZE) for n in range(20)])
    assert seen.work(20)["tokens"] == pytest.approx(sum(o.usage.computed_tokens for o in outcomes))
    assert seen.embeds


def test_operations_are_those_of_the_architecture(tiny_llama, source, tmp_path):
    """One prompt of L padded tokens: 2 · weights · L and 4 · L² · width for QKᵀ and AV in all layers but the last. Of
    that keys and values for all tokens and the rest for one, and the output layer of two labels for it; all else is
    below 0.1 %."""
    model = {"kind": "hf_causal", "path": str(tiny_llama), "dtype": "float32", "max_length": 128}
    settings = job(source, teacher={"method": "yes_no", "model": model})
    backend = HFCausal(HFCausalSettings(path=str(tiny_llama), dtype="float32"))
    meter = planning._Meter(None)
    ranker = Ranker(settings.teacher, wrap=meter.wrap)
    per_token = planning._flops_per_token(ranker, meter, make_list("q", 1))
    tokens = meter.totals.tokens
    length = padded_length(tokens, None)
    llama, shape = backend.model, backend.model.config
    width = shape.num_attention_heads * shape.head_dim
    weights = [sum(m.weight.numel() for m in x.modules() if isinstance(m, torch.nn.Linear)) for x in llama.model.layers]
    keys_and_values = 2 * shape.hidden_size * shape.num_key_value_heads * shape.head_dim
    expected = 2 * sum(weights[:-1]) * length + 4 * length**2 * width * (len(weights) - 1)
    expected += 2 * keys_and_values * length + 2 * (weights[-1] - keys_and_values) + 4 * length * width
    expected += 2 * 2 * shape.hidden_size
    assert per_token * tokens == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("fast", [PrepackedLinear, Int8Linear])
def test_operations_of_fast_layers_are_counted(fast: type):
    """Seven rows from 64 to 96 numbers, which torch's own counter takes for nothing."""
    layer = fast(torch.nn.Linear(64, 96))
    counter = FlopCounterMode(display=False, custom_mapping=planning._cpu_operations())
    with torch.inference_mode(), counter:
        layer(torch.randn(7, 64))
    assert counter.get_total_flops() == 2 * 7 * 64 * 96


def text_of(seen: Forecast, execution: ExecutionSettings, **arguments) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    print_forecast(seen, execution, console, **arguments)
    return console.export_text()


def printed(*arguments, **named) -> dict[str, str]:
    lines = [line.strip("│ ").split("│") for line in text_of(*arguments, **named).splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in lines}


def test_time_and_cost():
    """800 rows are left: 800 s beside 480,000 tokens · 0.01 s are 5,600 s of replicas. On 4 GPUs with two replicas
    each: 20 s + 5,600 s / 8 = 720 s, which are 0.8 GPU-hours."""
    lines = printed(forecast(), ExecutionSettings(gpus_per_actor=0.5), gpus=4, price_per_hour=2.5)
    assert lines["rows"] == "1,000, 200 of them finished: 800 left"
    assert lines["model calls"] == "8,000, 50.0% of them in the label store"
    assert lines["prompt tokens"] == "800,000, 240,000 of them shared"
    assert (lines["output tokens"], lines["memory of a replica"]) == ("80,000", "1.5 GiB")
    assert lines["tokens to compute"] == "480,000 ± 2.0% (one standard error)"
    assert lines["floating-point operations"] == "4.8e+14, 0.1 · 10¹² a second in the sample"
    assert lines["time"].startswith("0:12:00 on 4 GPUs, 0:00:20 of it")
    assert (lines["GPU-hours"], lines["cost"]) == ("0.80", "2.00")


def test_times_of_a_cpu_are_not_taken_for_a_gpus():
    said = "its times are those of a CPU"
    assert said in text_of(forecast(), ExecutionSettings(gpus_per_actor=1))
    assert said not in text_of(forecast(gpu_memory_gib=3.0), ExecutionSettings(gpus_per_actor=1))
    assert said not in text_of(forecast(), ExecutionSettings())


def test_what_a_forecast_does_not_know_is_said():
    """A sample below a replica's batch, documents that come again, and another number of GPUs than the config's."""
    execution = ExecutionSettings(actors=2, gpus_per_actor=0.5)
    fits = text_of(forecast(gpu_memory_gib=3.0), execution)
    for said, text in (
        ("--sample 16.", text_of(forecast(sampled=15), execution)),
        ("tokens and time are an upper bound", text_of(forecast(embeds=True), execution)),
        ("The config has execution.actors 2: set it to 8 for 4 GPUs.", text_of(forecast(), execution, gpus=4)),
    ):
        assert said in text
        assert said not in fits
    assert "--sample" not in text_of(forecast(sampled=10, rows=210), execution)


def test_without_gpus_replicas_are_counted():
    """The config's two replicas: 20 s + 5,600 s / 2 = 2,820 s each."""
    lines = printed(forecast(), ExecutionSettings(actors=2))
    assert lines["time"].startswith("0:47:00 on 2 replicas,")
    assert lines["replica-hours"] == "1.57"
    assert "cost" not in lines


def test_the_finished_job_stands_beside_its_forecast(source, tmp_path, clock):
    run, fingerprint = RunFolder(uri=str(tmp_path / "run")), inspect_input(source, CANDIDATES).fingerprint
    actual = {"calls": 30, "tokens": 400, "replica_seconds": 16.0}
    assert compare(run, job(source), fingerprint, 10, actual) is None
    plan(job(source), run.uri, sample=5)
    compared = compare(run, job(source, execution={"actors": 3}), fingerprint, 10, actual)
    assert compared["rows"] == 10
    assert (compared["predicted"]["calls"], compared["predicted"]["replica_seconds"]) == (30.0, 15.0)
    assert compared["actual"] == actual
    assert compare(run, job(source, model={"seed": 1}), fingerprint, 10, actual) is None
    assert compare(run, job(source), "another input's", 10, actual) is None
    forecast = json.loads(storage.read_text(run.path(planning.FILE)))
    storage.write_text(run.path(planning.FILE), json.dumps(forecast | {"of_another_version": 1}))
    assert compare(run, job(source), fingerprint, 10, actual) is None


def test_the_command(source, tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text(config.dump(job(source)))
    run = tmp_path / "run"
    assert main(["plan", str(file), "--run", str(run), "--sample", "3", "--set", "execution.actors=2"]) == 0
    assert "on 2 replicas," in capsys.readouterr().out
    assert json.loads((run / "plan.json").read_text())["sampled"] == 3
    with pytest.raises(SystemExit):
        main(["plan", str(file), "--gpus", "0"])
    assert "--gpus: 0 is not above 0" in capsys.readouterr().err
