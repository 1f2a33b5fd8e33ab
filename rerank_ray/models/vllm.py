"""Decoder LLMs run by vLLM in this process: paged attention, continuous batching and prefix caching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rerank_ray.errors import LostError, ModelError
from rerank_ray.models import engine
from rerank_ray.models.continuations import end_ids
from rerank_ray.models.loading import load
from rerank_ray.models.protocol import Answer, Call, Failure, Generate, LogLikelihood, NextToken, Prompt, Result
from rerank_ray.models.resolve import ResolvedModel, resolve
from rerank_ray.models.tokenizing import EncodedCall, PromptEncoder
from rerank_ray.records import Usage
from rerank_ray.settings.models import VLLMSettings


class VLLM:
    """Answers `Generate`, `NextToken` and `LogLikelihood`.

    Prompts become tokens here, as `hf_causal` makes them, and all calls go to the engine in one list, which it packs
    itself. Log-probabilities are the model's own, before temperature or penalties. vLLM does not read its prefix cache
    for the prompts of `LogLikelihood`, whose every position it has to compute.
    """

    answers = frozenset({Generate, NextToken, LogLikelihood})
    exit_layer = None

    def __init__(self, settings: VLLMSettings) -> None:
        """Start the engine.

        Raises:
            ModelError: vLLM is not installed, or the model is not there or nothing that it runs.
        """
        try:
            import vllm
        except ImportError as error:
            raise ModelError(f'kind vllm: {error}; try `pip install "rerank_ray[vllm]"`') from error
        resolved = resolve(settings)
        if resolved.gguf_file is not None:
            raise ModelError(f"{settings.path}: kind vllm runs safetensors checkpoints; GGUF files run with hf_causal")
        if resolved.adapter_file is not None:
            raise ModelError(
                f"{settings.path}: holds adapters alone, which kind vllm does not run: hf_causal does, or train with "
                "lora.save: merged"
            )
        self.name = f"vllm:{resolved.identity}"
        self.tokenizer = load(AutoTokenizer, resolved, settings)
        self.encoder = PromptEncoder(self.tokenizer, settings.max_length, settings.chat)
        config = load(AutoConfig, resolved, settings)
        self.parameters = _count_parameters(config, settings)
        # The engine generates a token for every call, also where only the prompt is scored: it gets a position of its
        # own, unless the model has no more.
        limit = getattr(config, "max_position_embeddings", None) or settings.max_length + 1
        if settings.max_length > limit:
            raise ModelError(
                f"{settings.path}: max_length is {settings.max_length}, but the model ends at {limit} tokens"
            )
        context = min(settings.max_length + 1, limit)
        self._reserved = settings.max_length + 1 - context
        self._ends = sorted(end_ids(self.tokenizer, GenerationConfig.from_model_config(config)))
        self._sampling_params = vllm.SamplingParams
        self._llm = vllm.LLM(max_model_len=context, **_engine_arguments(resolved, settings))

    def check_labels(self, labels: tuple[str, ...], prompt: Prompt) -> None:
        """Raise `ModelError` unless every label is one token behind the prompt."""
        self.encoder.label_ids(prompt, labels)

    def check_fits(self, prompt: Prompt, max_tokens: int = 0) -> None:
        """Raise `ModelError` unless the prompt, each passage cut to a token, and an answer fit `max_length`."""
        self.encoder.check_fits(prompt, max_tokens, self._reserved)

    def run(self, calls: Sequence[Call]) -> list[Result]:
        encoded = self.encoder.encode_calls(calls, self._reserved)
        results: list[Result | None] = [e if isinstance(e, Failure) else None for e in encoded]
        ready = [i for i, r in enumerate(results) if r is None]
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": [*encoded[i].prompt, *encoded[i].continuation]} for i in ready],
                [self._parameters(calls[i], encoded[i]) for i in ready],
                use_tqdm=False,
            )
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                # It is a process of its own, and stays dead.
                raise LostError(f"vLLM's engine died: {error}") from error
            raise
        for i, output in zip(ready, outputs, strict=True):
            results[i] = self._read(calls[i], encoded[i], output)
        return results

    def _parameters(self, call: Call, tokens: EncodedCall) -> Any:
        """vLLM's SamplingParams for a call."""
        if isinstance(call, Generate):
            return self._sampling_params(
                max_tokens=call.max_tokens,
                temperature=call.temperature,
                seed=call.seed if call.temperature > 0 else None,
                stop=list(call.stop),
                stop_token_ids=self._ends,
                logprobs=0,
            )
        if isinstance(call, NextToken):
            asked = {"logprob_token_ids": list(tokens.labels)}
        else:
            asked = {"prompt_logprobs": 0}
        return self._sampling_params(max_tokens=1, temperature=0.0, detokenize=False, **asked)

    def _read(self, call: Call, tokens: EncodedCall, output: Any) -> Result:
        completion, continuation = output.outputs[0], tokens.continuation
        if completion.finish_reason not in ("stop", "length"):
            # "abort" and "error" come with what was written until then.
            return Failure(reason=f"vLLM broke the answer off: finish_reason {completion.finish_reason!r}")
        generated, log_probability = 0, None
        if isinstance(call, Generate):
            # A template may have begun the model's reasoning for it.
            value = self.encoder.opened_reasoning(call.prompt) + completion.text
            generated = len(completion.token_ids)
            log_probability = completion.cumulative_logprob
        elif isinstance(call, NextToken):
            first = completion.logprobs[0]
            value = tuple(first[token].logprob for token in tokens.labels)
        else:
            positions = output.prompt_logprobs[len(output.prompt_token_ids) - len(continuation) :]
            value = tuple(p[token].logprob for p, token in zip(positions, continuation, strict=True))
        usage = Usage(
            calls=1,
            prompt_tokens=len(output.prompt_token_ids) - len(continuation),
            cached_tokens=output.num_cached_tokens or 0,
            output_tokens=generated or len(continuation),
        )
        cut_off = isinstance(call, Generate) and completion.finish_reason == "length"
        return Answer(value=value, usage=usage, cut_off=cut_off, log_probability=log_probability)


def _engine_arguments(resolved: ResolvedModel, settings: VLLMSettings) -> dict[str, Any]:
    arguments = {
        "model": resolved.source,
        "revision": resolved.revision,
        "tokenizer_revision": resolved.revision,
        "trust_remote_code": settings.trust_remote_code,
        "load_format": "auto" if settings.allow_pickle else "safetensors",
        "dtype": settings.dtype,
        "enable_prefix_caching": True,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": settings.enforce_eager,
        "seed": settings.seed,
    }
    if settings.tokens_per_batch is not None:
        arguments["max_num_batched_tokens"] = settings.tokens_per_batch
    if settings.max_num_seqs is not None:
        arguments["max_num_seqs"] = settings.max_num_seqs
    if settings.tensor_parallel_size > 1:
        # Inside a Ray actor vLLM would ask Ray for GPUs of its own; the actor's are all that it may use.
        arguments["distributed_executor_backend"] = "mp"
    return arguments


def _count_parameters(config: Any, settings: VLLMSettings) -> int:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    except ValueError as error:
        raise ModelError(f"{settings.path}: no decoder LLM: {str(error).splitlines()[0]}") from error
    return engine.count_parameters(model)
