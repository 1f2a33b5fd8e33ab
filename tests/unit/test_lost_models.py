"""A GPU that is lost to its process, or was never usable: no row gets the blame, and nothing moves to the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fixtures.rows import make_list

from rerank_ray.errors import LostError, ModelError
from rerank_ray.execution.data import RankWorker
from rerank_ray.models.engine import BatchRunner
from rerank_ray.models.protocol import Embed
from rerank_ray.ranking import scheduler
from rerank_ray.records import Usage
from rerank_ray.settings.jobs import ExecutionSettings

GPU = torch.device("cuda", 0)


class OnGPU:
    """A backend each of whose batches ends with a CUDA error."""

    def __init__(self, device: torch.device = GPU) -> None:
        self.runner, self.asked = BatchRunner(None, device), 0

    def run(self, calls):
        self.asked += 1
        return self.runner.run([3] * len(calls), self._forward)

    def _forward(self, batch: list[int]) -> list[int]:
        raise RuntimeError("CUDA error: device-side assert triggered")


class AsksOnce:
    """A method with one call a list."""

    def rank(self, request):
        yield [Embed(text=request.query.text + request.query.query_id, role="query")]


@pytest.fixture
def lost_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


@pytest.mark.usefixtures("lost_gpu")
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_get_no_error_from_a_gpu_that_is_lost(rows: int):
    """Nor is it asked again: all that follows fails, in batches of one row too."""
    backend = OnGPU()
    with pytest.raises(LostError, match=r"cuda:0 takes no more work of this process: CUDA error: device-side assert"):
        scheduler.run(AsksOnce(), backend, [make_list(f"q{i}", 2) for i in range(rows)])
    assert backend.asked == 1


@pytest.mark.parametrize("device", [GPU, torch.device("cpu")])
def test_an_error_that_a_device_survives_is_its_rows(monkeypatch: pytest.MonkeyPatch, device: torch.device):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    (outcome,) = scheduler.run(AsksOnce(), OnGPU(device), [make_list("q", 2)])
    assert outcome.error == "RuntimeError: CUDA error: device-side assert triggered"


def test_a_replica_ends_with_its_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Ray starts another one, which does the batch again."""

    def guard(table):
        raise LostError("cuda:0 takes no more work")

    def leave(code: int):
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    worker = object.__new__(RankWorker)
    worker._stage, worker._guard = SimpleNamespace(usage=Usage()), guard
    with pytest.raises(SystemExit, match="1"):
        worker(None)
    assert "cuda:0 takes no more work" in capsys.readouterr().err


def test_a_reserved_gpu_that_torch_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """`device: auto` would compute on the CPU, for as long as it takes."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    job = SimpleNamespace(execution=ExecutionSettings(gpus_per_actor=0.5))
    with pytest.raises(ModelError, match=r"a GPU is reserved here, and torch .* can use none"):
        RankWorker(job, "", None, "")
