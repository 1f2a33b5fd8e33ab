"""A training run on a tiny BERT: it learns, resumes bit for bit, validates, keeps the best and stops when it should."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch
from fixtures.rows import write_labels
from fixtures.teachable import VARIANTS, settings, teachable
from fixtures.training_world import Reports, in_three_parts
from safetensors.torch import load_file

from rerank_ray.distill.checkpoints import STUDENT
from rerank_ray.distill.metrics_log import summary_line
from rerank_ray.distill.parallel import World
from rerank_ray.distill.train import Trainer, train
from rerank_ray.errors import InputError, RunError


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


def test_a_layerwise_student_is_kept_for_all_its_layers(labels: str, tiny_bert: Path, tmp_path: Path):
    reports = Reports(tmp_path)
    train(settings(labels, tiny_bert, student={"layers": [1, 2, 3]}, max_steps=4), World(), reports)
    for metrics in reports.metrics.values():
        of_layers = [metrics[f"validation_ndcg@10/layer_{n}"] for n in (1, 2, 3)]
        assert metrics["validation_ndcg@10"] == pytest.approx(sum(of_layers) / 3)
    assert len(set(of_layers)) > 1


def test_labels_that_can_not_serve_the_objective_are_refused(labels: str, tiny_bert: Path):
    chosen = settings(labels, tiny_bert, objective={"query_weights": "uncertainty"})
    with pytest.raises(InputError, match="training queries have none"):
        Trainer(chosen, World(), None)


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
