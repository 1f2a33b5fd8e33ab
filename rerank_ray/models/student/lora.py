"""Low-rank adapters by PEFT: put on a transformers model in place, saved merged or alone."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from rerank_ray.errors import ModelError
from rerank_ray.settings.student import LoraSettings

_PREFIX = "base_model.model."
"""Of every name in PEFT's files."""


def add_adapters(model: PreTrainedModel, settings: LoraSettings, *, base: str, revision: str | None) -> None:
    """Freeze the model, all but what its checkpoint did not have, and put adapters on its linear layers.

    Raises:
        ModelError: a wanted layer is not there.
    """
    targets = _targets(model, settings.target_modules)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in model.new_names)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
        target_modules=targets,
        base_model_name_or_path=base,
        revision=revision,
    )
    kept = {id(p) for p in model.parameters() if p.requires_grad}
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if id(parameter) in kept:
            parameter.requires_grad_(True)


def _targets(model: PreTrainedModel, wanted: tuple[str, ...] | None) -> list[str]:
    """Full names of the linear layers, among the model's numbered ones, that end as wanted."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(r"\.\d+\.", n)]
    there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    for end in wanted or ():
        if not any(f".{name}".endswith(f".{end}") for name in names):
            raise ModelError(f"lora.target_modules: no linear layer is called {end!r}; there are {there or 'none'}")
    targets = [n for n in names if wanted is None or any(f".{n}".endswith(f".{end}") for end in wanted)]
    if not targets:
        raise ModelError(f"lora: {type(model).__name__} has no linear layers that adapters could be put on")
    return targets


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapters added to its weights: a float32 copy, or the model itself when it has none."""
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return model
    # In the CPU's memory: beside the model there may be no room for a second one on its GPU. In float32: at a low rate
    # most of what was learnt is less than half a step of bfloat16 weights, which adding it to them would round away.
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, {number: _on_cpu(t) for number, t in tensors.items()})
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.get_base_layer())
    return model


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    copied = tensor.detach().to("cpu", dtype, copy=True)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write adapters, and whatever else of the model is trained, in PEFT's layout."""
    heads = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    config = copy.copy(model.peft_config["default"])
    prefix = f"{model.base_model_prefix}."
    config.modules_to_save = sorted({name.removeprefix(prefix).partition(".")[0] for name in heads}) or None
    config.inference_mode = True
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(model) | heads
    tensors = {f"{_PREFIX}{name}": tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)


def saved_names(folder: Path | str) -> set[str]:
    """What a folder of adapters holds, whole layers such as a head among it, by its name in the model."""
    return {name.removeprefix(_PREFIX) for name in load_peft_weights(str(folder), device="cpu")}


def with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A base model with the adapters of a folder added to its weights."""
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
