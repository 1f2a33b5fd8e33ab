"""Reads a decoder's attention from the query to the passages, head by head, and keeps no matrix of it (ICR, CoRe).

Registered with transformers as the attention implementation `rerank_ray_reading`, which computes a layer's output with
SDPA as always and, beside it, the rows softmax(QKᵀ) of the query's tokens alone. They are reduced to a number for each
passage token (and head, if asked) before the next layer starts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.prefixes import common_length
from rerank_ray.models.protocol import Answer, Attention, Call, Failure, Result
from rerank_ray.models.tokenizing import PromptEncoder, PromptTooLongError, SpannedPrompt
from rerank_ray.records import Usage

# No mask is registered with it: models then make none, and every row is causal up to its branches.
READING = "rerank_ray_reading"


class AttentionReader:
    """Answers `Attention` calls with a causal model of transformers.

    A call is one sequence: the prompt, and behind it what the calibration prompt does not share with it from its
    beginning (the calibration text and the end of the frame), which is computed as if it followed the shared part.
    """

    def __init__(self, model: PreTrainedModel, encoder: PromptEncoder, runner: engine.BatchRunner) -> None:
        self._model, self._encoder, self._runner = model, encoder, runner
        self._by_layer = functools.lru_cache(maxsize=16)(self._heads_by_layer)

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """Layers, and heads in each.

        Raises:
            ModelError: attention of this architecture can't be read.
        """
        config = self._model.config.get_text_config()
        name = f"{type(self._model).__name__}: attention can't be read: "
        if not (self._model._can_set_attn_implementation() and self._model._supports_sdpa):
            raise ModelError(name + "the model does not go through transformers' attention interface with SDPA")
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ModelError(name + f"it has layers without attention ({', '.join(sorted(kinds))})")
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise ModelError(name + "its attention has a soft cap, which SDPA does not compute")
        window = getattr(config, "sliding_window", None)
        if window is not None and window < self._encoder.max_length:
            raise ModelError(
                name + f"it slides over {window} tokens and max_length is {self._encoder.max_length}: lower max_length"
            )
        return config.num_hidden_layers, config.num_attention_heads

    def run(self, calls: Sequence[Attention]) -> list[Result]:
        prompts = [self._prepare(call) for call in calls]
        results: list[Result | None] = [p if isinstance(p, Failure) else None for p in prompts]
        ready = [i for i, r in enumerate(results) if r is None]
        values = self._runner.run(
            [len(prompts[i].ids) for i in ready],
            lambda batch: self._forward([(calls[i], prompts[i]) for i in map(ready.__getitem__, batch)]),
        )
        for i, value in zip(ready, values, strict=True):
            results[i] = Answer(value=value, usage=prompts[i].usage)
        return results

    def _prepare(self, call: Attention) -> _Sequence | Failure:
        calibration = () if call.calibration is None else (call.calibration,)
        try:
            prompts = self._encoder.encode_spans(call.prompt, call.query, calibration)
        except PromptTooLongError as error:
            return Failure(reason=str(error))
        if not all(len(p.query) for p in prompts):
            return Failure(reason="the query has no tokens")
        if any([len(s) for s in p.passages] != [len(s) for s in prompts[0].passages] for p in prompts):
            return Failure(reason="the calibration text changes the tokens of the passages before it")
        return _Sequence(prompts)

    def _heads_by_layer(self, heads: tuple[tuple[int, int], ...] | None) -> dict[int, list[tuple[int, int]]]:
        """Layer -> (head, index among `heads`)."""
        layers, width = self.shape
        if heads is None:
            heads = tuple((layer, head) for layer in range(layers) for head in range(width))
        chosen: dict[int, list[tuple[int, int]]] = {}
        for index, (layer, head) in enumerate(heads):
            if not (0 <= layer < layers and 0 <= head < width):
                raise ModelError(f"head {head} of layer {layer}: the model has {layers} layers of {width} heads")
            chosen.setdefault(layer, []).append((head, index))
        if not chosen:
            raise ModelError("heads: [] reads nothing; leave it out to read all")
        return chosen

    @torch.inference_mode()
    def _forward(self, batch: list[tuple[Attention, _Sequence]]) -> list[tuple]:
        device = self._model.device
        rows = [_Row(call, sequence, self._by_layer(call.heads), device) for call, sequence in batch]
        ids, _ = engine.right_pad([r.sequence.ids for r in rows], pad_id=0)
        positions = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            positions[i, : len(row.sequence.ids)] = torch.tensor(row.sequence.positions)
        reading = _Reading(rows)
        with _attention_implementation(self._model.config, READING):
            try:
                self._model.base_model(
                    input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False, reading=reading
                )
            except _LastLayerRead:
                return [row.value() for row in rows]
        raise ModelError(f"{type(self._model).__name__}: its layers do not pass on what attention functions are given")


class _Sequence:
    """One call's tokens: its prompt, then the end of its calibration prompt."""

    def __init__(self, prompts: Sequence[SpannedPrompt]) -> None:
        main = prompts[0]
        self.ids, self.positions = list(main.ids), list(range(len(main.ids)))
        self.branches = [_Branch(prompt=main, shared=0, start=0)]
        cached = 0
        for other in prompts[1:]:
            shared = common_length(main.ids, other.ids)
            self.branches.append(_Branch(prompt=other, shared=shared, start=len(self.ids)))
            self.ids += other.ids[shared:]
            self.positions += range(shared, len(other.ids))
            cached += shared
        tokens = sum(len(p.ids) for p in prompts)
        self.usage = Usage(calls=len(prompts), prompt_tokens=tokens, cached_tokens=cached)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Branch:
    """A prompt inside a sequence: the sequence's first `shared` tokens, and those from `start` on."""

    prompt: SpannedPrompt
    shared: int
    start: int

    @property
    def own(self) -> slice:
        """The sequence's columns that are this prompt's alone."""
        return slice(self.start, self.start + len(self.prompt.ids) - self.shared)

    def columns(self, states: torch.Tensor) -> torch.Tensor:
        """[heads, L, D] of a sequence -> [heads, tokens of the prompt, D]."""
        if self.shared == 0:
            return states[:, self.own]
        return torch.cat([states[:, : self.shared], states[:, self.own]], dim=1)

    @property
    def query_columns(self) -> list[int]:
        """Where the query's tokens stand in the sequence."""
        return [t if t < self.shared else self.start + t - self.shared for t in self.prompt.query]


class _Row:
    """What is gathered for one call while its batch goes through the layers: [passage tokens] or [.., heads]."""

    def __init__(
        self, call: Attention, sequence: _Sequence, by_layer: dict[int, list[tuple[int, int]]], device: torch.device
    ) -> None:
        self.sequence, self.by_layer, self._each_head = sequence, by_layer, call.each_head
        self._lengths = [len(span) for span in sequence.branches[0].prompt.passages]
        self._tokens = [
            torch.tensor([t for span in branch.prompt.passages for t in span], dtype=torch.long, device=device)
            for branch in sequence.branches
        ]
        self._asking = [torch.tensor(branch.query_columns, device=device) for branch in sequence.branches]
        count = sum(len(heads) for heads in by_layer.values())
        self._sums = torch.zeros((sum(self._lengths), *([count] if self._each_head else [])), device=device)

    def read(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Add what the wanted heads of a layer give; query [H, L, D] and key [H_kv, L, D] of this row."""
        wanted = self.by_layer.get(layer)
        if not wanted:
            return
        heads = torch.tensor([head for head, _ in wanted], device=query.device)
        indices = torch.tensor([index for _, index in wanted], device=query.device)
        for sign, branch, tokens, asking in zip(
            (1, -1), self.sequence.branches, self._tokens, self._asking, strict=False
        ):
            given = sign * query_attention(
                query[:, asking], branch.columns(key), branch.prompt.query.start, heads, scale
            )
            if self._each_head:
                self._sums[:, indices] += given[:, tokens].T
            else:
                self._sums += given[:, tokens].sum(0)

    def value(self) -> tuple:
        return tuple(part.numpy() for part in self._sums.cpu().split(self._lengths))


def query_attention(
    query: torch.Tensor, key: torch.Tensor, start: int, heads: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of some heads, averaged over the query's tokens: [heads, L] in float32.

    Args:
        query: [H, T, D] of the query's tokens, which stand at `start`, `start` + 1, ….
        key: [H_kv, L, D] of the whole causal sequence; heads share keys in groups of H / H_kv.
        heads: indices below H.
    """
    group, tokens = query.shape[0] // key.shape[0], query.shape[1]
    end = start + tokens
    used, place = torch.unique(heads // group, return_inverse=True)
    asked = query.float().unflatten(0, (-1, group))[used].flatten(1, 2)
    logits = asked @ key[used, :end].float().transpose(1, 2) * scale
    positions = torch.arange(end, device=key.device)
    logits = logits.unflatten(1, (group, tokens)).masked_fill_(positions > positions[start:, None], -torch.inf)
    weights = logits.softmax(-1).mean(2)  # [used key heads, group, end]
    return nn.functional.pad(weights[place, heads % group], (0, key.shape[1] - end))


class _LastLayerRead(Exception):
    """Ends a forward pass once the last wanted layer's attention is read: nothing above it is computed."""


class _Reading:
    """The rows of a batch, as its attention layers see them."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = rows
        self.last_layer = max(max(row.by_layer) for row in rows)


def reading_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    reading: _Reading,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal SDPA that also reads the wanted heads; each later branch sees the shared tokens and itself.

    Args:
        query, key, value: [B, H, L, D], with H_kv heads for key and value.

    Returns:
        [B, L, H, D].
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    for i, row in enumerate(reading.rows):
        row.read(module.layer_idx, query[i], key[i], scale)
    if module.layer_idx == reading.last_layer:
        raise _LastLayerRead
    output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scale, **kwargs)
    for i, row in enumerate(reading.rows):
        for branch in row.sequence.branches[1:]:
            length, own = len(branch.prompt.ids), branch.own
            if own.stop > own.start:
                seen = torch.arange(length, device=query.device)
                mask = seen <= seen[branch.shared :, None]
                states = [branch.columns(x[i])[None] for x in (key, value)]
                output[i, own] = sdpa_attention_forward(
                    module, query[i : i + 1, :, own], *states, mask[None, None], scaling=scale, **kwargs
                )[0][0]
    return output, None


AttentionInterface.register(READING, reading_attention)


def answer_apart(
    calls: Sequence[Call],
    kind: type,
    these: Callable[[Sequence[Call]], list[Result]],
    others: Callable[[Sequence[Call]], list[Result]],
) -> list[Result]:
    """Answer the calls of one kind with one function and the rest with another; results in the calls' order."""
    chosen = [isinstance(call, kind) for call in calls]
    answers = iter(these([call for call, c in zip(calls, chosen, strict=True) if c]))
    rest = iter(others([call for call, c in zip(calls, chosen, strict=True) if not c]))
    return [next(answers) if c else next(rest) for c in chosen]


@contextmanager
def _attention_implementation(config, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
