"""Early exits of a similarity student learn to score as its untrained last layer does, from unlabelled text.

Texts are encoded alone, as a bi-encoder has them, so a step's queries and passages are encoded once each and scored all
against all. The passages are of one list, so that they are as hard to tell apart as those of a reranking task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import nn

from rerank_ray.distill.optimizer import make_optimizer, set_learning_rate
from rerank_ray.distill.parallel import World, sum_gradients
from rerank_ray.distill.seeds import seed_of
from rerank_ray.models.plain_attention import attention_for_training
from rerank_ray.models.student import trained_parameters
from rerank_ray.models.student.similarity import EncodedTexts, SimilarityStudent
from rerank_ray.models.student.source import embeddings_of
from rerank_ray.records import CandidateList
from rerank_ray.settings.student import ExitWarmUpSettings

_STATE = "exit_warm_up.pt"
_WORDS_OF_A_SPAN, _WORDS_OF_AN_INSERT = (3, 9), (1, 3)
_SHARE_OF_A_VARIANT = 0.6
"""Of a query's words."""
_PASSAGES = 14
"""A batch holds so many passages of about one length."""


def is_in_warm_up(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved before the labels began."""
    return (checkpoint / _STATE).exists()


def warm_up(
    student: SimilarityStudent,
    read: Callable[[int], CandidateList],
    count: int,
    settings: ExitWarmUpSettings,
    autocast: Callable[[], torch.autocast],
    seed: int,
    world: World,
    report: Callable[[dict, Callable[[Path], None]], None],
    resume: Path | None = None,
) -> dict[str, float]:
    """Train the student in place; returns each exit's KL over the first and the last tenth of the steps, and seconds.

    The last layer is held to what it was, which moving the layers below it would change. Embeddings stay: those of the
    words that are read would move away from all others. Workers divide a step's passages among them and take the steps
    of one.

    Args:
        read: the candidate list of a number below `count`.
        autocast: makes the context of a forward pass.
        report: called after every tenth of the steps with its KL at each exit, and with what saves a checkpoint into a
            folder. `step` counts up to −1: at 0 the labels begin.
        resume: a folder with such a checkpoint; the student is the one that the warm-up started from.
    """
    device = next(student.parameters()).device
    random = np.random.default_rng([seed, settings.steps])
    # Of the start only the last layer teaches.
    start = student.truncated(student.layers[-1], alone=True).to(device).requires_grad_(False)
    embeddings = [p for p in embeddings_of(student.pretrained).parameters() if p.requires_grad]
    _set_trained(embeddings, False)
    optimizer, trained = make_optimizer(student, settings.optimizer), trained_parameters(student)
    student.train()
    seen: list[torch.Tensor] = []
    tenth, begun, done = math.ceil(settings.steps / 10), time.perf_counter(), 0
    if resume is not None:
        done, seconds, seen = _load(resume, trained, optimizer, random)
        seen = [divergences.to(device) for divergences in seen]
        begun -= seconds
    for step in range(done, settings.steps):
        # Dropout depends on where the warm-up stands and not on what came before, so a resumed one draws the same.
        torch.manual_seed(seed_of(seed, "exit_warm_up", step, world.rank))
        set_learning_rate(optimizer, settings.optimizer, step, settings.steps)
        texts = draw(read(int(random.integers(count))), settings, random)
        data = _StepData.of(student, *texts, settings.max_passage_length, world)
        with autocast(), torch.no_grad():
            target = data.all_scores(start, [start.encoded(batch) for batch in data.batches])[-1]
        # Around the backward pass too: with checkpoints it computes layers again.
        with attention_for_training(device, data.longest):
            with autocast():
                encoded = [student.encoded(batch) for batch in data.batches]
            divergence = _divergence(data.all_scores(student, encoded), target, settings.temperature)
            divergence.sum().backward()
        # Each worker's is of its own passages.
        sum_gradients(trained, world)
        nn.utils.clip_grad_norm_(trained, settings.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(divergence.detach())
        if (step + 1) % tenth == 0:
            metrics = {"step": step - settings.steps, "total_steps": settings.steps, **_means(student, seen[-tenth:])}
            state = {"step": step + 1, "seconds": time.perf_counter() - begun, "seen": torch.stack(seen)}
            report(metrics, partial(_save, state, trained, optimizer, random))
    _set_trained(embeddings, True)
    first, last = _means(student, seen[:tenth], "first_kl"), _means(student, seen[-tenth:], "last_kl")
    return first | last | {"exit_warm_up/seconds": time.perf_counter() - begun}


def _save(
    state: dict,
    trained: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    random: np.random.Generator,
    folder: Path,
) -> None:
    weights = {"trained": [p.detach() for p in trained], "optimizer": optimizer.state_dict()}
    torch.save(state | weights | {"random": random.bit_generator.state}, folder / _STATE)


def _load(
    folder: Path, trained: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, random: np.random.Generator
) -> tuple[int, float, list[torch.Tensor]]:
    """Restore in place what `_save` wrote; returns the steps that are done, their seconds and their KLs."""
    state = torch.load(folder / _STATE, weights_only=True, map_location="cpu")
    with torch.no_grad():
        torch._foreach_copy_([p.detach() for p in trained], state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    random.bit_generator.state = state["random"]
    return state["step"], state["seconds"], list(state["seen"])


def _means(student: SimilarityStudent, divergences: Sequence[torch.Tensor], name: str = "kl") -> dict[str, float]:
    """Mean over steps of each exit's KL."""
    values = torch.stack(list(divergences)).mean(0).tolist()
    return {f"exit_warm_up/layer_{n}/{name}": value for n, value in zip(student.layers, values, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepData:
    """A step's texts as one worker encodes them: all queries, and its share of the passages."""

    batches: list[dict[str, torch.Tensor]]
    """The queries, and then passages from short to long."""
    places: torch.Tensor
    """Of the worker's passages among all. A worker with none encodes one all the same, as one more that is not among
    them."""
    passages: int
    """Of all workers."""
    world: World

    @classmethod
    def of(
        cls, student: SimilarityStudent, queries: Sequence[str], passages: Sequence[str], longest: int, world: World
    ) -> _StepData:
        asked = student.encode_alone(queries, student.description.max_query_length)
        listed = sorted(student.encode_alone(passages, longest), key=lambda e: len(e["input_ids"]))
        own = listed[world.rank :: world.size]
        shown = own or listed[:1]
        batches = [asked, *(shown[i : i + _PASSAGES] for i in range(0, len(shown), _PASSAGES))]
        return cls(
            batches=[student.batch(batch, packed=True) for batch in batches],
            places=torch.arange(len(listed))[world.rank :: world.size],
            passages=len(listed),
            world=world,
        )

    @property
    def longest(self) -> int:
        return max(batch["input_ids"].shape[1] for batch in self.batches)

    def all_scores(self, student: SimilarityStudent, encoded: Sequence[EncodedTexts]) -> torch.Tensor:
        """Scores [layers, Q, D] of the queries with the passages of all workers; only this worker's have a gradient."""
        scores = student.score_all(encoded[0], encoded[1:])[..., : len(self.places)]
        if self.world.size == 1:
            return scores
        places = self.places.to(scores.device)
        whole = scores.new_zeros(*scores.shape[:-1], self.passages).index_copy(-1, places, scores.detach())
        torch.distributed.all_reduce(whole)
        return whole.index_copy(-1, places, scores)


def _divergence(actual: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean KL [layers] over the queries, from scores [layers, Q, D] to the target's [Q, D]."""
    goal, scores = ((s / temperature).log_softmax(-1) for s in (target, actual))
    return (goal.exp() * (goal - scores)).sum(-1).mean(-1)


def draw(
    listed: CandidateList, settings: ExitWarmUpSettings, random: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Queries and passages of one step: the list's query, variants of it and spans of the list's other passages, or of
    these where there are no others; passages of the list."""
    texts = [c.contents for c in listed.candidates]
    order = random.permutation(len(texts))
    passages, others = ([texts[i] for i in part] for part in np.split(order, [settings.passages]))
    if settings.replaced_words:
        passages = vary(passages, settings.replaced_words, random)
    others = others or passages
    query = listed.query.text
    variants = [_variant(query, others if n % 2 else (), random) for n in range(settings.variants)]
    spans = [_span(others[n % len(others)], _WORDS_OF_A_SPAN, random) for n in range(settings.spans)]
    return [query, *variants, *spans], passages


def _variant(query: str, others: Sequence[str], random: np.random.Generator) -> str:
    """A query that lacks some of its words, all of them never, and has some of another text's, where there are any."""
    words = query.split()
    kept = [word for word in words if random.random() < _SHARE_OF_A_VARIANT] or words
    if others:
        place = int(random.integers(len(kept) + 1))
        kept.insert(place, _span(others[int(random.integers(len(others)))], _WORDS_OF_AN_INSERT, random))
    return " ".join(kept)


def _span(text: str, lengths: tuple[int, int], random: np.random.Generator) -> str:
    """So many words of a text, in a row."""
    words = text.split()
    length = int(random.integers(lengths[0], lengths[1] + 1))
    begin = int(random.integers(max(1, len(words) - length + 1)))
    return " ".join(words[begin : begin + length])


def vary(passages: Sequence[str], share: float, random: np.random.Generator) -> list[str]:
    """Passages that were not read before, as the last layer has a score for any text: every other one loses up to a
    third of its words at either end, and a share of the words of all are exchanged for some of any passage's."""
    pool = [word for passage in passages for word in passage.split()]
    varied = []
    for number, passage in enumerate(passages):
        words = passage.split()
        if number % 2:
            third = len(words) // 3
            words = words[int(random.integers(third + 1)) : len(words) - int(random.integers(third + 1))]
        for place in np.flatnonzero(random.random(len(words)) < share):
            words[place] = pool[int(random.integers(len(pool)))]
        varied.append(" ".join(words))
    return varied


def _set_trained(parameters: Sequence[nn.Parameter], trained: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trained)
