"""The jobs that train a language model, on Ray Train: a model on disk, and two workers that take one's steps."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures.rows import label_row, write_labels
from fixtures.tiny_models import tiny_llama_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rerank_ray import config
from rerank_ray.errors import RunError
from rerank_ray.execution import training_jobs
from rerank_ray.records import Candidate, CandidateList, Query
from rerank_ray.settings.rationale import RationaleSettings
from rerank_ray.settings.reinforce import ReinforceSettings


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """16 lists of four, with one relevant passage each."""
    rows = []
    for number in range(16):
        candidates = tuple(
            Candidate(doc_id=f"d{i}", text=f"passage {i} of {number}", label=float(i == number % 4)) for i in range(4)
        )
        request = CandidateList(query=Query(query_id=f"q{number}", text=f"query {number}"), candidates=candidates)
        rows.append(label_row(request, [4.0, 3.0, 2.0, 1.0]))
    return write_labels(tmp_path_factory.mktemp("labels"), rows)


def settings(folder: Path, labels: str, **changes) -> ReinforceSettings:
    (folder / "short.yaml").write_text(
        "{method: yes_no, about: test, text: '{query} {passage}', chat: false, labels: [kappa, gamma]}"
    )
    base = folder / "model"
    if not base.exists():
        tiny_llama_folder(base)
    content = {
        "input": [labels],
        "policy": {"base": str(base), "max_length": 256, "dtype": "float32", "lora": {"rank": 4, "alpha": 8}},
        "reward": {"kind": "prorank", "prompt": str(folder / "short.yaml"), "max_tokens": 1},
        "sampling": {"group_size": 2, "positives": 1},
        "samples": 64,
        "queries_per_step": 3,
        "optimizer": {"learning_rate": 0.03, "weight_decay": 0.0, "decay": "constant", "warmup_fraction": 0.0},
        "validation": {"fraction": 0.2, "every_steps": 2},
        "epochs": 2,
        "max_steps": 4,
    } | changes
    return config.validate(ReinforceSettings, content, source="test")


@pytest.mark.usefixtures("ray_session")
def test_two_workers_take_the_same_steps_as_one(labels, tmp_path, console, monkeypatch):
    """Started with relative paths. The adapters agree to rounding; 3 queries a step leave an uneven split."""
    monkeypatch.chdir(tmp_path)
    labels = os.path.relpath(labels)
    weights, told = [], []
    for workers in (1, 2):
        chosen = settings(tmp_path, labels, execution={"workers": workers})
        training_jobs.reinforce(chosen, f"run-{workers}", console)
        run = tmp_path / f"run-{workers}"
        told.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
        weights.append(load_file(run / "student" / "model.safetensors"))
    for one, two in zip(*told, strict=True):
        for name in ("step", "reward", "well_formed", "validation_reward", "best_step"):
            assert two.get(name) == pytest.approx(one.get(name), abs=1e-6), name
    assert told[0][-1]["reward"] > told[0][1]["reward"]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-5, msg=name)
    state = json.loads((tmp_path / "run-1" / "run.json").read_text())
    assert (state["kind"], state["state"]) == ("reinforce", "done")
    with pytest.raises(RunError, match="samples: 64 -> 8"):
        training_jobs.reinforce(settings(tmp_path, labels, samples=8), "run-1", console)


@pytest.mark.usefixtures("ray_session")
def test_rationales_train_a_model_too(tmp_path, console):
    """The other job that trains a language model: it leaves one that loads, and has nothing to do the second time."""
    request = CandidateList(
        query=Query(query_id="q", text="cat"), candidates=tuple(Candidate(doc_id=d, text=d) for d in ("a", "b"))
    )
    rows = [
        label_row(replace(request, query=Query(query_id=f"q{i}", text="cat")), [1.0, 2.0]) | {"rationales": ["[2]."]}
        for i in range(8)
    ]
    labels = write_labels(tmp_path / "labels", rows)
    content = {
        "policy": {"base": str(tiny_llama_folder(tmp_path / "model")), "max_length": 600, "dtype": "float32"},
        "terms": [{"kind": "permutation", "input": [labels]}],
        "validation": {"fraction": 0.3},
        "max_steps": 2,
    }
    chosen = config.validate(RationaleSettings, content, source="test")
    for _ in range(2):
        training_jobs.distill_rationales(chosen, str(tmp_path / "run"), console)
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["kind"], state["state"], state["starts"]) == ("distill-rationales", "done", 1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").config.vocab_size > 0
