"""The table from a ranker's `method` to its class, and the whole of a ranker: a method on its model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from rerank_ray import storage
from rerank_ray.errors import ConfigError, InputError
from rerank_ray.models.backends import load_backend
from rerank_ray.models.resolve import resolve
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking import scheduler
from rerank_ray.records import CandidateList
from rerank_ray.settings.models import ModelSettings
from rerank_ray.settings.rankers import RankerSettings

# Names, not classes: a job imports the method it runs.
METHODS = {
    "yes_no": "rerank_ray.ranking.yes_no:YesNo",
    "fine_grained": "rerank_ray.ranking.fine_grained:FineGrained",
    "erank": "rerank_ray.ranking.erank:ERank",
    "query_likelihood": "rerank_ray.ranking.query_likelihood:QueryLikelihood",
    "cross_encoder": "rerank_ray.ranking.cross_encoder:CrossEncoderRanker",
    "bi_encoder": "rerank_ray.ranking.bi_encoder:BiEncoderRanker",
    "bm25": "rerank_ray.ranking.bm25:BM25",
    "first_stage": "rerank_ray.ranking.first_stage:FirstStage",
    "imported": "rerank_ray.ranking.imported:Imported",
}


def method_class(name: str) -> type:
    """The class of a ranking method; its settings are `rerank_ray.settings.rankers`' of the same `method`."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)


def preflight(settings: RankerSettings) -> None:
    """Find what can't work before anything is started: a missing model, a bad template, a run file that is not there.

    Raises:
        RerankRayError: naming the setting and the fix.
    """
    model = getattr(settings, "model", None)
    if isinstance(model, ModelSettings):
        resolve(model)
    if hasattr(settings, "prompt"):
        load_template(settings.prompt, settings.method)
    files = [*getattr(settings, "run", ()), *([settings.corpus] if hasattr(settings, "corpus") else [])]
    for path in files:
        if not storage.exists(path):
            raise InputError(f"{path}: no such file (method {settings.method})")


class Ranker:
    """Ranks candidate lists: a teacher when it labels, a student or baseline when it reranks."""

    def __init__(self, settings: RankerSettings) -> None:
        """Load the model, if the method has one.

        Raises:
            ConfigError: the model does not answer a call that the method makes.
            ModelError: the model can't be loaded.
        """
        method = method_class(settings.method)
        model = getattr(settings, "model", None)
        self._backend = None if model is None else load_backend(model)
        self._method = method(settings, self._backend)
        # Of the object, not its class: what some methods ask depends on their settings.
        missing = self._method.needs - (self._backend.answers if self._backend else frozenset())
        if missing:
            names = sorted(call.__name__ for call in missing)
            raise ConfigError(f"method {settings.method} needs {names}, which {self._backend.name} does not answer")

    @property
    def name(self) -> str:
        """Method, model, revision and prompt hash: the `teacher` and `model` columns."""
        return self._method.name

    @property
    def exit_layer(self) -> int | None:
        return None if self._backend is None else self._backend.exit_layer

    @property
    def parameters(self) -> int:
        """Parameters of the model; 0 for methods without one."""
        return 0 if self._backend is None else self._backend.parameters

    def rank(self, requests: Sequence[CandidateList]) -> list[scheduler.Outcome]:
        return scheduler.run(self._method, self._backend, requests)
