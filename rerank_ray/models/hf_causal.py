"""Decoder LLMs on transformers: next-token logits and log-likelihoods, from safetensors or GGUF."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.loading import load
from rerank_ray.models.protocol import Answer, Call, Failure, LogLikelihood, NextToken, Result
from rerank_ray.models.resolve import resolve
from rerank_ray.models.tokenizing import PromptEncoder, PromptTooLongError, label_ids
from rerank_ray.records import Usage
from rerank_ray.settings.models import HFCausalSettings


class HFCausal:
    """Answers `NextToken` and `LogLikelihood`.

    Sequences are padded on the right and need no attention mask: a causal model's real tokens never see what follows
    them. Logits are computed only at the positions that some sequence of the batch is asked for.
    """

    answers = frozenset({NextToken, LogLikelihood})
    exit_layer = None

    def __init__(self, settings: HFCausalSettings) -> None:
        resolved = resolve(settings)
        self.name = f"hf_causal:{resolved.identity}"
        self.tokenizer = load(AutoTokenizer, resolved, settings)
        self.device = engine.pick_device(settings.device)
        dtype = engine.pick_dtype(settings.dtype, self.device)
        self.model = load(AutoModelForCausalLM, resolved, settings, dtype=dtype).to(self.device).eval()
        self.parameters = engine.count_parameters(self.model)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and settings.max_length > limit:
            raise ModelError(
                f"{settings.path}: max_length is {settings.max_length}, but the model ends at {limit} tokens"
            )
        self.encoder = PromptEncoder(self.tokenizer, settings.max_length, settings.chat)
        self.runner = engine.BatchRunner(settings.tokens_per_batch, self.device)
        self._label_ids: dict[tuple[str, ...], list[int]] = {}

    def check_labels(self, labels: tuple[str, ...]) -> None:
        """Raise `ModelError` unless every label is one token of this tokenizer."""
        if labels not in self._label_ids:
            self._label_ids[labels] = label_ids(self.tokenizer, labels)

    def run(self, calls: Sequence[Call]) -> list[Result]:
        continuations = [self._continuation(c) for c in calls]
        prompts = self.encoder.encode([c.prompt for c in calls], reserved=[len(c) for c in continuations])
        results: list[Result | None] = [
            Failure(reason=str(p)) if isinstance(p, PromptTooLongError) else None for p in prompts
        ]
        ready = [i for i, r in enumerate(results) if r is None]
        lengths = [len(prompts[i]) + len(continuations[i]) for i in ready]
        values = self.runner.run(
            lengths,
            lambda batch: self._forward(
                [(calls[i], prompts[i], continuations[i]) for i in map(ready.__getitem__, batch)]
            ),
        )
        for i, value in zip(ready, values, strict=True):
            usage = Usage(calls=1, prompt_tokens=len(prompts[i]), output_tokens=len(continuations[i]))
            results[i] = Answer(value=value, usage=usage)
        return results

    def _continuation(self, call: Call) -> list[int]:
        if isinstance(call, NextToken):
            self.check_labels(call.labels)
            return []
        return self.tokenizer(call.continuation, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _forward(self, batch: list[tuple[Call, list[int], list[int]]]) -> list[tuple[float, ...]]:
        ids, _ = engine.right_pad([prompt + continuation for _, prompt, continuation in batch], pad_id=0)
        # The logits after position p predict token p + 1: a prompt's last position, and each continuation token's but
        # the last.
        wanted = [range(len(p) - 1, len(p) + max(len(c) - 1, 0)) for _, p, c in batch]
        positions = sorted({p for span in wanted for p in span})
        row_of = {position: row for row, position in enumerate(positions)}
        output = self.model(
            input_ids=ids.to(self.device), use_cache=False, logits_to_keep=torch.tensor(positions, device=self.device)
        )
        return [
            self._value(call, continuation, output.logits[i, row_of[span[0]] : row_of[span[-1]] + 1])
            for i, ((call, _, continuation), span) in enumerate(zip(batch, wanted, strict=True))
        ]

    def _value(self, call: Call, continuation: list[int], logits: torch.Tensor) -> tuple[float, ...]:
        """Read one call's value off its logits [positions, vocabulary]."""
        if isinstance(call, NextToken):
            return tuple(logits[0, self._label_ids[call.labels]].float().tolist())
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        target = torch.tensor(continuation, device=logits.device)
        return tuple(log_probabilities.gather(1, target[:, None])[:, 0].tolist())
