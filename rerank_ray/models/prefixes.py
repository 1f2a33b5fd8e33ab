"""Prefixes that several sequences share: which they are, and caches of keys and values that are computed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

_FEWEST_TOKENS = 16
_LEAST_SAVED = 1 / 16
"""Of a group's tokens: prefixes are a pass of their own, and slow attention down. On a CPU windows of ten passages that
shared 1 % took 1.13 times as long for it; pairs gained by sharing 12 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sequences, by index, whose first `length` tokens are the same."""

    length: int
    members: tuple[int, ...]


def shared_prefixes(sequences: Sequence[Sequence[int]]) -> list[Group]:
    """Divide sequences into groups of two or more that share a prefix; those without one are in no group.

    Sorted sequences with a common prefix lie side by side, and the prefix of a stretch is the shortest between two
    neighbours. A stretch is one group, or is cut where neighbours have least in common, whichever leaves fewer tokens
    to compute: 64 queries that share a chat template become 64 groups that share their query as well. A stretch that
    would save less than a sixteenth of its tokens is no group, and is not tried again without its longest. The last
    token of a sequence is never part of a prefix: a call's first logits stand there.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    common = [common_length(sequences[a][:-1], sequences[b][:-1]) for a, b in itertools.pairwise(order)]
    groups = _divide(common, [len(sequences[i]) for i in order])
    return [Group(length=length, members=tuple(order[start:end])) for length, start, end in groups]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How long the beginning is that two sequences share."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def _divide(common: list[int], lengths: list[int]) -> list[tuple[int, int, int]]:
    """(prefix, start, end) of the best groups of sequences of these lengths; `common[i]` is between i and i + 1.

    Without recursion: a thousand versions of one text that differ ever later are a thousand stretches deep.
    """
    tokens_before = [0, *itertools.accumulate(lengths)]
    stretches, parts_of = [(0, len(lengths))], []
    shortest: list[int] = []
    for start, end in stretches:
        shortest.append(min(common[start : end - 1], default=0))
        cuts = [i + 1 for i in range(start, end - 1) if common[i] == shortest[-1]]
        parts = list(itertools.pairwise([start, *cuts, end])) if cuts else []
        parts_of.append(range(len(stretches), len(stretches) + len(parts)))
        stretches += parts
    saved = [0] * len(stretches)
    groups: list[list[tuple[int, int, int]]] = [[] for _ in stretches]
    for n, (start, end) in reversed(list(enumerate(stretches))):  # parts stand behind the stretch that they are of
        saved[n] = sum(saved[part] for part in parts_of[n])
        together = (end - start - 1) * shortest[n]
        tokens = tokens_before[end] - tokens_before[start]
        pays = shortest[n] >= _FEWEST_TOKENS and together >= _LEAST_SAVED * tokens
        if pays and together > saved[n]:
            saved[n], groups[n] = together, [(shortest[n], start, end)]
        else:
            groups[n] = [group for part in parts_of[n] for group in groups[part]]
    return groups[0]


class Prefixes:
    """Keys and values of several prefixes, from which each batch takes those of its rows."""

    def __init__(self, cache: DynamicCache, lengths: torch.Tensor) -> None:
        """Take a cache [G, L] that was filled from prefixes padded on the right, and their lengths [G]."""
        align_right(cache, cache.get_seq_length() - lengths)
        self._cache = cache
        self.lengths = lengths

    def cache(self, rows: torch.Tensor) -> DynamicCache:
        """A cache [B, L] of the prefixes with these indices [B], which end at its last column."""
        columns = int(self.lengths[rows].max())
        return DynamicCache([(x.keys[rows, :, -columns:], x.values[rows, :, -columns:]) for x in self._cache.layers])


def align_right(cache: DynamicCache, gaps: torch.Tensor) -> None:
    """Move each row's columns to the right by its gap [B], in place.

    The padding behind a row's tokens comes to stand in front of them, so that what is appended follows them without a
    hole: masks of sliding windows count columns. Keys keep the positions they were computed at.
    """
    if not gaps.any():
        return
    length = cache.get_seq_length()
    source = (torch.arange(length, device=gaps.device) - gaps[:, None]) % length
    for layer in cache.layers:
        layer.keys = layer.keys.gather(2, source[:, None, :, None].expand_as(layer.keys))
        layer.values = layer.values.gather(2, source[:, None, :, None].expand_as(layer.values))
