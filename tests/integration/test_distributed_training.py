"""Two workers take the steps of one, whatever each holds, and go on where they were: the loop as Ray Train runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.rows import label_row, make_list, write_labels
from fixtures.tiny_models import tiny_bert_tokenizer
from fixtures.training_world import Training, train_all
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from rerank_ray import config
from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.train import World, train
from rerank_ray.settings.distill import DistillSettings

STRATEGIES = ["ddp", "zero2", "zero3"]
# What two workers do differently from one is to add float32 numbers in another order.
TOLERANCE = 1e-4
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
    """Trainings on two processes: each of `MORE_CURVES`."""
    folder = tmp_path_factory.mktemp("larger_world")
    trainings = {n: Training(folder / n, settings(labels, base, **changes)) for n, changes in MORE_CURVES.items()}
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


def has_the_curve_of_one(training: Training) -> None:
    """Loss, gradient norm, skipped queries and nDCG of every step, and the weights as they are saved."""
    alone: dict[int, dict] = {}
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def report(metrics: dict, checkpoint: Path) -> None:
        alone[metrics["step"]], weights[metrics["step"]] = metrics, student_weights(checkpoint)

    chosen = training.settings
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(chosen.model_copy(update={"execution": type(chosen.execution)()}), World(), report)
    torch.set_num_threads(before)

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
                torch.testing.assert_close(
                    tensor, weights[step][tensor_name], rtol=TOLERANCE, atol=TOLERANCE, msg=tensor_name
                )
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
