"""Every config that the project ships is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from rerank_ray import config, pipeline_settings, settings

ROOT = Path(__file__).parents[2]
MODELS = {
    "label": settings.LabelSettings,
    "distill": settings.DistillSettings,
    "rerank": settings.RerankSettings,
    "pipelines": pipeline_settings.PipelineSettings,
    "quickstart": pipeline_settings.PipelineSettings,
}
FILES = sorted([*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("rerank_ray/quickstart/*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RERANK_RAY_DATA", "/collections")
    config.load(MODELS[path.parent.name], path)


def test_every_kind_has_one():
    assert {p.parent.name for p in FILES} == set(MODELS)
