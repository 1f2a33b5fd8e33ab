"""The training loop on a tiny BERT: it learns, resumes bit for bit, stops when it should, and trains every head."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.rows import write_labels
from fixtures.teachable import CANDIDATES, settings, teachable
from fixtures.training_world import Reports, in_three_parts
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from rerank_ray.distill.checkpoints import STUDENT
from rerank_ray.distill.metrics_log import summary_line
from rerank_ray.distill.parallel import World
from rerank_ray.distill.step_data import StepData
from rerank_ray.distill.train import Trainer, train
from rerank_ray.errors import InputError, RunError
from rerank_ray.settings.distill import DistillSettings


def weights(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of every file of a checkpoint's student."""
    folder = checkpoint / "student"
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("head", ["linear", "similarity", "mvp"])
def test_the_student_learns(labels: str, tiny_bert: Path, tiny_t5: Path, tmp_path: Path, head: str):
    """It is validated before the first step; after three epochs loss is lower and nDCG@10 higher than at the start."""
    base = tiny_t5 if head == "mvp" else tiny_bert
    chosen = settings(labels, base, student={"head": head, "max_length": 64, "dropout": 0.0}, epochs=6)
    reports = Reports(tmp_path)
    train(chosen, World(), reports)
    steps = sorted(reports.metrics)
    assert steps[0] == 0
    assert "loss/total" not in reports.metrics[0]
    first, last = reports.metrics[4], reports.metrics[steps[-1]]
    assert last["step"] == last["total_steps"]
    assert last["loss/total"] < 0.8 * first["loss/total"]
    assert last["validation_ndcg@10"] > reports.metrics[0]["validation_ndcg@10"]
    best = max(steps, key=lambda s: (reports.metrics[s]["validation_ndcg@10"], s))
    assert last["best_step"] == best


def test_steps_and_epochs_are_counted(labels: str, tiny_bert: Path, tmp_path: Path):
    """One step takes four queries; the last step of an epoch may take fewer, and max_steps ends earlier."""
    trainer = Trainer(settings(labels, tiny_bert), World(), None)
    count = len(trainer.data.train)
    assert count + len(trainer.data.validation) == 24
    assert trainer.steps.per_epoch == -(-count // 4)
    assert trainer.total_steps == 3 * trainer.steps.per_epoch
    assert Trainer(settings(labels, tiny_bert, max_steps=5), World(), None).total_steps == 5
    reports = Reports(tmp_path)
    train(settings(labels, tiny_bert, max_steps=5), World(), reports)
    assert sorted(reports.metrics) == [0, 4, 5]


VARIANTS = {
    "linear": {"student": {"head": "linear", "dropout": 0.3}},
    "layer-wise": {"student": {"head": "linear", "layers": [1, 3], "dropout": 0.3}},
    "similarity": {"student": {"head": "similarity", "layers": [2, 3], "gate": -2.0}},
    "decoder, layer-wise": {"student": {"head": "linear", "layers": [1, 2]}},
    "decoder, yes_no": {"student": {"head": "yes_no", "max_length": 128}},
    "bi-encoder": {"student": {"head": "bi_encoder"}},
    "T5, mvp": {"student": {"head": "mvp", "max_length": 64, "dropout": 0.3}, "backward": "cached"},
    "LoRA": {"student": {"head": "linear", "dropout": 0.3, "lora": {"rank": 4, "dropout": 0.3}}},
    "DoRA, averaged": {
        "student": {"head": "similarity", "lora": {"rank": 2, "dora": True}},
        "optimizer": {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "averaging": 0.9},
    },
    "interpolated": {
        "student": {"head": "similarity", "layers": [2, 3], "dropout": 0.3},
        "validation": {"every_steps": 2, "interpolation": [0.3, 0.6]},
    },
    "interpolated, averaged": {
        "student": {"head": "linear", "dropout": 0.3},
        "optimizer": {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "averaging": 0.9},
        "validation": {"every_steps": 2, "interpolation": [0.5]},
    },
    "frozen": {"student": {"head": "linear", "freeze": {"embeddings": True, "layers": 1}, "take_layers": [1, 3]}},
    "averaged": {
        "student": {"head": "linear", "dropout": 0.3},
        "optimizer": {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "averaging": 0.9},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_as_an_undisturbed_one(
    labels: str, tiny_bert: Path, tiny_llama: Path, tiny_t5: Path, tmp_path: Path, variant: str
):
    """Stopped in the middle of the first epoch and again in a later one, with dropout: every byte is the same."""
    base = {"decoder": tiny_llama, "T5": tiny_t5}.get(variant.partition(",")[0], tiny_bert)
    chosen = settings(labels, base, **{"validation": {"every_steps": 2}, **VARIANTS[variant]}, max_steps=8)
    whole = Reports(tmp_path / "whole")
    train(chosen, World(), whole)
    assert Trainer(chosen, World(), None).steps.per_epoch > 2
    parts = in_three_parts(tmp_path, lambda report, resume: train(chosen, World(), report, resume))
    assert sorted(parts[1].metrics) == [4, 6]
    assert sorted(parts[2].metrics) == [8]
    assert weights(parts[2].checkpoint(8)) == weights(whole.checkpoint(8))
    seen = {k: v for part in parts for k, v in part.metrics.items()}
    for step, metrics in whole.metrics.items():
        assert seen[step]["validation_ndcg@10"] == metrics["validation_ndcg@10"]
        assert seen[step].get("loss/total") == metrics.get("loss/total")
        assert seen[step]["best_step"] == metrics["best_step"]


def test_averaged_weights_are_validated_and_training_goes_on_from_the_trained_ones(labels: str, tiny_bert: Path):
    """After each step the average is 0.75 of itself and 0.25 of the weights; it is in the student only meanwhile."""
    optimizer = {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "averaging": 0.75}
    trainer = Trainer(settings(labels, tiny_bert, optimizer=optimizer), World(), None)
    expected = [p.detach().clone() for p in trainer.student.parameters()]
    for _ in range(3):
        trainer.train_step()
        expected = [0.75 * a + 0.25 * p.detach() for a, p in zip(expected, trainer.student.parameters(), strict=True)]
    trained = [p.detach().clone() for p in trainer.student.parameters()]
    with trainer.kept_weights():
        for parameter, average in zip(trainer.student.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), average, rtol=1e-5, atol=1e-6)
    for parameter, weight in zip(trainer.student.parameters(), trained, strict=True):
        assert torch.equal(parameter, weight)


def test_the_best_share_of_the_trained_weights_is_kept(labels: str, tiny_bert: Path, tmp_path: Path):
    """A quarter and half of the way from the start are validated beside trained weights, at a rate that spoils those;
    the best is saved, and training goes on from the trained ones."""
    optimizer = {"learning_rate": 3e-2, "head_learning_rate": 3e-2}
    student = {"head": "similarity", "dropout": 0.0}
    plain = settings(labels, tiny_bert, student=student, optimizer=optimizer, max_steps=4)
    shares = plain.model_copy(update={"validation": plain.validation.model_copy(update={"interpolation": (0.25, 0.5)})})
    start, undisturbed = Trainer(plain, World(), None), Trainer(plain, World(), None)
    for _ in range(plain.max_steps):
        undisturbed.train_step()
    trained = [p.detach().clone() for p in undisturbed.student.parameters()]
    by_share = {}
    for share in (0.25, 0.5, 1.0):
        mixed = Trainer(plain, World(), None)
        for p, a, b in zip(mixed.student.parameters(), start.student.parameters(), trained, strict=True):
            p.data = a.detach() * (1 - share) + b * share
        by_share[share] = mixed.validate()[0]
    best = max(by_share, key=by_share.get)
    assert best != 1.0
    reports = Reports(tmp_path)
    train(shares, World(), reports)
    last = reports.metrics[4]
    assert last["trained_share"] == best
    assert last["validation_ndcg@10"] == pytest.approx(by_share[best])
    assert "trained_share" not in undisturbed._validation_metrics()
    saved = load_file(reports.checkpoint(4) / STUDENT / "model.safetensors")
    name, weight = next((n, p) for n, p in undisturbed.student.backbone.named_parameters() if "query.weight" in n)
    before = dict(start.student.backbone.named_parameters())[name]
    torch.testing.assert_close(saved[name], before * (1 - best) + weight * best, rtol=1e-4, atol=1e-6)
    resumed = Trainer(shares, World(), reports.checkpoint(4))
    for parameter, expected in zip(resumed.student.parameters(), trained, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


def inputs(data: StepData) -> list[torch.Tensor]:
    """What the student is given in a step."""
    return [given for chunk in data.chunks for _, batch in chunk.pairs.batches for given in batch.values()]


def test_the_next_step_is_prepared_meanwhile(labels: str, tiny_bert: Path):
    """Its data is what the step asks for, over the end of an epoch, and none is prepared beyond the last step."""
    trainer = Trainer(settings(labels, tiny_bert, max_steps=8), World(), None)
    expected = [trainer.step_data(step) for step in range(8)]
    for step in range(8):
        found = trainer._step_data()
        assert [row.candidate_list.query.query_id for row, _ in found.groups] == [
            row.candidate_list.query.query_id for row, _ in expected[step].groups
        ]
        for given, wanted in zip(inputs(found), inputs(expected[step]), strict=True):
            assert torch.equal(given, wanted)
        assert (trainer._next is None) == (step == 7)
        trainer.progress.step += 1


def test_the_thread_that_prepares_uses_the_device(labels: str, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch):
    """A thread's current GPU is the first of the node, whatever its worker's is."""
    used = []
    monkeypatch.setattr(
        "rerank_ray.models.engine.use_device", lambda device: used.append((device, threading.get_ident()))
    )
    trainer = Trainer(settings(labels, tiny_bert), World(), None)
    trainer._step_data()
    trainer._next[1].result()
    ((device, thread),) = used
    assert device == trainer.device
    assert thread != threading.get_ident()


class HostSyncs(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to Python, for which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["linear", "similarity", "decoder, layer-wise", "decoder, yes_no", "averaged"])
def test_a_step_waits_for_no_value(
    labels: str, tiny_bert: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, variant: str
):
    """From the forward pass to the optimizer, once the first step has made its state: no number is read off a tensor.
    That the counter would see one is shown by the norm of the gradient."""
    base = tiny_llama if variant.startswith("decoder") else tiny_bert
    trainer = Trainer(settings(labels, base, **VARIANTS[variant], max_steps=8), World(), None)
    trainer.train_step()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("tolist"))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: pytest.fail("numpy"))
    with HostSyncs() as syncs:
        metrics = trainer.train_step()
        assert syncs.count == 0
        assert float(metrics["gradient_norm"]) > 0
    assert syncs.count == 1


@pytest.mark.parametrize("head", ["linear", "similarity"])
def test_metrics_come_between_validations(labels: str, tiny_bert: Path, tmp_path: Path, head: str):
    """Means over the steps since the last line, at the rate of the pretrained weights; they change no weight."""
    rates = {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "warmup_fraction": 0.0}
    chosen = {"max_steps": 4, "validation": {"every_steps": 3}, "student": {"head": head}, "optimizer": rates}
    reports, lines = Reports(tmp_path / "logged"), []
    train(settings(labels, tiny_bert, log_every_steps=2, **chosen), World(), reports, log=lines.append)
    assert [line["step"] for line in lines] == [2]
    assert sorted(reports.metrics) == [0, 3, 4]
    quiet = Reports(tmp_path / "quiet")
    train(settings(labels, tiny_bert, log_every_steps=100, **chosen), World(), quiet)
    assert weights(quiet.checkpoint(4)) == weights(reports.checkpoint(4))

    trainer = Trainer(settings(labels, tiny_bert, **chosen), World(), None)
    steps = [trainer.train_step() for _ in range(4)]
    total = [float(step["total"]) for step in steps]
    norms = [float(step["gradient_norm"]) for step in steps]
    for line, first, last in ((lines[0], 0, 2), (reports.metrics[3], 2, 3), (quiet.metrics[3], 0, 3)):
        assert line["loss/total"] == pytest.approx(statistics.fmean(total[first:last]), rel=1e-4)
        assert line["gradient_norm"] == pytest.approx(statistics.fmean(norms[first:last]), rel=1e-4)
        assert line["pairs_per_second"] > 0
    trainer.training_metrics()
    assert trainer._validation_metrics().keys() > {"validation_ndcg@10"}
    assert trainer._seen.positions == 0
    assert lines[0]["learning_rate"] == pytest.approx(1e-3 * 3 / 4)
    assert "validation_ndcg@10" not in lines[0]
    assert summary_line(lines[0]).startswith("step 2/4, ")
    assert summary_line(lines[0]).endswith(" of steps left")


def test_a_batch_that_does_not_fit_the_memory_names_what_to_lower(
    labels: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Other errors are what they are."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(Trainer, "train_step", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(RunError, match=r"lower tokens_per_micro_batch \(64\) .*Tried to allocate 2 GiB"):
        train(settings(labels, tiny_bert, max_steps=2), World(), Reports(tmp_path / "a"))
    error = RuntimeError("device-side assert")
    with pytest.raises(RuntimeError, match="device-side assert"):
        train(settings(labels, tiny_bert, max_steps=2), World(), Reports(tmp_path / "b"))


def test_dropout_is_on_and_the_seed_decides(labels: str, tiny_bert: Path, tmp_path: Path):
    """The same seed gives the same bytes, another seed or no dropout others: so the test above tests something."""

    def final(name: str, **changes) -> dict[str, bytes]:
        reports = Reports(tmp_path / name)
        student = {"dropout": changes.pop("dropout", 0.3)}
        train(settings(labels, tiny_bert, max_steps=2, student=student, **changes), World(), reports)
        return weights(reports.checkpoint(2))

    first = final("a")
    assert final("again") == first
    assert final("seed", seed=1)["model.safetensors"] != first["model.safetensors"]
    assert final("dropout", dropout=0.0)["model.safetensors"] != first["model.safetensors"]


def test_training_stops_without_a_new_best(labels: str, tiny_bert: Path, tmp_path: Path):
    """At a learning rate of next to nothing no validation beats step 0: two validations later it is over. The last of
    equal ones is the one that is kept."""
    chosen = settings(
        labels,
        tiny_bert,
        optimizer={"learning_rate": 1e-12, "head_learning_rate": 1e-12},
        validation={"every_steps": 1, "patience": 2},
        student={"dropout": 0.0},
    )
    reports = Reports(tmp_path)
    train(chosen, World(), reports)
    assert sorted(reports.metrics) == [0, 1, 2]
    assert reports.metrics[2]["best_step"] == 2
    again = Reports(tmp_path / "again")
    train(chosen, World(), again, reports.checkpoint(2))
    assert again.metrics == {}


@pytest.mark.parametrize("head", ["linear", "similarity"])
def test_every_layer_is_trained(labels: str, tiny_bert: Path, head: str):
    """Each head's parameters move, the first layer's too, and so does the backbone; the gate gets a gradient."""
    chosen = settings(labels, tiny_bert, student={"head": head, "layers": [1, 2, 3], "dropout": 0.0, "gate": -1.0})
    trainer = Trainer(chosen, World(), None)
    before = {n: p.detach().clone() for n, p in trainer.student.named_parameters()}
    losses = trainer.train_step()
    assert losses["self_distillation"] > 0
    changed = {n for n, p in trainer.student.named_parameters() if not torch.equal(p, before[n])}
    if head == "linear":
        expected = {f"early_heads.{i}.classifier.weight" for i in (1, 2)} | {"model.classifier.weight"}
        expected |= {"model.bert.encoder.layer.0.attention.self.query.weight"}
        assert expected <= changed
    else:
        assert {"gate", "log_scale", "linear"} <= changed
        for name, parameter in trainer.student.head_parameters().items():
            assert (parameter != before[name]).reshape(3, -1).any(1).all()


def test_a_layerwise_student_is_kept_for_all_its_layers(labels: str, tiny_bert: Path, tmp_path: Path):
    reports = Reports(tmp_path)
    train(settings(labels, tiny_bert, student={"layers": [1, 2, 3]}, max_steps=4), World(), reports)
    for metrics in reports.metrics.values():
        of_layers = [metrics[f"validation_ndcg@10/layer_{n}"] for n in (1, 2, 3)]
        assert metrics["validation_ndcg@10"] == pytest.approx(sum(of_layers) / 3)
    assert len(set(of_layers)) > 1


def test_a_step_is_the_mean_over_its_queries(labels: str, tiny_bert: Path):
    """Micro-batches of any size give the same gradient: they only split the work."""

    def gradients(tokens: int) -> list[torch.Tensor]:
        chosen = settings(labels, tiny_bert, student={"dropout": 0.0}, tokens_per_micro_batch=tokens)
        trainer = Trainer(chosen, World(), None)
        trainer.student.train()
        trainer.forward_backward(trainer.step_data(0))
        return [p.grad.to_dense() for p in trainer.student.parameters() if p.grad is not None]

    one, many = gradients(100_000), gradients(32)
    assert len(one) > 40
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_the_words_gradient_is_of_the_steps_words_alone(labels: str, tiny_bert: Path, tiny_t5: Path, model: str):
    """On a CPU it is kept as their rows until the optimizer's step, which is the one that a whole matrix would give."""
    base = {"bert": tiny_bert, "t5": tiny_t5}[model]

    def one_step(tokens: int) -> tuple[Trainer, torch.Tensor]:
        chosen = settings(labels, base, student={"dropout": 0.0}, tokens_per_micro_batch=tokens)
        trainer = Trainer(chosen, World(), None)
        trainer.student.train()
        words = trainer.student.pretrained.get_input_embeddings().weight
        trainer.parallel.backward(trainer.student(**trainer.student.batch(pairs(trainer)))[-1].sin().sum())
        assert words.grad.is_sparse == (tokens < len(words))
        gradient = words.grad.to_dense().clone()
        trainer.parallel.step()
        return trainer, gradient

    def pairs(trainer: Trainer) -> list[dict[str, list[int]]]:
        return trainer.student.encode(["w1"] * 2, ["w2 w3", "w4"])

    (rows, of_rows), (whole, of_whole) = one_step(32), one_step(100_000)
    torch.testing.assert_close(of_rows, of_whole, atol=1e-7, rtol=1e-5)
    untouched = (of_rows == 0).all(1)
    assert 0 < untouched.sum() < len(untouched)
    for a, b in zip(rows.student.parameters(), whole.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_the_words_gradient_does_not_grow_beyond_the_vocabulary(labels: str, tiny_bert: Path):
    """However many tokens a step has: rows of one word are not added up as long as they are apart."""
    trainer = Trainer(settings(labels, tiny_bert), World(), None)
    words = trainer.student.pretrained.get_input_embeddings()
    ids = torch.randint(1, len(words.weight), (20, 64), generator=torch.Generator().manual_seed(0))
    for few in ids:
        trainer.parallel.backward(words(few).sum())
        gradient = words.weight.grad
        assert not gradient.is_sparse or gradient._nnz() <= len(gradient)
    counts = ids.flatten().bincount(minlength=len(words.weight)).float()
    assert torch.equal(words.weight.grad.to_dense(), counts[:, None].expand_as(words.weight))


@pytest.fixture(scope="module")
def partly_taught(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 queries: every third has no gain, and every third no preference of the teacher's."""
    rows = [teachable(i) for i in range(24)]
    for row in rows[0::3]:
        row["candidates"] = [c | {"label": None} for c in row["candidates"]]
    for row in rows[1::3]:
        row["scores"] = [1.0] * CANDIDATES
    return write_labels(tmp_path_factory.mktemp("partly"), rows)


def partly(labels: str, base: Path, **changes) -> DistillSettings:
    losses = [{"loss": "kl"}, {"loss": "ce", "target": "gains"}, {"loss": "bce", "target": "gains"}]
    return settings(labels, base, objective={"losses": losses}, sampling={"group_size": CANDIDATES}, **changes)


def test_skipped_queries_are_reported(partly_taught: str, tiny_bert: Path, tmp_path: Path):
    """Each epoch's validation counts that epoch's, by loss."""
    trainer = Trainer(partly(partly_taught, tiny_bert), World(), None)
    rows = list(trainer.reader.read(trainer.data.train))
    no_gain = sum(all(c.label is None for c in r.candidate_list.candidates) for r in rows)
    tied = sum(len(set(r.scores)) == 1 for r in rows)
    assert no_gain * tied > 0
    every, reports = trainer.steps.per_epoch, Reports(tmp_path)
    train(partly(partly_taught, tiny_bert, epochs=2, validation={"every_steps": every}), World(), reports)
    assert "skipped_queries/ce" not in reports.metrics[0]
    for step in (every, 2 * every):
        counts = {n.partition("/")[2]: v for n, v in reports.metrics[step].items() if n.startswith("skipped_queries/")}
        assert counts == {"kl": tied, "ce": no_gain, "bce": 0}
    assert f"{tied} queries skipped by kl, {no_gain} queries skipped by ce, " in summary_line(reports.metrics[every])


def test_a_skipped_query_adds_nothing(partly_taught: str, tiny_bert: Path):
    """One tied query beside one that is not: the reported KL is the latter's, and the step's gradient half of its."""
    chosen = settings(partly_taught, tiny_bert, objective={"losses": [{"loss": "kl"}]}, student={"dropout": 0.0})
    trainer = Trainer(chosen, World(), None)
    rows = list(trainer.reader.read(trainer.data.train))
    tied = next(r for r in rows if len(set(r.scores)) == 1)
    taught = next(r for r in rows if len(set(r.scores)) > 1)
    results, gradient = [], []
    for count, step_rows in ((1, [taught]), (2, [taught, tied])):
        trainer.parallel.optimizer.zero_grad()
        groups = [(row, range(CANDIDATES)) for row in step_rows]
        results.append(trainer.forward_backward(trainer.prepare(groups, queries=count, counts=True)))
        gradient.append(trainer.student.model.classifier.weight.grad)
    assert results[1]["kl"] == pytest.approx(results[0]["kl"])
    assert results[1]["total"] == pytest.approx(results[0]["total"] / 2)
    torch.testing.assert_close(gradient[1], gradient[0] / 2)


def test_labels_that_can_not_serve_the_objective_are_refused(labels: str, tiny_bert: Path):
    chosen = settings(labels, tiny_bert, objective={"query_weights": "uncertainty"})
    with pytest.raises(InputError, match="training queries have none"):
        Trainer(chosen, World(), None)


def learning_rates(labels: str, base: Path, decay: str) -> list[float]:
    """The backbone's rate at each of ten steps, as a share of its peak."""
    chosen = settings(
        labels, base, optimizer={"decay": decay, "warmup_fraction": 0.2, "learning_rate": 1.0}, max_steps=10
    )
    trainer = Trainer(chosen, World(), None)
    rates = []
    optimizer = trainer.parallel.optimizer
    original: Callable = optimizer.step
    optimizer.step = lambda: rates.append(optimizer.param_groups[0]["lr"]) and original()
    while not trainer.finished:
        trainer.train_step()
    return rates


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("constant", [0.5] + [1.0] * 9),
        ("cosine", [0.5, 1.0] + [0.5 - 0.5 * float(np.cos(np.pi * n / 8)) for n in range(8, 0, -1)]),
    ],
)
def test_the_schedule(labels: str, tiny_bert: Path, decay: str, expected: list[float]):
    """Ten steps, two of warm-up (½, 1), then from the peak down to, but not at, 0."""
    assert learning_rates(labels, tiny_bert, decay) == pytest.approx(expected)


def test_weight_decay_and_rates_by_group(labels: str, tiny_bert: Path):
    """Vectors and new parameters are not decayed; new parameters have their own rate; none is left out. All of a
    group's are updated by one operation."""
    chosen = settings(labels, tiny_bert, optimizer={"weight_decay": 0.1})
    trainer = Trainer(chosen, World(), None)
    groups = trainer.parallel.optimizer.param_groups
    assert all(group["fused"] for group in groups)
    by_id = {id(p): g for g in groups for p in g["params"]}
    assert len(by_id) == len(list(trainer.student.parameters()))
    for name, parameter in trainer.student.named_parameters():
        group, new = by_id[id(parameter)], name.startswith("model.classifier")
        assert group["peak_lr"] == (1e-2 if new else 1e-3)
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 and not new else 0.0)


def test_rates_fall_towards_the_embeddings(labels: str, tiny_bert: Path):
    trainer = Trainer(settings(labels, tiny_bert, optimizer={"layer_decay": 0.5}), World(), None)
    by_id = {id(p): g for g in trainer.parallel.optimizer.param_groups for p in g["params"]}
    bert = trainer.student.pretrained.bert
    depth = len(bert.encoder.layer)
    assert depth > 1
    parts = [bert.embeddings, *bert.encoder.layer]
    for number, part in enumerate(parts):
        assert {by_id[id(p)]["peak_lr"] for p in part.parameters()} == {1e-3 * 0.5 ** (depth - number)}
    assert {by_id[id(p)]["peak_lr"] for p in bert.pooler.parameters()} == {1e-3}
    assert {by_id[id(p)]["peak_lr"] for p in trainer.student.new_parameters()} == {1e-2}
    assert len(by_id) == len(list(trainer.student.parameters()))


def test_validation_on_gains_without_any_says_so(labels: str, tiny_bert: Path, tmp_path: Path):
    rows = [teachable(i) for i in range(24)]
    for row in rows:
        row["candidates"] = [c | {"label": None} for c in row["candidates"]]
    folder = write_labels(tmp_path / "l", rows)
    with pytest.raises(InputError, match=r"none of \d+ held-out queries has a candidate with a known gain"):
        Trainer(settings(folder, tiny_bert, validation={"gains": "labels"}), World(), None)
    assert Trainer(settings(labels, tiny_bert, validation={"gains": "labels"}), World(), None).validate()[0] > 0


def test_a_student_that_diverged_is_not_kept(labels: str, tiny_bert: Path):
    """NaN sorts nothing: the first stage's order would pass for the student's."""
    trainer = Trainer(settings(labels, tiny_bert), World(), None)
    with torch.no_grad():
        trainer.trained[0].fill_(math.nan)
    with pytest.raises(RunError, match=r"score is not a finite number: training has diverged"):
        trainer.validate()
