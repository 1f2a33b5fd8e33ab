"""Early exits of a similarity student learn to score as its untrained last layer does, from unlabelled text.

Texts are encoded alone, as a bi-encoder has them, so a step's queries and passages are encoded once each and scored all
against all. The passages are of one list, so that they are as hard to tell apart as those of a reranking task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from rerank_ray.distill.optimizer import make_optimizer, set_learning_rate
from rerank_ray.models.engine import attention_for_training
from rerank_ray.models.student.similarity import EncodedTexts, SimilarityStudent
from rerank_ray.records import Labels
from rerank_ray.settings.student import ExitWarmUpSettings

_WORDS_OF_A_SPAN = (3, 9)
_PASSAGES = 14
"""A batch holds so many passages of about one length."""


def warm_up(
    student: SimilarityStudent,
    read: Callable[[int], Labels],
    count: int,
    settings: ExitWarmUpSettings,
    autocast: Callable[[], torch.autocast],
    seed: int,
) -> dict[str, float]:
    """Train the student in place; returns each taught exit's KL and distance over the first and the last tenth.

    Exits with layers of their own train those alone, and the last layer, which stays as it is, teaches them. Without,
    all layers move, and what the last one was teaches every exit, the last one too.

    Args:
        read: the training list of a number below `count`.
        autocast: makes the context of a forward pass.
    """
    device = next(student.parameters()).device
    random = np.random.default_rng([seed, settings.steps])
    teacher, taught = student, student.layers[:-1]
    held = [*student.backbone.parameters(), student.gate] if student.branches else []
    if not student.branches:
        teacher, taught = student.truncated(student.layers[-1], alone=True).to(device), student.layers
    student.train()
    seen: list[torch.Tensor] = []
    with _held(held):
        optimizer = make_optimizer(student, settings.optimizer)
        for step in range(settings.steps):
            set_learning_rate(optimizer, settings.optimizer, step, settings.steps)
            texts = draw(read(int(random.integers(count))), settings, random)
            asked, *batches = _batches(student, *texts, settings.max_passage_length)
            # Around the backward pass too: with checkpoints it computes layers again.
            with attention_for_training(device, max(asked["input_ids"].shape[1], batches[-1]["input_ids"].shape[1])):
                with autocast():
                    encoded = [student.encoded(batch) for batch in (asked, *batches)]
                if teacher is student:
                    shown = encoded
                else:
                    with autocast(), torch.no_grad():
                        shown = [teacher.encoded(batch) for batch in (asked, *batches)]
                measured = _distances(student, encoded, teacher, shown, settings.temperature)[:, : len(taught)]
                (measured[0] + settings.state_weight * measured[1]).sum().backward()
            nn.utils.clip_grad_norm_(student.parameters(), settings.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen.append(measured.detach())
    tenth = math.ceil(settings.steps / 10)
    return {
        f"exit_warm_up/layer_{layer}/{when}_{name}": value
        for when, steps in (("first", seen[:tenth]), ("last", seen[-tenth:]))
        for name, values in zip(("kl", "distance"), torch.stack(steps).mean(0).tolist(), strict=True)
        for layer, value in zip(taught, values, strict=True)
    }


@contextmanager
def _held(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that stay as they are; afterwards those of them that were trained are trained again."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _batches(
    student: SimilarityStudent, queries: Sequence[str], passages: Sequence[str], max_passage_length: int
) -> list[dict[str, torch.Tensor]]:
    """The queries' batch and then the passages', from short to long."""
    asked = student.batch(student.encode_alone(queries, student.description.max_query_length))
    listed = sorted(student.encode_alone(passages, max_passage_length), key=lambda e: len(e["input_ids"]))
    return [asked, *(student.batch(listed[i : i + _PASSAGES]) for i in range(0, len(listed), _PASSAGES))]


def _distances(
    student: SimilarityStudent,
    encoded: Sequence[EncodedTexts],
    teacher: SimilarityStudent,
    shown: Sequence[EncodedTexts],
    temperature: float,
) -> torch.Tensor:
    """From each exit to the teacher's last layer: KL of a query's scores, and 1 − cosine of a token's states [2,
    layers], both means."""
    target = (teacher.score_all(shown[0], shown[1:])[-1].detach() / temperature).log_softmax(-1)
    actual = (student.score_all(encoded[0], encoded[1:]) / temperature).log_softmax(-1)
    divergence = (target.exp() * (target - actual)).sum(-1).mean(-1)
    tokens = sum(texts.mask.sum() for texts in encoded)
    away = [
        sum(
            ((1 - nn.functional.cosine_similarity(own.states[i].float(), last, dim=-1)) * own.mask).sum()
            for own, last in zip(encoded, (texts.states[-1].float().detach() for texts in shown), strict=True)
        )
        for i in range(len(student.layers))
    ]
    return torch.stack([divergence, torch.stack(away) / tokens])


def draw(labels: Labels, settings: ExitWarmUpSettings, random: np.random.Generator) -> tuple[list[str], list[str]]:
    """Queries and passages of one step: the list's query and spans of passages; passages of the list."""
    texts = [c.contents for c in labels.candidate_list.candidates]
    passages = [texts[i] for i in random.permutation(len(texts))[: settings.passages]]
    queries = [labels.candidate_list.query.text]
    for number in range(settings.spans):
        words = passages[number % len(passages)].split()
        length = int(random.integers(_WORDS_OF_A_SPAN[0], _WORDS_OF_A_SPAN[1] + 1))
        begin = int(random.integers(max(1, len(words) - length + 1)))
        queries.append(" ".join(words[begin : begin + length]))
    return queries, passages
