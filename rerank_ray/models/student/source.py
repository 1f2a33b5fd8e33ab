"""Where a student's weights come from, and its layers told apart."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from rerank_ray.errors import ModelError
from rerank_ray.models.loading import load, load_adapted, load_with_missing
from rerank_ray.models.positions import check_positions
from rerank_ray.models.resolve import ResolvedModel, resolve
from rerank_ray.models.student.base import saved_description
from rerank_ray.settings.models import ModelSettings

_OF_EACH_LAYER = ("layer_types", "no_rope_layers", "attention_window")
"""What configs list by layer: attention's kind, SmolLM3's layers without positions, Longformer's windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint: how it is loaded, its config and its tokenizer."""

    settings: ModelSettings
    resolved: ResolvedModel
    config: PreTrainedConfig
    tokenizer: Any
    weights: bool = True
    """Without, `start` gives a model of the architecture on the meta device: names and shapes, and nothing read."""

    @classmethod
    def open(cls, settings: ModelSettings, *, weights: bool = True) -> Source:
        resolved = resolve(settings)
        config, tokenizer = load(AutoConfig, resolved, settings), load(AutoTokenizer, resolved, settings)
        student = saved_description(resolved)
        if tokenizer.chat_template is None and student is not None:
            tokenizer.chat_template = student.chat_template
        return cls(settings=settings, resolved=resolved, config=config, tokenizer=tokenizer, weights=weights)

    @property
    def is_seq2seq(self) -> bool:
        return bool(self.config.is_encoder_decoder)

    @property
    def is_decoder(self) -> bool:
        """A causal language model; encoders, some of which can be run as one, have a masked one too."""
        kind = self.config.model_type
        causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        return causal and not self.is_seq2seq

    def load(self, auto_class, dtype: torch.dtype, **arguments) -> PreTrainedModel:
        return load(auto_class, self.resolved, self.settings, dtype=dtype, **arguments)

    def read(self, auto_class, dtype: torch.dtype, **arguments) -> PreTrainedModel:
        """A saved student's model; adapters that were saved alone are added to the model they are for."""
        arguments = {"config": self.config} | arguments if self.resolved.adapter_file else arguments
        return load_adapted(auto_class, self.resolved, self.settings, dtype=dtype, **arguments)

    def start(self, auto_class, layers: int | Sequence[int] | None, **arguments) -> PreTrainedModel:
        """The pretrained weights in float32, for training; `new_names` of it are the parameters they did not have.

        Args:
            layers: those to take, `take_layers` of the settings.

        Raises:
            ModelError: they are not those of the architecture that the config names, or lack a layer.
        """
        missing: Collection[str] = ()
        if not self.weights:
            model = self._skeleton(auto_class, **arguments)
        elif self.resolved.adapter_file:
            # What a config says can't be said beside it.
            config = copy.deepcopy(arguments.pop("config", self.config))
            config.num_labels = arguments.pop("num_labels", config.num_labels)
            of_base = {"config": config, "dtype": torch.float32} | arguments
            model, missing = load_with_missing(auto_class, self.resolved, self.settings, **of_base)
        else:
            model, info = self.load(auto_class, torch.float32, output_loading_info=True, **arguments)
            missing = info["missing_keys"]
        stack = {f"{prefix}.{name}" for prefix, module in _layer_lists(model) for name, _ in module.named_parameters()}
        if lost := sorted(stack & set(missing)):
            raise ModelError(
                f"{self.settings.path}: the checkpoint has no weights for {len(lost)} parameters of its layers "
                f"({lost[0]}, …), which would be random: its weights are of another architecture than its config, "
                f"{type(model).__name__}"
            )
        check_positions(model, self.settings.max_length, self.settings.path)
        # Weights that were stored packed (GGUF) are not any more.
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
        model.new_names = frozenset(missing)
        if layers is not None:
            chosen = _chosen(layers, len(layers_of(model)))
            take_layers(model, chosen)
            _check_made_again(model, chosen)
        return model

    def _skeleton(self, auto_class, *, num_labels: int | None = None, config=None, **arguments) -> PreTrainedModel:
        config = copy.deepcopy(config or self.config)
        if num_labels is not None:
            config.num_labels = num_labels
        try:
            with torch.device("meta"):
                if issubclass(auto_class, PreTrainedModel):
                    return auto_class(config)
                return auto_class.from_config(config, trust_remote_code=self.settings.trust_remote_code, **arguments)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{self.settings.path}: {auto_class.__name__} can't load this model: {reason}") from error


def _chosen(layers: int | Sequence[int], depth: int) -> Sequence[int]:
    chosen = range(layers, depth + 1, layers) if isinstance(layers, int) else layers
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[-1] > depth:
        raise ModelError(f"take_layers: {layers}: give ascending layers of 1..{depth}, or a number up to {depth}")
    return chosen


def _check_made_again(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Refuse layers that transformers would make otherwise when it reads the model that was saved: some are what they
    are by their number."""
    try:
        with torch.device("meta"):
            again = type(model)(type(model.config).from_dict(model.config.to_dict()))
        reason = _first_difference(layers_of(model), layers_of(again))
    except (ValueError, AssertionError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
    if reason is not None:
        raise ModelError(
            f"take_layers: {list(layers)}: {type(model).__name__} would compute otherwise once it is saved and loaded, "
            f"since it makes some layers by their number ({reason}): take others, such as the first ones"
        )


def _first_difference(ours: nn.ModuleList, theirs: nn.ModuleList) -> str | None:
    """What distinguishes two lists of layers beside their weights' values; None when nothing does."""
    one, other = _made_of(ours), _made_of(theirs)
    names = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
    return names[0] if names else None


def _made_of(layers: nn.ModuleList) -> dict[str, object]:
    """The shapes of the layers' parameters, and the plain values that their modules keep, by name."""
    values = {name: tuple(parameter.shape) for name, parameter in layers.named_parameters()}
    for name, module in layers.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and key != "training" and not key.startswith("_"):
                values[f"{name}.{key}"] = value
    return values


def _layer_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of an encoder or a decoder, from the first to the last.

    Raises:
        ModelError: the architecture does not keep them in one list.
    """
    owner, name = _stack(model)
    return getattr(owner, name)


def embeddings_of(model: PreTrainedModel) -> nn.Module:
    """The embeddings of tokens, and what else the architecture keeps with them."""
    return getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm that the states after the last layer have passed, and those after earlier layers have not; None in
    encoders of BERT's kind, whose layers end with one of their own."""
    base = model.base_model
    names = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f")
    return next((getattr(base, n) for n in names if isinstance(getattr(base, n, None), nn.Module)), None)


def keep_layers(model: PreTrainedModel, count: int) -> None:
    """Remove every layer above the first `count` from a transformers model and its config."""
    take_layers(model, range(1, count + 1))


def take_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Leave only these layers, counted from 1 and ascending, in a transformers model and its config."""
    owner, name = _stack(model)
    whole = getattr(owner, name)
    taken = nn.ModuleList(whole[n - 1] for n in layers)
    renumber(taken, first=0)
    setattr(owner, name, taken)
    for config in {id(c): c for c in (model.config, model.base_model.config)}.values():
        config.num_hidden_layers = len(taken)
        for option in _OF_EACH_LAYER:
            # Not what an architecture works out from others, as Jamba its kinds of layers.
            values = vars(config).get(option)
            if isinstance(values, list | tuple) and len(values) == len(whole):
                setattr(config, option, [values[n - 1] for n in layers])


def renumber(layers: nn.ModuleList, first: int) -> None:
    """Tell layers which numbers, counted from 0, they have in their model."""
    for index, layer in enumerate(layers, start=first):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def _stack(model: PreTrainedModel) -> tuple[nn.Module, str]:
    base = model.base_model
    stack = getattr(base, "encoder", base)
    names = ("layer", "layers", "block", "h")
    name = next((n for n in names if isinstance(getattr(stack, n, None), nn.ModuleList)), None)
    if name is None:
        raise ModelError(f"{type(model).__name__}: can't tell its layers apart, so none can be removed or chosen")
    return stack, name
