"""Every config that the project ships is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from rerank_ray import config
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.jobs import DetectHeadsSettings, LabelSettings, RerankSettings
from rerank_ray.settings.pipeline import PipelineSettings
from rerank_ray.settings.rationale import RationaleSettings
from rerank_ray.settings.reinforce import ReinforceSettings
from rerank_ray.settings.synthesize import SynthesizeSettings

ROOT = Path(__file__).parents[2]
MODELS = {
    "label": LabelSettings,
    "distill": DistillSettings,
    "rerank": RerankSettings,
    "rationales": RationaleSettings,
    "reinforce": ReinforceSettings,
    "heads": DetectHeadsSettings,
    "synthesize": SynthesizeSettings,
    "pipelines": PipelineSettings,
    "quickstart": PipelineSettings,
}
FILES = sorted([*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("rerank_ray/quickstart/*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RERANK_RAY_DATA", "/collections")
    config.load(MODELS[path.parent.name], path)


def test_every_kind_has_one():
    assert {p.parent.name for p in FILES} == set(MODELS)
