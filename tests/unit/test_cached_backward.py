"""The cached backward has the gradients of the plain one, and holds scores only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.teachable import settings
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from rerank_ray.distill.parallel import World
from rerank_ray.distill.train import Trainer


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    """The gradient of the first step, from the same random state each time."""
    trainer.student.train()
    torch.manual_seed(7)
    trainer.forward_backward(trainer.step_data(0))
    return [p.grad.to_dense() for p in trainer.student.parameters() if p.grad is not None]


CACHED = {
    "linear": {"head": "linear", "dropout": 0.0},
    "linear, dropout": {"head": "linear", "dropout": 0.3},
    "layer-wise, dropout": {"head": "linear", "layers": [1, 3], "dropout": 0.3},
    "mvp, dropout": {"head": "mvp", "max_length": 64, "dropout": 0.3},
    "similarity, dropout": {"head": "similarity", "layers": [2, 3], "gate": -1.0, "dropout": 0.3},
}


@pytest.mark.parametrize("variant", CACHED)
def test_the_cached_backward_has_the_plain_gradient(labels: str, tiny_bert: Path, tiny_t5: Path, variant: str):
    """With dropout too, whose draws are repeated, and the random stream goes on from the same place.

    A loss over whole lists: no micro-batch alone could give its gradient.
    """
    results = []
    for backward in ("plain", "cached"):
        base = tiny_t5 if CACHED[variant]["head"] == "mvp" else tiny_bert
        chosen = settings(labels, base, student=CACHED[variant], sampling={"group_size": 6}, backward=backward)
        trainer = Trainer(chosen, World(), None)
        results.append((gradients(trainer), torch.rand(1).item()))
    (plain, plain_next), (cached, cached_next) = results
    assert len(plain) > 40
    assert sum(g.abs().sum() for g in plain) > 1
    for a, b in zip(plain, cached, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert plain_next == cached_next


def test_a_cached_forward_pass_keeps_scores_only(labels: str, tiny_bert: Path):
    """What autograd holds for the backward pass of a list of six: the activations of all, or next to nothing."""

    def held(cached: bool) -> int:
        trainer = Trainer(settings(labels, tiny_bert), World(), None)
        row, _ = trainer.step_data(0).groups[0]
        (chunk,) = trainer.prepare([(row, range(6))], queries=1, counts=True).chunks
        elements = []
        count = torch.autograd.graph.saved_tensors_hooks(lambda t: elements.append(t.numel()) or t, lambda t: t)
        with count:
            trainer._objective(chunk, cached)
        return sum(elements)

    assert held(cached=True) < held(cached=False) / 50


@pytest.mark.parametrize(
    ("backward", "limit", "cached"),
    [("plain", 8, False), ("auto", 8, True), ("auto", 8192, False), ("cached", 8192, True)],
)
def test_what_is_cached(labels: str, tiny_bert: Path, monkeypatch, backward: str, limit: int, cached: bool):
    """`auto` caches groups above tokens_per_backward; the others do so never and always."""
    calls = []
    monkeypatch.setattr(
        "rerank_ray.distill.list_scorer.checkpoint", lambda *a, **k: calls.append(1) or torch_checkpoint(*a, **k)
    )
    trainer = Trainer(settings(labels, tiny_bert, backward=backward, tokens_per_backward=limit), World(), None)
    gradients(trainer)
    assert bool(calls) is cached
