"""Two workers take the steps of one, whatever each holds, and go on where they were when something was killed.

The processes of `world` run the training loop without Ray; what is killed runs on Ray Train, and has to end with the
weights of the same training there, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from fixtures.rows import label_row, make_list, write_labels
from fixtures.tiny_models import tiny_bert_tokenizer, tiny_t5_folder
from fixtures.training_world import Training, train_all
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from rerank_ray import config
from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.parallel import World
from rerank_ray.distill.train import train
from rerank_ray.settings.distill import DistillSettings

STRATEGIES = ["ddp", "zero2", "zero3"]
# What two workers do differently from one is to add float32 numbers in another order.
TOLERANCE = 1e-4
ROUNDED = 1e-4
"""Share of a matrix's weights that may be elsewhere."""
# Constants that softmax over keys and losses on lists take no notice of: AdamW steps along their gradient's rounding.
UNSEEN = ("attention.self.key.bias", "classifier.bias")

CURVES: dict[str, dict] = {name: {"execution": {"strategy": name}} for name in STRATEGIES}
MORE_CURVES: dict[str, dict] = {
    "zero2, offload": {"execution": {"strategy": "zero2", "offload": True}},
    "zero3, offload": {"execution": {"strategy": "zero3", "offload": True}},
    # One worker's list is above the limit in a step in which the other's is not, and both compute it again.
    "zero3, cached": {"execution": {"strategy": "zero3"}, "tokens_per_backward": 150},
    "zero3, similarity": {
        "execution": {"strategy": "zero3"},
        "student": {"head": "similarity", "layers": [1, 2], "gate": -1.0},
    },
    "zero3, LoRA": {"execution": {"strategy": "zero3"}, "student": {"lora": {"rank": 2}}},
    "zero2, averaged": {"execution": {"strategy": "zero2"}, "optimizer": {"averaging": 0.5}},
}


def settings(labels: str, base: Path, **changes) -> DistillSettings:
    """Four steps of five queries, the last of one; `changes` are merged one level deep."""
    content = {
        "input": [labels],
        "student": {"base": str(base), "max_length": 48, "max_query_length": 16, "dropout": 0.0},
        "optimizer": {"learning_rate": 1e-3, "head_learning_rate": 1e-2},
        "validation": {"fraction": 0.25, "every_steps": 1, "patience": 1000},
        "sampling": {"group_size": 4},
        "queries_per_step": 5,
        "tokens_per_micro_batch": 64,
        "tokens_per_backward": 240,
        "dtype": "float32",
        "execution": {"workers": 2},
    }
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    return config.validate(DistillSettings, content, source="test")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with matrices of 131,072 numbers: above the 100,000 that ZeRO-3 leaves undivided."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), tiny_bert_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_attention_heads=4,
                num_hidden_layers=2,
                intermediate_size=4096,
                max_position_embeddings=48,
                initializer_range=0.1,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Labelled queries of 3 to 8 candidates, of which 16 are trained on; the teacher prefers early words of `WORDS`."""
    rows = [
        label_row(make_list(f"q{q}", 3 + q % 6, text="cat dog"), [float(-i) for i in range(3 + q % 6)])
        for q in range(26)
    ]
    folder = write_labels(tmp_path_factory.mktemp("labels"), rows)
    assert len(LabelSet.open([folder], 0.25, 0).train) % 5 == 1
    return folder


def killable(labels: str, base: Path, strategy: str) -> DistillSettings:
    """Twelve steps with dropout, long enough to be killed in the middle."""
    return settings(
        labels,
        base,
        student={"dropout": 0.1},
        validation={"every_steps": 2},
        epochs=3,
        execution={"strategy": strategy},
    )


@pytest.fixture(scope="module")
def world(labels: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    """Trainings on two processes: each of `CURVES`, and once more from its second step on."""
    folder = tmp_path_factory.mktemp("world")
    trainings = {}
    # ZeRO-3, which puts a linear function of its own into torch for the rest of the process, is last.
    for name, changes in CURVES.items():
        trainings[name] = whole = Training(folder / name, settings(labels, base, **changes))
        trainings[f"{name} resumed"] = Training(folder / f"{name} resumed", whole.settings, whole.checkpoint(2))
    train_all(list(trainings.values()), folder / "rendezvous", workers=2)
    return trainings


@pytest.fixture(scope="module")
def larger_world(labels: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    """Trainings on two processes: what is killed elsewhere, undisturbed, and each of `MORE_CURVES`."""
    folder = tmp_path_factory.mktemp("larger_world")
    trainings = {n: Training(folder / n, killable(labels, base, n)) for n in STRATEGIES}
    trainings |= {n: Training(folder / n, settings(labels, base, **changes)) for n, changes in MORE_CURVES.items()}
    train_all(list(trainings.values()), folder / "rendezvous", workers=2)
    return trainings


def student_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted((checkpoint / "student").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", CURVES)
def test_two_workers_have_the_loss_curve_of_one(world: dict[str, Training], name: str):
    has_the_curve_of_one(world[name])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MORE_CURVES)
def test_whatever_is_trained_and_however(larger_world: dict[str, Training], name: str):
    has_the_curve_of_one(larger_world[name])


def test_workers_compare_passages_within_their_own_lists(labels: str, tmp_path: Path):
    """A student whose scores depend on whole lists, which no worker shares with another."""
    student = {"head": "mvp", "max_length": 64}
    chosen = settings(labels, tiny_t5_folder(tmp_path / "t5", sentinels=4), student=student)
    training = Training(tmp_path / "training", chosen)
    train_all([training], tmp_path / "rendezvous", workers=2)
    has_the_curve_of_one(training)


def test_workers_divide_the_passages_of_an_exit_warm_up(labels: str, base: Path, tmp_path: Path):
    """Two passages a step for three workers, of whom one has none. Where a gradient is next to nothing AdamW steps
    along its rounding, so a few weights may differ."""
    student = {"head": "similarity", "layers": [1, 2], "gate": -1.0}
    texts = {"passages": 2, "spans": 2, "variants": 2}
    student["exit_warm_up"] = {"steps": 10, "optimizer": {"learning_rate": 1e-3}} | texts
    training = Training(tmp_path / "training", settings(labels, base, student=student, max_steps=1))
    train_all([training], tmp_path / "rendezvous", workers=3)
    alone, weights = trained_alone(training.settings)
    together = training.metrics()[0]
    compared = {name: value for name, value in alone[0].items() if name.startswith("exit_warm_up/layer")}
    assert len(compared) == 4
    assert {name: together[name] for name in compared} == pytest.approx(compared, rel=1e-2, abs=TOLERANCE)
    assert min(compared.values()) > 0
    apart = [(weights[0][n] - w).abs().flatten() for n, w in student_weights(training.checkpoint(0)).items()]
    assert (torch.cat(apart) > TOLERANCE).float().mean() < 0.02


def trained_alone(chosen: DistillSettings) -> tuple[dict[int, dict], dict[int, dict[str, torch.Tensor]]]:
    """Metrics and the student's weights of every step that one worker reports."""
    metrics: dict[int, dict] = {}
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def report(of_step: dict, checkpoint: Path | None) -> None:
        metrics[of_step["step"]] = of_step
        if checkpoint is not None:
            weights[of_step["step"]] = student_weights(checkpoint)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(chosen.model_copy(update={"execution": type(chosen.execution)()}), World(), report)
    torch.set_num_threads(before)
    return metrics, weights


def has_the_curve_of_one(training: Training) -> None:
    """Loss, gradient norm, skipped queries and nDCG of every step, and the weights as they are saved.

    Where a gradient is next to nothing AdamW steps along its rounding, so a few weights may differ.
    """
    alone, weights = trained_alone(training.settings)
    together = training.metrics()
    assert list(together) == list(alone) == [0, 1, 2, 3, 4]
    for step, metrics in alone.items():
        compared = [
            m for m in metrics if m.startswith(("loss/", "skipped_queries/", "validation_ndcg", "learning_rate"))
        ]
        assert {m: together[step][m] for m in compared} == pytest.approx(
            {m: metrics[m] for m in compared}, rel=TOLERANCE, abs=TOLERANCE
        )
        for tensor_name, tensor in student_weights(training.checkpoint(step)).items():
            if not tensor_name.endswith(UNSEEN):
                close = torch.isclose(tensor, weights[step][tensor_name], rtol=TOLERANCE, atol=TOLERANCE)
                assert (~close).sum() <= ROUNDED * close.numel(), f"step {step}: {tensor_name}"
    moved = max(float((weights[4][n] - w).abs().max()) for n, w in weights[0].items() if not n.endswith(UNSEEN))
    assert moved > 10 * TOLERANCE


@pytest.mark.parametrize("name", CURVES)
def test_two_workers_resume_bit_for_bit(world: dict[str, Training], name: str):
    whole, resumed = world[name], world[f"{name} resumed"]
    assert list(resumed.metrics()) == [3, 4]
    for step, metrics in resumed.metrics().items():
        assert metrics["loss/total"] == whole.metrics()[step]["loss/total"]
        for tensor_name, tensor in student_weights(whole.checkpoint(step)).items():
            assert torch.equal(student_weights(resumed.checkpoint(step))[tensor_name], tensor), tensor_name


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_optimizer_is_divided(world: dict[str, Training], name: str):
    """Each worker wrote its own half of AdamW's two moments and of the master weights."""
    parameters = sum(tensor.numel() for tensor in student_weights(world[name].checkpoint(4)).values())
    shards = sorted((world[name].checkpoint(4) / "deepspeed").glob("*optim_states.pt"))
    assert len(shards) == 2
    for shard in shards:
        assert shard.stat().st_size < 0.55 * 3 * 4 * parameters
    assert sum(shard.stat().st_size for shard in shards) > 3 * 4 * parameters


class Drivers:
    """Starts `rerank-ray distill` in processes of its own."""

    def __init__(self) -> None:
        self._started: list[psutil.Process] = []

    def start(self, file: Path, run: Path, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "rerank_ray.cli", "distill", str(file), "--run", str(run)]
        driver = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self._started.append(psutil.Process(driver.pid))
        return driver

    def stop(self) -> None:
        """Kill those that a failed test left, and their Ray."""
        for driver in self._started:
            if driver.is_running():
                for process in [*driver.children(recursive=True), driver]:
                    process.kill()


@pytest.fixture
def drivers() -> Iterator[Drivers]:
    started = Drivers()
    yield started
    started.stop()


def logged_step(run: Path) -> int:
    log = run / "metrics.jsonl"
    return json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() else -1


def wait_for_step(run: Path, step: int, driver: subprocess.Popen) -> None:
    """Wait until a validation at this step, or a later one, was logged."""
    deadline = time.monotonic() + 400
    while logged_step(run) < step:
        assert driver.poll() is None, f"the driver ended before step {step}: {driver.stderr.read()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def train_workers(driver: subprocess.Popen) -> list[psutil.Process]:
    """Of the driver's own local Ray."""
    processes = psutil.Process(driver.pid).children(recursive=True)
    return [p for p in processes if "RayTrainWorker" in " ".join(p.cmdline())]


def last_checkpoint(run: Path) -> tuple[int, Path]:
    """What training ended with, whichever step was best."""
    states = {f.parent: torch.load(f, weights_only=True)["progress"] for f in run.glob("checkpoints/*/trainer.pt")}
    folder = max(states, key=lambda f: states[f]["step"])
    return states[folder]["step"], folder


def write_config(settings: DistillSettings, file: Path) -> Path:
    file.write_text(config.dump(settings))
    return file


def ends_as(whole: Training, run: Path) -> None:
    step, folder = last_checkpoint(run)
    assert step == 12
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(
        whole.metrics()
    )
    for name, tensor in student_weights(whole.checkpoint(12)).items():
        assert torch.equal(student_weights(folder)[name], tensor), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_worker_changes_nothing(
    larger_world: dict[str, Training], tmp_path: Path, drivers: Drivers, strategy: str
):
    """`kill -9` of the second worker after step 4: Ray Train starts both again, from the last checkpoint."""
    whole, run = larger_world[strategy], tmp_path / "run"
    driver = drivers.start(write_config(whole.settings, tmp_path / "distill.yaml"), run)
    wait_for_step(run, 4, driver)
    killed = train_workers(driver)
    assert len(killed) == 2
    killed[1].kill()
    assert logged_step(run) < 12
    assert driver.wait(timeout=400) == 0, driver.stderr.read()
    ends_as(whole, run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_resumes(larger_world: dict[str, Training], tmp_path: Path, drivers: Drivers):
    """`kill -9` of the driver, and the same command again."""
    whole, run = larger_world["zero2"], tmp_path / "run"
    file = write_config(whole.settings, tmp_path / "distill.yaml")
    driver = drivers.start(file, run)
    wait_for_step(run, 4, driver)
    # Where cores are few, workers could end the run before Ray ends them.
    for worker in train_workers(driver):
        worker.suspend()
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert logged_step(run) < 12
    again = drivers.start(file, run)
    assert again.wait(timeout=400) == 0, again.stderr.read()
    ends_as(whole, run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ddp_goes_on_with_fewer_workers_when_a_node_is_lost(labels: str, base: Path, tmp_path: Path, drivers: Drivers):
    """Two nodes of one worker each; one is killed, and the other ends the run with the curve of an undisturbed one."""
    from ray.cluster_utils import Cluster

    chosen = settings(
        labels,
        base,
        validation={"every_steps": 2},
        epochs=3,
        execution={"min_workers": 1},
    )
    run = tmp_path / "run"
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": quick})
    lost = cluster.add_node(num_cpus=1)
    try:
        cluster.wait_for_nodes()
        driver = drivers.start(write_config(chosen, tmp_path / "distill.yaml"), run, RAY_ADDRESS=cluster.address)
        wait_for_step(run, 4, driver)
        cluster.remove_node(lost, allow_graceful=False)
        assert logged_step(run) < 12
        assert driver.wait(timeout=400) == 0, driver.stderr.read()
    finally:
        cluster.shutdown()
    alone: dict[int, dict] = {}
    train(
        chosen.model_copy(update={"execution": type(chosen.execution)()}),
        World(),
        lambda metrics, _: alone.update({metrics["step"]: metrics}),
    )
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["loss/total"] for m in curve[1:]] == pytest.approx(
        [alone[m["step"]]["loss/total"] for m in curve[1:]], rel=TOLERANCE
    )
    assert curve[-1]["step"] == 12
