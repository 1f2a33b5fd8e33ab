"""Layer-wise decoder rerankers in FlagEmbedding's layout (bge-reranker-v2-minicpm-layerwise, Chen et al. 2024).

Their repositories ship code for transformers to run; nothing of it runs here. MiniCPM is Llama with its embeddings
multiplied by `scale_emb` and what each block adds by `scale_depth` / √layers: a Granite with these multipliers, under
the same weight names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoTokenizer, GraniteConfig, GraniteModel, PreTrainedConfig
from transformers.models.granite.modeling_granite import GranitePreTrainedModel

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.acceleration import accelerate
from rerank_ray.models.instructed_pairs import DOCUMENT_PREFIX, QUERY_PREFIX, InstructedPairs
from rerank_ray.models.loading import load, refuse_random
from rerank_ray.models.output_layer import head_in_float32
from rerank_ray.models.packed_decoder import last_states, packs_in_scoring
from rerank_ray.models.protocol import Pair, Result
from rerank_ray.models.resolve import ResolvedModel, resolve
from rerank_ray.settings.models import LayerwiseSettings

_MODEL_TYPES = ("minicpm", "llama")
_COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id"),
)


class _Head(nn.Module):
    """A linear map to one number, under the name that the checkpoints give it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_head = nn.Linear(hidden_size, 1, bias=False)


class _LayerwiseModel(GranitePreTrainedModel):
    """The layers up to the exit, the norm and the exit's head; everything else of a checkpoint is left where it is."""

    _keys_to_ignore_on_load_unexpected = (r"^model\.layers\.", r"^lm_head\.")

    def __init__(self, config: GraniteConfig) -> None:
        super().__init__(config)
        self.model = GraniteModel(config)
        self.lm_head: nn.Module = _Head(config.hidden_size)
        if config.head_index is not None:
            self.lm_head = nn.ModuleDict({str(config.head_index): self.lm_head})
        self.post_init()

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Scores [B] of the normed hidden states [B, H] at the pairs' last tokens."""
        head = self.lm_head if self.config.head_index is None else self.lm_head[str(self.config.head_index)]
        return head_in_float32(head.linear_head, states)[:, 0]


class Layerwise:
    """Answers `Pair` with head_n(norm(hidden states after n layers)) at the last token, n the exit layer."""

    answers = frozenset({Pair})

    def __init__(self, settings: LayerwiseSettings) -> None:
        resolved = resolve(settings)
        self.name = f"layerwise:{resolved.identity}"
        config = _config(resolved, settings)
        self.exit_layer = config.num_hidden_layers
        tokenizer = load(AutoTokenizer, resolved, settings)
        self.pairs = InstructedPairs(tokenizer, settings.instruction, settings.max_length, None, settings.path)
        self.device = engine.pick_device(settings.device)
        dtype = engine.pick_dtype(settings.dtype, self.device)
        model, info = load(_LayerwiseModel, resolved, settings, config=config, dtype=dtype, output_loading_info=True)
        refuse_random(info["missing_keys"], settings.path)
        self.model = model.to(self.device).eval()
        self.parameters = engine.count_parameters(self.model)
        accelerate(self.model, settings)
        self._packs = packs_in_scoring(self.model, settings)
        self.runner = engine.BatchRunner(
            settings.tokens_per_batch, self.device, in_cache=engine.LLM_TOKENS_IN_CACHE, packed=self._packs
        )

    def run(self, calls: Sequence[Pair]) -> list[Result]:
        return self.runner.answer(calls, self._encode, self._forward)

    def _encode(self, calls: Sequence[Pair]) -> list[list[int]]:
        return self.pairs.encode([QUERY_PREFIX + c.query for c in calls], [DOCUMENT_PREFIX + c.text for c in calls])

    @torch.inference_mode()
    def _forward(self, sequences: list[list[int]]) -> list[float]:
        states = last_states(self.model.model, sequences, packed=self._packs)
        return self.model.score(states).tolist()


def _config(resolved: ResolvedModel, settings: LayerwiseSettings) -> GraniteConfig:
    """The config of the layers up to the exit.

    Raises:
        ModelError: no such exit, or a kind of checkpoint that is not read here.
    """
    published, _ = PreTrainedConfig.get_config_dict(**resolved.pretrained_arguments)
    kind, depth, first = (published.get(key) for key in ("model_type", "num_hidden_layers", "start_layer"))
    if kind not in _MODEL_TYPES or first is None:
        raise ModelError(
            f"{settings.path}: not a layer-wise checkpoint in FlagEmbedding's layout: its config needs start_layer and "
            f"model_type {' or '.join(_MODEL_TYPES)}, and has start_layer {first} and model_type {kind}"
        )
    if published.get("head_type") != "simple" or published.get("rope_scaling"):
        raise ModelError(
            f"{settings.path}: head_type {published.get('head_type')!r} with rope_scaling "
            f"{published.get('rope_scaling')}: only head_type 'simple' without rope_scaling is supported"
        )
    exit_layer = settings.exit_layer or depth
    if not first <= exit_layer <= depth:
        raise ModelError(f"exit_layer: {exit_layer}: this model has heads on layers {first} to {depth}")
    limit = published.get("max_position_embeddings", 2048)
    if settings.max_length > limit:
        raise ModelError(f"{settings.path}: max_length is {settings.max_length}, but the model ends at {limit} tokens")
    rope = published.get("rope_parameters") or {"rope_type": "default", "rope_theta": published.get("rope_theta", 1e4)}
    scaled = kind == "minicpm"
    return GraniteConfig(
        **{key: published[key] for key in _COPIED if key in published},
        num_hidden_layers=exit_layer,
        rope_parameters=rope,
        embedding_multiplier=published.get("scale_emb", 1.0) if scaled else 1.0,
        residual_multiplier=published.get("scale_depth", 1.0) / math.sqrt(depth) if scaled else 1.0,
        attention_multiplier=(published["hidden_size"] // published["num_attention_heads"]) ** -0.5,
        head_index=exit_layer - first if published.get("head_multi") else None,
    )
