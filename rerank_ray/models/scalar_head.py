"""Decoders with a scalar head on the last token: RankLLaMA (Ma et al. 2023) and its kind, LoRA adapters included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.acceleration import accelerate
from rerank_ray.models.loading import load, refuse_random
from rerank_ray.models.output_layer import head_in_float32
from rerank_ray.models.packed_decoder import last_states, packs_in_scoring
from rerank_ray.models.positions import check_causal, check_positions
from rerank_ray.models.protocol import Pair, Result
from rerank_ray.models.resolve import ResolvedModel, resolve, resolve_adapter
from rerank_ray.models.student.lora import saved_names
from rerank_ray.models.text_tokens import TextTokens
from rerank_ray.settings.models import ScalarHeadSettings


class ScalarHead:
    """Answers `Pair` with the head's output at the pair's last token.

    The head reads the position that a pair ends at: which token stands for padding plays no part, so none has to be
    known.
    """

    answers = frozenset({Pair})
    exit_layer = None

    def __init__(self, settings: ScalarHeadSettings) -> None:
        resolved, adapter = resolve(settings), resolve_adapter(settings)
        self.name = f"scalar_head:{resolved.identity}" + (f"+{adapter.identity}" if adapter else "")
        self.settings = settings
        tokenizer = load(AutoTokenizer, resolved, settings)
        if not tokenizer.is_fast:
            raise ModelError(f"{settings.path}: needs a tokenizer that transformers runs with the tokenizers library")
        self.texts = TextTokens(tokenizer, max(settings.max_query_length, settings.max_document_length))
        self.device = engine.pick_device(settings.device)
        self.model = _load_model(resolved, adapter, settings, engine.pick_dtype(settings.dtype, self.device))
        self.model.to(self.device).eval()
        self.parameters = engine.count_parameters(self.model)
        accelerate(self.model.base_model, settings)
        check_positions(self.model, settings.max_length, settings.path)
        check_causal(self.model, settings.path, "use kind: bi_encoder")
        self._packs = packs_in_scoring(self.model, settings)
        self.runner = engine.BatchRunner(
            settings.tokens_per_batch, self.device, in_cache=engine.LLM_TOKENS_IN_CACHE, packed=self._packs
        )

    def run(self, calls: Sequence[Pair]) -> list[Result]:
        return self.runner.answer(calls, self.encode, self._forward)

    def encode(self, calls: Sequence[Pair]) -> list[list[int]]:
        """Token ids of each pair: formatted, cut apart, and joined by the tokenizer's own template for pairs."""
        # Braces in a text are text.
        heads = [self.settings.query_format.removesuffix("{query}") + c.query for c in calls]
        tails = [self.settings.document_format.removesuffix("{text}") + c.text for c in calls]
        encoded = []
        for head, tail in zip(self.texts.ids(heads), self.texts.ids(tails), strict=True):
            query = head[: self.settings.max_query_length]
            room = self.settings.max_length - self.texts.pair.length - len(query)
            document = tail[: min(self.settings.max_document_length, room)]
            encoded.append(self.texts.pair.fill(query, document)["input_ids"])
        return encoded

    @torch.inference_mode()
    def _forward(self, sequences: list[list[int]]) -> list[float]:
        states = last_states(self.model.base_model, sequences, packed=self._packs)
        return head_in_float32(self.model.score, states)[:, 0].tolist()


def _load_model(
    resolved: ResolvedModel, adapter: ResolvedModel | None, settings: ScalarHeadSettings, dtype: torch.dtype
) -> nn.Module:
    """The decoder with its head, adapter applied.

    Raises:
        ModelError: no decoder, no trained head, a head of several outputs, or an adapter that doesn't fit.
    """
    # A base model's config says two outputs, a default that nothing was trained for.
    outputs = {} if adapter is None else {"num_labels": 1}
    model, info = load(
        AutoModelForSequenceClassification, resolved, settings, dtype=dtype, output_loading_info=True, **outputs
    )
    if not isinstance(getattr(model, "score", None), nn.Module):
        raise ModelError(f"{settings.path}: {type(model).__name__} is no decoder with a scalar head; use cross_encoder")
    missing = set(info["missing_keys"])
    if adapter is None:
        refuse_random(missing, settings.path)
        if model.config.num_labels != 1:
            raise ModelError(f"{settings.path}: the head has {model.config.num_labels} outputs; a reranker's has one")
        return model
    try:
        refuse_random(missing - saved_names(adapter.source), f"{settings.path} with {settings.adapter}")
        tuned = PeftModel.from_pretrained(model, adapter.source)
        if getattr(tuned.active_peft_config, "use_dora", False) and not settings.merge_adapter:
            raise ModelError(
                f"{settings.adapter}: is of DoRA, which reads the weights that it adapts at every call, and their "
                "layout is changed here for speed: leave out merge_adapter: false"
            )
        return tuned.merge_and_unload() if settings.merge_adapter else tuned.get_base_model()
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{settings.adapter}: PEFT can't put this adapter on {settings.path}: {reason}") from error
