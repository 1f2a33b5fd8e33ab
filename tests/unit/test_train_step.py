"""One step of training on a tiny BERT: its data, its gradient, whom it leaves out, and the optimizer's rates."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.rows import write_labels
from fixtures.teachable import CANDIDATES, VARIANTS, settings, teachable
from fixtures.training_world import Reports
from torch.utils._python_dispatch import TorchDispatchMode

from rerank_ray.distill.metrics_log import summary_line
from rerank_ray.distill.parallel import World
from rerank_ray.distill.step_data import StepData
from rerank_ray.distill.train import Trainer, train
from rerank_ray.settings.distill import DistillSettings


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
