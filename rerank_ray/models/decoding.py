"""Batched generation: greedy or sampled, until the model ends its turn, a stop string, or a call's `max_tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache

from rerank_ray.models.protocol import Generate

_MORE_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One call's text, its tokens, the one that ended it included, and the log-probability of these."""

    text: str
    tokens: tuple[int, ...]
    cut_off: bool
    log_probability: float


class State(Protocol):
    """A model in the middle of a batch of texts."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each row, tokens [B], and return the next logits [B, vocabulary]."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all rows but these, given by index."""
        ...


class CausalState:
    """A decoder's cache, filled so that every row's tokens end at its last column."""

    def __init__(self, model, cache: DynamicCache, lengths: torch.Tensor) -> None:
        self._model, self._cache, self._lengths = model, cache, lengths
        self._padded = bool((lengths < cache.get_seq_length()).any())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        columns = self._cache.get_seq_length() + 1
        mask = None
        if self._padded:
            mask = torch.arange(columns, device=tokens.device) >= columns - 1 - self._lengths[:, None]
        output = self._model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self._lengths[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._lengths = self._lengths + 1
        return output.logits[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._lengths = self._lengths[rows]


def generate(
    state: State, logits: torch.Tensor, calls: Sequence[Generate], tokenizer, ends: frozenset[int]
) -> list[Generated]:
    """Continue each call's text, from the logits [B, vocabulary] after its prompt; rows that are done leave the batch.

    Every call draws from a generator of its own, so that a sample does not depend on its neighbours.
    """
    device = logits.device
    temperatures = torch.tensor([c.temperature for c in calls], device=device)
    longest = max(c.max_tokens for c in calls)
    draws = torch.zeros(len(calls), longest, dtype=torch.float64)
    for row, call in zip(draws, calls, strict=True):
        if call.temperature > 0:
            generator = torch.Generator().manual_seed(call.seed)
            row[: call.max_tokens] = torch.rand(call.max_tokens, generator=generator, dtype=torch.float64)
    draws = draws.to(device)
    written: list[list[int]] = [[] for _ in calls]
    endings: list[tuple[str, bool] | None] = [None] * len(calls)
    logs = torch.zeros(len(calls), device=device)
    rows = torch.arange(len(calls), device=device)
    for step in range(longest):
        tokens = choose(logits, temperatures[rows], draws[rows, step])
        logs[rows] += log_probabilities(logits, tokens)
        unfinished = []
        for place, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
            written[row].append(token)
            endings[row] = _ending(calls[row], written[row], tokenizer, ends)
            if endings[row] is None:
                unfinished.append(place)
        if not unfinished:
            break
        if len(unfinished) < len(rows):
            kept = torch.tensor(unfinished, device=device)
            rows, tokens = rows[kept], tokens[kept]
            state.keep(kept)
        logits = state.step(tokens)
    return [
        Generated(text=text, tokens=tuple(tokens), cut_off=cut_off, log_probability=log)
        for (text, cut_off), tokens, log in zip(endings, written, logs.tolist(), strict=True)
    ]


def choose(logits: torch.Tensor, temperatures: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The next token of each row [B]: the likeliest at temperature 0, else the one whose share of the cumulative
    distribution softmax(logits / temperature) holds the row's draw from [0, 1)."""
    likeliest = logits.argmax(-1)
    sampled = temperatures > 0
    if not sampled.any():
        return likeliest
    scaled = logits[sampled].double() / temperatures[sampled, None]
    cumulative = scaled.softmax(-1).cumsum(-1)
    at = draws[sampled, None] * cumulative[:, -1:]
    likeliest[sampled] = torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return likeliest


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Natural-log probabilities [N] of one token at each position, from logits [N, vocabulary]."""
    return torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[:, None])[:, 0]


def _ending(call: Generate, tokens: list[int], tokenizer, ends: frozenset[int]) -> tuple[str, bool] | None:
    """The call's text and whether it was cut off, if its last token was the last one."""
    if tokens[-1] in ends:
        return _text(tokenizer, tokens[:-1]), False
    full = len(tokens) == call.max_tokens
    if not (full or (call.stop and _may_stop(call.stop, tokens, tokenizer))):
        return None
    text = _text(tokenizer, tokens)
    stops = [at for s in call.stop if (at := text.find(s)) >= 0]
    if stops:
        return text[: min(stops)], False
    return (text, True) if full else None


def _may_stop(stops: Sequence[str], tokens: list[int], tokenizer) -> bool:
    """Whether a stop string stands at the end of a text, of which no more is decoded than the longest can take: a token
    is a byte at least. The first tokens of what is decoded may be a character's rest, or lose their space."""
    longest = max(len(s.encode()) for s in stops)
    end = _text(tokenizer, tokens[-longest - _MORE_TOKENS :])
    return any(s in end for s in stops)


def _text(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
