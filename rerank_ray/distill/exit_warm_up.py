"""Early exits of a similarity student learn to score as its untrained last layer does, from unlabelled text.

Texts are encoded alone, as a bi-encoder has them, so a step's queries and passages are encoded once each and scored all
against all. The passages are of one list, so that they are as hard to tell apart as those of a reranking task.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from rerank_ray.distill.optimizer import make_optimizer, set_learning_rate
from rerank_ray.models.engine import attention_for_training
from rerank_ray.models.student.similarity import SimilarityStudent
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
    """Train the student in place; returns each exit's KL over the first and over the last tenth of the steps.

    The last layer is held to what it was, which moving the layers below it would change.

    Args:
        read: the training list of a number below `count`.
        autocast: makes the context of a forward pass.
    """
    device = next(student.parameters()).device
    random = np.random.default_rng([seed, settings.steps])
    # Of the start only the last layer teaches.
    start = student.truncated(student.layers[-1], alone=True).to(device).requires_grad_(False)
    optimizer = make_optimizer(student, settings.optimizer)
    student.train()
    seen: list[torch.Tensor] = []
    for step in range(settings.steps):
        set_learning_rate(optimizer, settings.optimizer, step, settings.steps)
        queries, passages = draw(read(int(random.integers(count))), settings, random)
        asked = student.batch(student.encode_alone(queries, student.description.max_query_length))
        listed = sorted(student.encode_alone(passages, settings.max_passage_length), key=lambda e: len(e["input_ids"]))
        batches = [student.batch(listed[i : i + _PASSAGES]) for i in range(0, len(listed), _PASSAGES)]
        with autocast(), torch.no_grad():
            target = (start.score_all(asked, batches)[-1] / settings.temperature).log_softmax(-1)
        # Around the backward pass too: with checkpoints it computes layers again.
        with attention_for_training(device, max(asked["input_ids"].shape[1], batches[-1]["input_ids"].shape[1])):
            with autocast():
                scores = (student.score_all(asked, batches) / settings.temperature).log_softmax(-1)
            divergence = (target.exp() * (target - scores)).sum(-1).mean(-1)  # [layers]
            divergence.sum().backward()
        nn.utils.clip_grad_norm_(student.parameters(), settings.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(divergence.detach())
    tenth = math.ceil(settings.steps / 10)
    first, last = torch.stack(seen[:tenth]).mean(0).tolist(), torch.stack(seen[-tenth:]).mean(0).tolist()
    return {
        f"exit_warm_up/layer_{layer}/{when}_kl": value
        for when, values in (("first", first), ("last", last))
        for layer, value in zip(student.layers, values, strict=True)
    }


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
