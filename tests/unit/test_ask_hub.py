"""What is no folder here is asked of the hub before a job starts, if the hub is in reach."""

from __future__ import annotations

import warnings
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from rerank_ray.errors import ModelError
from rerank_ray.models.resolve import ask_hub, resolve
from rerank_ray.ranking.rankers import preflight
from rerank_ray.settings.models import CrossEncoderSettings, ModelSettings
from rerank_ray.settings.rankers import CrossEncoderRankerSettings

REQUEST = httpx2.Request("GET", "https://hub.test/api/models/org/name")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    """A hub that has every model, or raises `error`; it notes what it was `asked`, and nothing is cached."""
    state: dict = {"asked": [], "error": None}

    def model_info(self, repo_id: str, *, revision: str | None, timeout: float) -> None:
        state["asked"].append((repo_id, revision))
        if state["error"] is not None:
            raise state["error"]

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return state


def model(path: str, revision: str | None = None) -> ModelSettings:
    return ModelSettings(path=path, revision=revision)


def test_a_model_that_the_hub_has(hub: dict):
    assert ask_hub(resolve(model("org/name", "v1"))).identity == "org/name@v1"
    assert ask_hub(resolve(model("org/name/file.gguf"))).gguf_file == "file.gguf"
    assert hub["asked"] == [("org/name", "v1"), ("org/name", None)]


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, RevisionNotFoundError])
def test_a_model_that_is_nowhere_is_refused_before_a_job(hub: dict, kind: type):
    """A mistyped path with one slash could be a hub's id."""
    hub["error"] = kind("404: not found\nmore", response=httpx2.Response(404, request=REQUEST))
    ranker = CrossEncoderRankerSettings(model=CrossEncoderSettings(path="runs/studnet"))
    with pytest.raises(ModelError, match=r"^runs/studnet: is no folder or file here, and no model on the hub \(404: n"):
        preflight(ranker)


def test_what_cannot_be_a_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"^my models/x: is no folder or file here, and no model on the hub"):
        ask_hub(resolve(model("my models/x")))


@pytest.mark.parametrize("error", [httpx2.ConnectError("no name", request=REQUEST), OSError("503")])
def test_a_hub_out_of_reach_is_warned_of(hub: dict, error: Exception):
    """Workers may hold the model, or reach the hub, where the driver does not."""
    hub["error"] = error
    with pytest.warns(UserWarning, match=r"^runs/studnet: is no folder or file here, and the hub can't be asked \("):
        ask_hub(resolve(model("runs/studnet")))


def test_a_cached_model_is_not_asked_for(hub: dict, tmp_path: Path):
    hub["error"] = AssertionError("asked")
    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "cache" / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    ask_hub(resolve(model("org/name")))


def test_a_folder_is_no_hubs(hub: dict, tiny_bert: Path):
    hub["error"] = AssertionError("asked")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask_hub(resolve(model(str(tiny_bert))))
