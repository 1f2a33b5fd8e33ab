"""What of a student is trained: all of it, parts of it, or low-rank adapters."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from rerank_ray.errors import ModelError
from rerank_ray.models.student import lora
from rerank_ray.models.student.base import Student
from rerank_ray.models.student.source import embeddings_of, layers_of
from rerank_ray.settings.student import FreezeSettings, StudentSettings


def adapt(student: Student, settings: StudentSettings) -> None:
    """Set dropout, freeze what is not trained, add adapters, leave out what no head reads, and switch packing and
    gradient checkpointing on.

    Raises:
        ModelError: more layers to freeze than there are, adapters that fit no layer, or nothing left to train.
    """
    if settings.dropout is not None:
        set_dropout(student, settings.dropout)
    student.make_packable()
    student.leave_out_what_is_not_read()
    _freeze(student.pretrained, settings.freeze)
    if settings.lora is not None:
        new = student.new_parameters()
        lora.add_adapters(student.pretrained, settings.lora, base=settings.base, revision=settings.revision)
        for parameter in new:
            parameter.requires_grad_(True)
        student.saves_adapter = settings.lora.save == "adapter"
    if settings.gradient_checkpointing:
        student.pretrained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not trained_parameters(student):
        raise ModelError("freeze: nothing is left to train")


# How architectures call a rate that they hand to `nn.functional` themselves.
_RATES = ("dropout", "attention_dropout", "attn_dropout", "hidden_dropout", "activation_dropout", "dropout_rate")


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set the rates of all of a model's dropout: of modules, and of attention that keeps a number (T5, OPT, Llama)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name in _RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)


def trained_parameters(student: Student) -> list[nn.Parameter]:
    return [p for p in student.parameters() if p.requires_grad]


def _freeze(model: PreTrainedModel, settings: FreezeSettings) -> None:
    if settings.embeddings:
        embeddings_of(model).requires_grad_(False)
    if settings.layers:
        layers = layers_of(model)
        if settings.layers > len(layers):
            raise ModelError(f"freeze.layers: {settings.layers}: the model has {len(layers)} layers")
        layers[: settings.layers].requires_grad_(False)
