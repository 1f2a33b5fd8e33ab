"""The table from a ranker's `method` to its class, and the whole of a ranker: a method on its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pkgutil import resolve_name

from rerank_ray import storage
from rerank_ray.config import Settings
from rerank_ray.errors import ConfigError, InputError, RerankRayError
from rerank_ray.models.backends import load_backend
from rerank_ray.models.protocol import Backend
from rerank_ray.models.resolve import ask_hub, resolve, resolve_adapter
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking import scheduler
from rerank_ray.ranking.composition import Child
from rerank_ray.ranking.heads_file import load_heads
from rerank_ray.records import CandidateList, Computed
from rerank_ray.settings.models import ModelSettings
from rerank_ray.settings.rankers import CompositionSettings, RankerSettings

Wrap = Callable[[Backend, ModelSettings], Backend]
"""Puts something between a method and its model: it answers what the model would."""

# Names, not classes: a job imports the method it runs.
METHODS = {
    "yes_no": "rerank_ray.ranking.yes_no:YesNo",
    "fine_grained": "rerank_ray.ranking.fine_grained:FineGrained",
    "erank": "rerank_ray.ranking.erank:ERank",
    "query_likelihood": "rerank_ray.ranking.query_likelihood:QueryLikelihood",
    "prp": "rerank_ray.ranking.prp:PRP",
    "duot5": "rerank_ray.ranking.duot5:DuoT5",
    "setwise": "rerank_ray.ranking.setwise:Setwise",
    "rank_r1": "rerank_ray.ranking.setwise:Setwise",
    "icr": "rerank_ray.ranking.icr:ICR",
    "core_heads": "rerank_ray.ranking.core_heads:CoReHeads",
    "rank_gpt": "rerank_ray.ranking.listwise:RankGPT",
    "first": "rerank_ray.ranking.first:First",
    "permutation_self_consistency": "rerank_ray.ranking.permutation_self_consistency:PermutationSelfConsistency",
    "group_rank": "rerank_ray.ranking.groupwise:GroupRank",
    "rebel": "rerank_ray.ranking.rebel:Rebel",
    "e2rank": "rerank_ray.ranking.e2rank:E2Rank",
    "cross_encoder": "rerank_ray.ranking.cross_encoder:CrossEncoderRanker",
    "bi_encoder": "rerank_ray.ranking.bi_encoder:BiEncoderRanker",
    "maxsim": "rerank_ray.ranking.maxsim:MaxSim",
    "bm25": "rerank_ray.ranking.bm25:BM25",
    "first_stage": "rerank_ray.ranking.first_stage:FirstStage",
    "imported": "rerank_ray.ranking.imported:Imported",
    "ensemble": "rerank_ray.ranking.composition:Ensemble",
    "cascade": "rerank_ray.ranking.composition:Cascade",
    "selective": "rerank_ray.ranking.composition:Selective",
    # No ranker: `rerank-ray synthesize` runs it like one.
    "write_query": "rerank_ray.ranking.write_query:QueryWriter",
}

# Methods that ask with another method's templates.
_TEMPLATES_OF = {"core_heads": "icr", "permutation_self_consistency": "rank_gpt"}


def method_class(name: str) -> type:
    """The class of a ranking method; its settings are `rerank_ray.settings.rankers`' of the same `method`."""
    return resolve_name(METHODS[name])


def preflight(settings: RankerSettings) -> dict[str, str]:
    """Find what can't work before anything is started: a missing model, a bad template, a run file that is not there.

    Returns:
        What scores depend on beside the settings and the rows, by name: a digest, or a revision, of each model,
        template and file. A run that is resumed with others would mix two rankers' scores.

    Raises:
        RerankRayError: naming the setting and the fix.
    """
    found: dict[str, str] = {}
    if isinstance(settings, CompositionSettings):
        for path, child in settings.children.items():
            try:
                found |= preflight(child)
            except RerankRayError as error:
                raise type(error)(f"{path}: {error}") from error
    model = getattr(settings, "model", None)
    if isinstance(model, ModelSettings):
        found[model.path] = ask_hub(resolve(model)).identity
        if (adapter := resolve_adapter(model)) is not None:
            found[model.adapter] = ask_hub(adapter).identity
    tokenizer = getattr(model, "tokenizer_settings", None)
    if tokenizer is not None:
        found[f"tokenizer {tokenizer.path}"] = ask_hub(resolve(tokenizer)).identity
    if hasattr(settings, "prompt"):
        template = load_template(settings.prompt, _TEMPLATES_OF.get(settings.method, settings.method))
        found[f"prompt {settings.prompt}"] = template.digest
        if hasattr(settings, "passages_at_once"):
            template.identifiers(settings.passages_at_once)
    if hasattr(settings, "heads_file"):
        load_heads(settings.heads_file).best(settings.count, settings.prune)
        found[settings.heads_file] = storage.digest(settings.heads_file)
    if hasattr(settings, "criteria_prompt"):
        template = load_template(settings.criteria_prompt, "rebel_criteria")
        found[f"prompt {settings.criteria_prompt}"] = template.digest
    files = [*getattr(settings, "run", ()), *([settings.corpus] if hasattr(settings, "corpus") else [])]
    for path in files:
        if not storage.exists(path) or storage.is_directory(path):
            raise InputError(f"{path}: no such file (method {settings.method})")
        found[path] = storage.digest(path)
    return found


class Ranker:
    """Ranks candidate lists: a teacher when it labels, a student or baseline when it reranks.

    It is one method on one model, or a composition of other rankers.
    """

    def __init__(
        self, settings: RankerSettings, loaded: dict[str, Backend] | None = None, wrap: Wrap | None = None
    ) -> None:
        """Load the model, if the method has one, or the rankers that it is made of.

        Args:
            loaded: what rankers of the same composition have loaded, by their model's settings: equal ones share it.
            wrap: called with each model and its settings; the calls go to what it returns.

        Raises:
            ConfigError: the model does not answer a call that the method makes.
            ModelError: the model can't be loaded.
        """
        loaded = {} if loaded is None else loaded
        if isinstance(settings, CompositionSettings):
            self._compose(settings, loaded, wrap)
        else:
            self._load(settings, loaded, wrap)

    def _compose(self, settings: CompositionSettings, loaded: dict[str, Backend], wrap: Wrap | None) -> None:
        rankers = {path: Ranker(child, loaded, wrap) for path, child in settings.children.items()}
        children = {path: Child(path=path, name=r.name, rank=r.rank) for path, r in rankers.items()}
        self._method = method_class(settings.method)(settings, children)
        self._backends = {id(b): b for r in rankers.values() for b in r._backends.values()}
        self.exit_layer = None
        self._rank = self._method.rank

    def _load(self, settings: RankerSettings, loaded: dict[str, Backend], wrap: Wrap | None) -> None:
        method = method_class(settings.method)
        model = getattr(settings, "model", None)
        backend = None if model is None else _load_once(model, loaded)
        self._method = method(settings, backend)
        # Of the object, not its class: what some methods ask depends on their settings.
        missing = self._method.needs - (backend.answers if backend else frozenset())
        if missing:
            names = sorted(call.__name__ for call in missing)
            raise ConfigError(f"method {settings.method} needs {names}, which {backend.name} does not answer")
        self._backends = {} if backend is None else {id(backend): backend}
        self.exit_layer = None if backend is None else backend.exit_layer
        asked = backend if backend is None or wrap is None else wrap(backend, model)
        self._rank = partial(scheduler.run, self._method, asked)

    @property
    def name(self) -> str:
        """Method, model, revision and prompt hash: the `teacher` and `model` columns."""
        return self._method.name

    @property
    def parameters(self) -> int:
        """Parameters of the models, one that is shared counted once; 0 for methods without one."""
        return sum(b.parameters for b in self._backends.values())

    @property
    def computed(self) -> Computed:
        """What the models have computed so far; of those that run elsewhere nothing is known."""
        runners = (getattr(b, "runner", None) for b in self._backends.values())
        return sum((r.computed for r in runners if r is not None), start=Computed())

    def rank(self, requests: Sequence[CandidateList]) -> list[scheduler.Outcome]:
        return self._rank(requests)


def _load_once(model: Settings, loaded: dict[str, Backend]) -> Backend:
    key = model.model_dump_json()
    if key not in loaded:
        loaded[key] = load_backend(model)
    return loaded[key]
