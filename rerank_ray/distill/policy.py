"""A decoder LLM in training: it draws answers as the engine does for any ranker, and tells their probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.continuations import turn_end
from rerank_ray.models.decoding import log_probabilities
from rerank_ray.models.hf_causal import HFCausal
from rerank_ray.models.protocol import Prompt
from rerank_ray.models.student import lora
from rerank_ray.models.student.base import save_tokenizer
from rerank_ray.models.student.source import Source
from rerank_ray.settings.reinforce import PolicySettings


class Policy(nn.Module):
    """A causal language model and its adapters; `backend` writes with the weights as they are.

    On disk it is an ordinary `AutoModelForCausalLM`, which any `hf_causal` ranker can run, or its adapters in PEFT's
    layout. A base that is adapters itself, as a student of an earlier stage may be, keeps them below those trained.
    """

    def __init__(self, settings: PolicySettings) -> None:
        """Raises `ModelError` where the base is no causal language model, or has layers that see only what is near."""
        super().__init__()
        self.settings = settings
        model_settings = settings.model_settings()
        source = Source.open(model_settings)
        if not source.is_decoder:
            raise ModelError(f"{settings.base}: a {source.config.model_type} is no causal language model")
        model = _start(source)
        if model.new_names:
            raise ModelError(f"{settings.base}: the checkpoint has no weights for {sorted(model.new_names)[0]}")
        _check_attention(model, settings)
        device = engine.pick_device("auto")
        self.dtype = engine.pick_dtype(settings.dtype, device)
        if settings.lora is not None:
            for parameter in model.parameters():
                # Buffers stay: rotary frequencies in bfloat16 are other positions, a few hundred tokens on.
                parameter.data = parameter.data.to(self.dtype)
            lora.add_adapters(model, settings.lora, base=settings.base, revision=settings.revision)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = model.to(device).eval()
        self.tokenizer = source.tokenizer
        self.backend = HFCausal(model_settings, self.model, self.tokenizer)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    @property
    def device(self) -> torch.device:
        return self.backend.device

    def turn_end(self, prompt: Prompt) -> int:
        """The token that ends the model's turn after this prompt.

        Raises:
            ModelError: the tokenizer has none.
        """
        chat = turn_end(self.tokenizer) if prompt.chat and self.backend.encoder.chat else None
        end = self.tokenizer.eos_token_id if chat is None else chat
        if end is None:
            raise ModelError(f"{self.settings.base}: the tokenizer has no token that ends a text")
        return end

    @property
    def pretrained(self) -> PreTrainedModel:
        return self.model

    def new_parameters(self) -> list[nn.Parameter]:
        return []

    def autocast(self) -> torch.autocast:
        """For weights that are trained whole: float32, computed in `dtype`."""
        enabled = self.settings.lora is None and self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def log_probabilities(
        self, prompt: Sequence[int], texts: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> torch.Tensor:
        """Natural-log probabilities [Σ tokens] of the tokens of texts, each on its own behind the prompt.

        All stand in one row, where the prompt is computed once: a text's tokens take the positions behind the prompt,
        and see the prompt and their own text alone.
        """
        start, ids, owner, positions, predicted_at = len(prompt), list(prompt), [-1] * len(prompt), [], []
        positions.extend(range(start))
        for number, text in enumerate(texts):
            predicted_at += [start - 1, *range(len(ids), len(ids) + len(text) - 1)]
            positions += range(start, start + len(text))
            owner += [number] * len(text)
            ids += text
        with self.autocast():
            logits = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                # One text needs no mask of ours, and attention's fused kernels take none.
                attention_mask=self._mask(owner) if len(texts) > 1 else None,
                logits_to_keep=torch.tensor(predicted_at, device=self.device),
                use_cache=False,
            ).logits[0]
        return log_probabilities(logits.float() / temperature, torch.tensor(ids[start:], device=self.device))

    def _mask(self, owner: Sequence[int]) -> torch.Tensor:
        """What is added to attention [1, 1, T, T] between tokens; `owner` is each one's text, or −1 for the prompt."""
        of = torch.tensor(owner, device=self.device)
        seen = (of[None, :] == of[:, None]) | (of[None, :] < 0)
        seen &= torch.ones_like(seen).tril()
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[None, None]

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The model as it was before training."""
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.settings.lora is not None and self.settings.lora.save == "adapter":
            lora.save_adapter(self.model, folder)
        else:
            lora.merged(self.model).save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)


def _start(source: Source) -> PreTrainedModel:
    """The base in float32; where the folder holds adapters alone, they are added to the model that they are for."""
    if source.resolved.adapter_file is None:
        return source.start(AutoModelForCausalLM, None)
    model = source.read(AutoModelForCausalLM, torch.float32)
    model.new_names = frozenset()
    return model


def _check_attention(model: PreTrainedModel, settings: PolicySettings) -> None:
    """Raise `ModelError` unless every token sees all before it: what answers in one row see is set by a mask."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ModelError(f"{settings.base}: {type(model).__name__} has layers without full attention")
    if "sliding_attention" in kinds and window < settings.max_length:
        raise ModelError(
            f"{settings.base}: the model's layers see {window} tokens back, and max_length is {settings.max_length}: "
            "lower it"
        )
