"""Exported students: the same scores elsewhere, and a card that tells where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.full_disk import full_disk
from fixtures.students import DOCUMENTS, QUERIES, load, scores, start, stirred

from rerank_ray import cli
from rerank_ray.errors import ConfigError, ModelError, RunError
from rerank_ray.export import export
from rerank_ray.settings.distill import DistillSettings


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path) -> Path:
    """A distillation run with a layer-wise student, as the job leaves it."""
    folder = tmp_path / "my-student"
    stirred(start(tiny_bert, "linear", layers=(1, 3))).save(folder / "student")
    settings = DistillSettings.model_validate({"input": ["runs/label"], "student": {"base": "some/encoder"}})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    best = {"step": 96, "total_steps": 128, "validation_ndcg@10": 0.6047}
    state = {
        "inputs": {"labels": "c344a292"},
        "teachers": ["listwise (some/llm)", "rrf"],
        "counts": {"training_queries": 99},
        "versions": {"torch": "2.13"},
    }
    (folder / "run.json").write_text(json.dumps(state | {"best": best}))
    return folder


def test_a_layer_as_an_ordinary_cross_encoder(run: Path, tmp_path: Path):
    """sentence-transformers reads the first layer's scores; the card has the run's data, objective, metrics, config."""
    from sentence_transformers import CrossEncoder

    out = tmp_path / "out"
    assert cli.main(["export", str(run / "student"), "--layer", "1", "--out", str(out)]) == 0
    expected = scores(load(run / "student"))[0]
    theirs = CrossEncoder(str(out), device="cpu").predict(
        list(zip(QUERIES, DOCUMENTS, strict=True)), show_progress_bar=False
    )
    torch.testing.assert_close(torch.tensor(theirs), expected, atol=1e-4, rtol=1e-4)
    assert not (out / "heads.safetensors").exists()
    card = (out / "README.md").read_text()
    for fact in (
        "# my-student",
        "on layer 1",
        "some/encoder",
        "c344a292",
        "| teacher | listwise (some/llm), rrf |",
        "99 training queries",
        "1 · kl + 1 · ranknet",
    ):
        assert fact in card
    for fact in ("96 of 128", "0.6047", "torch 2.13", "queries_per_step: 4", "CrossEncoder("):
        assert fact in card


def test_overwrite_deletes_nothing_but_models(run: Path, tmp_path: Path):
    """Not the run that the student lies in, nor folders of other things, nor files."""
    options = {"form": "transformers", "layer": None, "int8": False, "overwrite": True}
    everything = sorted(run.rglob("*"))
    for out in (run, run / "student", run / "student" / "..", tmp_path):
        with pytest.raises(ConfigError, match="holds the student itself"):
            export(str(run / "student"), str(out), **options)
    other, file = tmp_path / "other", tmp_path / "file"
    other.mkdir()
    (other / "notes.txt").write_text("a day's work")
    file.write_text("x")
    with pytest.raises(ConfigError, match=r"holds no earlier export: it has no config\.json"):
        export(str(run / "student"), str(other), **options)
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        export(str(run / "student"), str(file), **options)
    assert sorted(run.rglob("*")) == everything
    assert (other / "notes.txt").exists()
    for _ in range(2):
        export(str(run / "student"), str(tmp_path / "out"), **options)
    assert load(tmp_path / "out").layers == (3,)


def test_what_cannot_be_exported(run: Path, tiny_bert: Path, tmp_path: Path):
    options = {"form": "transformers", "layer": None, "int8": False, "overwrite": False}
    with pytest.raises(ConfigError, match=r"not a student of ours: it has no student.json"):
        export(str(tiny_bert), str(tmp_path / "out"), **options)
    with pytest.raises(ConfigError, match="--int8 is of --format onnx"):
        export(str(run / "student"), str(tmp_path / "out"), **options | {"int8": True})
    for layer in (0, 2):
        with pytest.raises(ModelError, match=rf"exit_layer: {layer}: this student has heads on layers \[1, 3\]"):
            export(str(run / "student"), str(tmp_path / "out"), **options | {"layer": layer})
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is there already; --overwrite replaces it"):
        export(str(run / "student"), str(tmp_path / "out"), **options)
    export(str(run / "student"), str(tmp_path / "out"), **options | {"overwrite": True})
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("file_bytes", [100, 20_000])
def test_an_export_without_room_leaves_the_earlier_one(run: Path, tmp_path: Path, file_bytes: int):
    """For the config there is none, or for the weights."""
    out = tmp_path / "out"
    settings = {"form": "transformers", "layer": None, "int8": False}
    export(str(run / "student"), str(out), **settings, overwrite=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with full_disk(file_bytes), pytest.raises(RunError, match=r"out: can't be written \(.*File too large"):
        export(str(run / "student"), str(out), **settings, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert not out.with_name("out.partial").exists()
