"""What calls ask for, read off a batch's logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from rerank_ray.models import engine
from rerank_ray.models.decoding import log_probabilities


def columns_of(labels: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The different tokens of all calls' labels, and each call's labels as their places among them."""
    tokens = sorted(set(itertools.chain.from_iterable(labels)))
    place = {token: i for i, token in enumerate(tokens)}
    return tokens, [[place[token] for token in ids] for ids in labels]


def read_scores(
    logits: torch.Tensor,
    starts: Sequence[int],
    labels: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> list[tuple[float, ...]]:
    """Of each call the logits of its labels at its start, and the log-probabilities of its continuation's tokens there
    and at the positions behind it; a call has one of the two.

    All go to the device in one transfer and come back in one: each is a wait for what the device still has to do.

    Args:
        logits: [N, vocabulary], or [N, columns] where labels are columns; a call's begin at its of `starts`.
    """
    at = [start for start, ids in zip(starts, labels, strict=True) for _ in ids]
    ids = torch.tensor([*at, *itertools.chain(*labels, *continuations)], dtype=torch.long)
    at, labelled, written = engine.moved(ids, logits.device).split([len(at), len(at), len(ids) - 2 * len(at)])
    values = [logits[at, labelled].float()]
    for start, tokens in zip(starts, written.split([len(c) for c in continuations]), strict=True):
        if len(tokens):
            values.append(log_probabilities(logits[start : start + len(tokens)], tokens))
    read = iter(torch.cat(values).tolist())
    of_labels = [tuple(itertools.islice(read, len(ids))) for ids in labels]
    of_continuations = [tuple(itertools.islice(read, len(c))) for c in continuations]
    return [a + b for a, b in zip(of_labels, of_continuations, strict=True)]
