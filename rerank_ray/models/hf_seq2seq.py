"""Encoder-decoder LLMs of the T5 family on transformers: monoT5, duoT5, FLAN-T5 and whatever else is laid out so."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DynamicCache, EncoderDecoderCache

from rerank_ray.errors import ModelError
from rerank_ray.models import decoding, engine
from rerank_ray.models.continuations import continuation_ids, end_ids, label_ids
from rerank_ray.models.loading import load, load_adapted
from rerank_ray.models.output_layer import OutputLayer
from rerank_ray.models.protocol import Answer, Call, Failure, Generate, LogLikelihood, NextToken, Prompt, Result
from rerank_ray.models.resolve import resolve
from rerank_ray.models.scoring import columns_of, read_scores
from rerank_ray.models.tokenizing import PromptEncoder, PromptTooLongError
from rerank_ray.records import Usage
from rerank_ray.settings.models import HFSeq2SeqSettings

# Positions are relative in these, so that padding moves nothing.
T5_FAMILY = {"t5", "mt5", "umt5"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One call's tokens: the encoder's, what the decoder has written before it is asked, and what it is asked for."""

    call: Call
    prompt: list[int]
    begun: list[int]
    labels: Sequence[int] = ()
    continuation: Sequence[int] = ()

    @property
    def decoder_input(self) -> list[int]:
        return [*self.begun, *self.continuation[:-1]]

    @property
    def held(self) -> int:
        """Tokens the answer will take."""
        return self.call.max_tokens if isinstance(self.call, Generate) else 0


class HFSeq2Seq:
    """Answers `NextToken`, `LogLikelihood` and `Generate`.

    The encoder reads the prompt; a prefill, a continuation or a text is the decoder's. The decoder's rows are padded on
    the right without a mask, as a causal model's may be.
    """

    answers = frozenset({NextToken, LogLikelihood, Generate})
    tells_raw_logits = True
    exit_layer = None

    def __init__(self, settings: HFSeq2SeqSettings) -> None:
        resolved = resolve(settings)
        self.name = f"hf_seq2seq:{resolved.identity}"
        self.tokenizer = load(AutoTokenizer, resolved, settings)
        self.device = engine.pick_device(settings.device)
        dtype = engine.pick_dtype(settings.dtype, self.device)
        self.model = load_adapted(AutoModelForSeq2SeqLM, resolved, settings, dtype=dtype).to(self.device).eval()
        if self.model.config.model_type not in T5_FAMILY:
            raise ModelError(
                f"{settings.path}: model type '{self.model.config.model_type}' is none of {sorted(T5_FAMILY)}, "
                "the T5 family that hf_seq2seq runs"
            )
        self.parameters = engine.count_parameters(self.model)
        self.encoder = PromptEncoder(self.tokenizer, settings.max_length, chat=False)
        self.runner = engine.BatchRunner(settings.tokens_per_batch, self.device)
        self._ends = end_ids(self.tokenizer, self.model.generation_config)
        self._output = OutputLayer(self.model)
        self._labels = functools.lru_cache(functools.partial(label_ids, self.tokenizer))

    def check_labels(self, labels: tuple[str, ...], prompt: Prompt) -> None:
        """Raise `ModelError` unless every label is one token behind the prompt's prefill."""
        self._label_ids(labels, prompt)

    def _label_ids(self, labels: tuple[str, ...], prompt: Prompt) -> list[int]:
        return self._labels(labels, (prompt.prefill,) * len(labels))

    def check_fits(self, prompt: Prompt, max_tokens: int = 0) -> None:
        """Raise `ModelError` unless the prompt, each passage cut to a token, fits `max_length`; an answer is the
        decoder's, which has room of its own."""
        self.encoder.check_fits(replace(prompt, prefill=""), 0)

    def run(self, calls: Sequence[Call]) -> list[Result]:
        first = self.runner.first_pool(calls, self.encoder.max_length)
        return engine.in_pools(calls, self._encode, self._answer_pool, first=first)

    def _encode(self, calls: Sequence[Call]) -> list[_Row | Failure]:
        prompts = self.encoder.encode([replace(c.prompt, prefill="") for c in calls], [0] * len(calls))
        return [
            Failure(reason=str(prompt)) if isinstance(prompt, PromptTooLongError) else self._row(call, prompt)
            for call, prompt in zip(calls, prompts, strict=True)
        ]

    def _row(self, call: Call, prompt: list[int]) -> _Row:
        prefill, asked = call.prompt.prefill, {}
        begun = [self.model.config.decoder_start_token_id, *continuation_ids(self.tokenizer, "", prefill)]
        if isinstance(call, NextToken):
            asked["labels"] = self._label_ids(call.labels, call.prompt)
        if isinstance(call, LogLikelihood):
            asked["continuation"] = continuation_ids(self.tokenizer, prefill, call.continuation)
        return _Row(call=call, prompt=prompt, begun=begun, **asked)

    def _answer_pool(self, encoded: list[_Row | Failure]) -> list[Result]:
        results: list[Result | None] = [e if isinstance(e, Failure) else None for e in encoded]
        rows = {i: encoded[i] for i, r in enumerate(results) if r is None}
        # What a batch reads off logits is of one kind, so that none of it depends on its neighbours.
        for kind in (NextToken, LogLikelihood):
            self._run([i for i, row in rows.items() if isinstance(row.call, kind)], rows, results, self._score)
        # Texts of one batch begin at one step; a method's prefills are the same, so there are few lengths.
        for begun in {len(row.begun) for row in rows.values()}:
            texts = [i for i, row in rows.items() if isinstance(row.call, Generate) and len(row.begun) == begun]
            self._run(texts, rows, results, self._generate)
        return results

    def _run(
        self,
        chosen: list[int],
        rows: dict[int, _Row],
        results: list[Result | None],
        forward: Callable[[list[_Row]], list[Answer]],
    ) -> None:
        held = [rows[i].held for i in chosen]
        lengths = [len(rows[i].prompt) + len(rows[i].decoder_input) + h for i, h in zip(chosen, held, strict=True)]
        answers = self.runner.run(lengths, lambda batch: forward([rows[chosen[b]] for b in batch]), held)
        for i, answer in zip(chosen, answers, strict=True):
            results[i] = answer

    @torch.inference_mode()
    def _score(self, rows: list[_Row]) -> list[Answer]:
        # The logits after position p of the decoder's input predict the token behind it.
        spans = [range(len(r.begun) - 1, len(r.begun) + max(len(r.continuation) - 1, 0)) for r in rows]
        tokens, labels = None, [r.labels for r in rows]
        if isinstance(rows[0].call, NextToken):
            tokens, labels = columns_of(labels)
        with self._output.asked([i for i, s in enumerate(spans) for _ in s], [p for s in spans for p in s], tokens):
            logits = self._start(rows, cache=None)[0][0]
        starts = [0, *itertools.accumulate(map(len, spans[:-1]))]
        values = read_scores(logits, starts, labels, [r.continuation for r in rows])
        return [_answer(row, value, len(row.continuation)) for row, value in zip(rows, values, strict=True)]

    @torch.inference_mode()
    def _generate(self, rows: list[_Row]) -> list[Answer]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits, encoded, mask = self._start(rows, cache)
        state = _State(self.model, cache, encoded, mask)
        texts = decoding.generate(state, logits[:, -1], [r.call for r in rows], self.tokenizer, self._ends)
        return [
            _answer(row, t.text, len(t.tokens), cut_off=t.cut_off, log_probability=t.log_probability, tokens=t.tokens)
            for row, t in zip(rows, texts, strict=True)
        ]

    def _start(
        self, rows: list[_Row], cache: EncoderDecoderCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The decoder's logits [B, T, vocabulary], the encoder's states [B, L, hidden] and its mask [B, L]."""
        ids, lengths = engine.right_pad([r.prompt for r in rows], pad_id=0)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)
        longest = max(len(r.decoder_input) for r in rows)
        begun = torch.tensor([r.decoder_input + [0] * (longest - len(r.decoder_input)) for r in rows])
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask,
            decoder_input_ids=begun.to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.logits, output.encoder_last_hidden_state, mask


class _State:
    """A batch of texts that the decoder writes."""

    def __init__(self, model, cache: EncoderDecoderCache, encoded: torch.Tensor, mask: torch.Tensor) -> None:
        self._model, self._cache, self._encoded, self._mask = model, cache, encoded, mask

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self._model(
            encoder_outputs=(self._encoded,),
            attention_mask=self._mask,
            decoder_input_ids=tokens[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._encoded, self._mask = self._encoded[rows], self._mask[rows]


def _answer(row: _Row, value: tuple[float, ...] | str, output_tokens: int, **generated) -> Answer:
    usage = Usage(calls=1, prompt_tokens=len(row.prompt), output_tokens=output_tokens)
    return Answer(value=value, usage=usage, **generated)
