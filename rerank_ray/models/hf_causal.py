"""Decoder LLMs on transformers: next-token logits, log-likelihoods and generation, from safetensors or GGUF."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from rerank_ray.models import decoding, engine
from rerank_ray.models.acceleration import accelerate, compiles_in_parts
from rerank_ray.models.attention_reader import AttentionReader, answer_apart
from rerank_ray.models.continuations import end_ids
from rerank_ray.models.gguf_header import read_once
from rerank_ray.models.last_token import computes_last_token_alone
from rerank_ray.models.loading import load, load_adapted
from rerank_ray.models.output_layer import OutputLayer
from rerank_ray.models.packed_decoder import CausalPacking, packs_in_scoring
from rerank_ray.models.positions import check_causal, check_positions, position_limit
from rerank_ray.models.prefixes import Prefixes, align_right, shared_prefixes
from rerank_ray.models.protocol import (
    Answer,
    Attention,
    Call,
    Failure,
    Generate,
    LogLikelihood,
    NextToken,
    Prompt,
    Result,
)
from rerank_ray.models.resolve import resolve
from rerank_ray.models.scoring import columns_of, read_scores
from rerank_ray.models.tokenizing import EncodedCall, PromptEncoder
from rerank_ray.records import Usage
from rerank_ray.settings.models import HFCausalSettings

_CACHED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One call's tokens; the first `shared` are those of prefix `group`, whose keys and values are computed once."""

    call: Call
    tokens: EncodedCall
    group: int = 0
    shared: int = 0
    cached: int = 0

    @property
    def prompt(self) -> list[int]:
        return self.tokens.prompt

    @property
    def continuation(self) -> tuple[int, ...]:
        return self.tokens.continuation

    @property
    def held(self) -> int:
        """Tokens that take memory but are not computed with the prompt: what is shared, and room for an answer."""
        return self.shared + (self.call.max_tokens if isinstance(self.call, Generate) else 0)

    @property
    def computed(self) -> list[int]:
        """Behind a continuation's last token nothing is read."""
        return [*self.prompt, *self.continuation[:-1]][self.shared :]


class HFCausal:
    """Answers `NextToken`, `LogLikelihood`, `Generate` and `Attention`.

    Where sequences are padded it is on the right and needs no attention mask: a causal model's real tokens never see
    what follows them. Prefixes of several lengths, and sequences laid end to end, have one. Logits are computed only at
    the positions that are asked for. Prompts that begin alike share the keys and values of their beginning.
    """

    answers = frozenset({NextToken, LogLikelihood, Generate, Attention})
    tells_raw_logits = True
    exit_layer = None

    def __init__(self, settings: HFCausalSettings, model: PreTrainedModel | None = None, tokenizer=None) -> None:
        """Load model and tokenizer, or run those that are loaded already: a model that is being trained writes as it
        is at each call."""
        resolved = resolve(settings)
        self.name = f"hf_causal:{resolved.identity}"
        self.device = engine.pick_device(settings.device)
        loaded = model is None
        with read_once(resolved.gguf_file):
            self.tokenizer = tokenizer or load(AutoTokenizer, resolved, settings)
            if loaded:
                dtype = engine.pick_dtype(settings.dtype, self.device)
                model = load_adapted(AutoModelForCausalLM, resolved, settings, dtype=dtype).to(self.device).eval()
        self.model = model
        self.parameters = engine.count_parameters(self.model)
        if loaded:
            accelerate(self.model.base_model, settings)
        check_positions(self.model, settings.max_length, settings.path)
        check_causal(self.model, settings.path, "use kind: bi_encoder")
        self.encoder = PromptEncoder(self.tokenizer, settings.max_length, settings.chat)
        # A model that is trained is called by others too.
        self._packs = loaded and packs_in_scoring(self.model, settings)
        self._last_alone = computes_last_token_alone(self.model)
        self.runner = engine.BatchRunner(
            settings.tokens_per_batch, self.device, in_cache=engine.LLM_TOKENS_IN_CACHE, packed=self._packs
        )
        # What is written is computed a token a row at a time, so there the more rows the better.
        self._writer = engine.BatchRunner(settings.tokens_per_batch, self.device)
        self._prefix_runner = engine.BatchRunner(settings.tokens_per_batch, self.device, packed=self._packs)
        self._writer.computed = self._prefix_runner.computed = self.runner.computed
        self._positions = position_limit(self.model)
        self._ends = end_ids(self.tokenizer, self.model.generation_config)
        self.share_prefix = settings.share_prefix
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
        # RWKV's config names no layers, and it leaves a cache of keys and values empty.
        if self.model._is_stateful or not kinds <= _CACHED_LAYERS:
            # States of recurrent layers can't be cut into rows and columns as keys and values can.
            self.answers, self.share_prefix = self.answers - {Generate}, False
        if settings.compile and not compiles_in_parts(self.model):
            # Attention is read by putting other functions into the model.
            self.answers -= {Attention}
        self._output = OutputLayer(self.model)
        # Attention is read from padded batches.
        reads = engine.BatchRunner(settings.tokens_per_batch, self.device, in_cache=engine.LLM_TOKENS_IN_CACHE)
        reads.computed = self.runner.computed
        self._reader = AttentionReader(self.model, self.encoder, reads)

    @property
    def attention_shape(self) -> tuple[int, int]:
        """Layers, and heads in each; `ModelError` where attention can't be read."""
        return self._reader.shape

    def check_labels(self, labels: tuple[str, ...], prompt: Prompt) -> None:
        """Raise `ModelError` unless every label is one token behind the prompt."""
        self.encoder.label_ids(prompt, labels)

    def check_fits(self, prompt: Prompt, max_tokens: int = 0) -> None:
        """Raise `ModelError` unless the prompt, each passage cut to a token, and an answer fit `max_length`."""
        self.encoder.check_fits(prompt, max_tokens)

    def run(self, calls: Sequence[Call]) -> list[Result]:
        if any(isinstance(call, Attention) for call in calls):
            return answer_apart(calls, Attention, self._reader.run, self.run)
        return engine.in_pools(
            calls,
            self._encode,
            self._answer_pool,
            first=self.runner.first_pool(calls, self.encoder.max_length),
            # Shared prefixes are looked for within a pool, so those that begin alike go into one.
            key=(lambda call: call.prompt.plain_text) if self.share_prefix else None,
        )

    def _encode(self, calls: Sequence[Call]) -> list[_Row | Failure]:
        encoded = self.encoder.encode_calls(calls)
        return [e if isinstance(e, Failure) else _Row(call=c, tokens=e) for c, e in zip(calls, encoded, strict=True)]

    def _answer_pool(self, encoded: list[_Row | Failure]) -> list[Result]:
        results: list[Result | None] = [e if isinstance(e, Failure) else None for e in encoded]
        ready = [i for i, r in enumerate(results) if r is None]
        # What a batch reads off logits is of one kind, so that none of it depends on its neighbours.
        for kind, runner, forward in (
            (NextToken, self.runner, self._score),
            (LogLikelihood, self.runner, self._score),
            (Generate, self._writer, self._generate),
        ):
            chosen = [i for i in ready if isinstance(encoded[i].call, kind)]
            answers = self._answers([encoded[i] for i in chosen], runner, forward)
            for i, answer in zip(chosen, answers, strict=True):
                results[i] = answer
        return results

    def _answers(
        self,
        rows: list[_Row],
        runner: engine.BatchRunner,
        forward: Callable[[list[_Row], Prefixes | None], list[Answer]],
    ) -> list[Answer]:
        """Answer rows in batches: those that share a prefix with others first, then the rest."""
        groups = shared_prefixes([r.prompt for r in rows]) if self.share_prefix else []
        answers: list[Answer | None] = [None] * len(rows)

        def run(members: list[int], prefixes: Prefixes | None) -> None:
            held = [rows[i].held for i in members]
            lengths = [len(rows[i].computed) + h for i, h in zip(members, held, strict=True)]
            results = runner.run(lengths, lambda batch: forward([rows[members[b]] for b in batch], prefixes), held)
            for i, answer in zip(members, results, strict=True):
                answers[i] = answer

        def run_groups(chosen: list[int]) -> list[int]:
            for slot, group in enumerate(groups[g] for g in chosen):
                for i in group.members:
                    cached = 0 if i == min(group.members) else group.length
                    rows[i] = replace(rows[i], group=slot, shared=group.length, cached=cached)
            members = [i for g in chosen for i in groups[g].members]
            budget = runner.tokens_per_batch
            try:
                run(members, self._prefixes([rows[groups[g].members[0]].prompt[: groups[g].length] for g in chosen]))
            except engine.TooLongError as error:
                # Beside fewer prefixes it may fit, and as many rows as before.
                runner.tokens_per_batch = budget
                raise torch.OutOfMemoryError(str(error)) from error
            return chosen

        self._prefix_runner.run([g.length for g in groups], run_groups)
        run([i for i, answer in enumerate(answers) if answer is None], None)
        return answers

    @torch.inference_mode()
    def _prefixes(self, sequences: list[list[int]]) -> Prefixes:
        """Compute the keys and values of several prefixes in one pass."""
        if self._packs:
            packing = CausalPacking.of(sequences, self.device, keep=True, last_alone=self._last_alone)
            self._logits([], [], **packing.inputs())
            lengths = torch.tensor([len(s) for s in sequences], device=self.device)
            return Prefixes(DynamicCache(packing.kept), lengths)
        ids, lengths = engine.right_pad(sequences, pad_id=0, limit=self._positions)
        cache = DynamicCache()
        self._logits([], [], input_ids=ids.to(self.device), past_key_values=cache, use_cache=True)
        return Prefixes(cache, lengths.to(self.device))

    @torch.inference_mode()
    def _score(self, rows: list[_Row], prefixes: Prefixes | None) -> list[Answer]:
        # The logits after position p predict token p + 1: a prompt's last position, and each continuation token's but
        # the last.
        wanted = [range(len(r.prompt) - 1, len(r.prompt) + max(len(r.continuation) - 1, 0)) for r in rows]
        tokens, labels = None, [r.tokens.labels for r in rows]
        if isinstance(rows[0].call, NextToken):
            tokens, labels = columns_of(labels)
        if self._packs:
            logits = self._packed(rows, wanted, prefixes, tokens)
        else:
            logits = self._forward(rows, wanted, None if prefixes is None else self._cache_of(rows, prefixes), tokens)
        starts = [0, *itertools.accumulate(map(len, wanted[:-1]))]
        values = read_scores(logits, starts, labels, [r.continuation for r in rows])
        return [_answer(row, value, len(row.continuation)) for row, value in zip(rows, values, strict=True)]

    @torch.inference_mode()
    def _generate(self, rows: list[_Row], prefixes: Prefixes | None) -> list[Answer]:
        cache = DynamicCache() if prefixes is None else self._cache_of(rows, prefixes)
        logits = self._forward(rows, [range(len(r.prompt) - 1, len(r.prompt)) for r in rows], cache)
        front = max(r.shared for r in rows)
        behind = [cache.get_seq_length() - front - len(r.computed) for r in rows]
        align_right(cache, torch.tensor(behind, device=self.device))
        state = decoding.CausalState(self.model, cache, torch.tensor([len(r.prompt) for r in rows], device=self.device))
        texts = decoding.generate(state, logits, [r.call for r in rows], self.tokenizer, self._ends)
        return [
            _answer(
                row,
                # A template may have begun the model's reasoning for it: no parser could tell it from the answer.
                self.encoder.opened_reasoning(row.call.prompt) + t.text,
                len(t.tokens),
                cut_off=t.cut_off,
                log_probability=t.log_probability,
                tokens=t.tokens,
            )
            for row, t in zip(rows, texts, strict=True)
        ]

    def _cache_of(self, rows: list[_Row], prefixes: Prefixes) -> DynamicCache:
        return prefixes.cache(torch.tensor([r.group for r in rows], device=self.device))

    def _forward(
        self, rows: list[_Row], wanted: list[range], cache: DynamicCache | None, tokens: list[int] | None = None
    ) -> torch.Tensor:
        """Logits [N, vocabulary] at each row's wanted positions, row after row, or [N, tokens]; `cache` ends with the
        shared prefixes, and what is computed goes behind them."""
        front = max(r.shared for r in rows)
        limit = None if self._positions is None else self._positions - front
        ids, _ = engine.right_pad([r.computed for r in rows], pad_id=0, limit=limit)
        arguments = {}
        shared = torch.tensor([r.shared for r in rows])[:, None]
        if shared.min() < front:
            arguments["attention_mask"] = torch.arange(front + ids.shape[1]) >= front - shared
            positions = shared + torch.arange(ids.shape[1])
            arguments["position_ids"] = positions if limit is None else positions.clamp(max=self._positions - 1)
        return self._logits(
            [i for i, span in enumerate(wanted) for _ in span],
            [position - row.shared for row, span in zip(rows, wanted, strict=True) for position in span],
            tokens,
            input_ids=ids.to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            **{name: value.to(self.device) for name, value in arguments.items()},
        )

    def _packed(
        self, rows: list[_Row], wanted: list[range], prefixes: Prefixes | None, tokens: list[int] | None
    ) -> torch.Tensor:
        """Logits [N, vocabulary] at each row's wanted positions, row after row, or [N, tokens]."""
        groups = [r.group for r in rows]
        ends = [row.shared + len(row.computed) - 1 for row in rows]
        alone = self._last_alone and all(span == range(end, end + 1) for span, end in zip(wanted, ends, strict=True))
        packing = CausalPacking.of([r.computed for r in rows], self.device, prefixes, groups, last_alone=alone)
        places = [
            start + position - row.shared
            for start, row, span in zip(packing.starts.tolist(), rows, wanted, strict=True)
            for position in span
        ]
        return self._logits([0] * len(places), range(len(rows)) if alone else places, tokens, **packing.inputs())

    def _logits(
        self, rows: list[int], positions: Sequence[int], tokens: list[int] | None = None, **inputs
    ) -> torch.Tensor:
        """Logits [N, vocabulary] at (row, position) pairs, or [N, tokens]; the output layer computes no others."""
        with self._output.asked(rows, positions, tokens):
            return self.model(**inputs).logits[0]


def _answer(row: _Row, value: tuple[float, ...] | str, output_tokens: int, **generated) -> Answer:
    usage = Usage(calls=1, prompt_tokens=len(row.prompt), cached_tokens=row.cached, output_tokens=output_tokens)
    return Answer(value=value, usage=usage, **generated)
