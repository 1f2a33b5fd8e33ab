"""Students from pretrained checkpoints, and from the folders that they were saved to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from rerank_ray.errors import ModelError
from rerank_ray.models.attention import GATED
from rerank_ray.models.loading import load
from rerank_ray.models.resolve import ResolvedModel, resolve
from rerank_ray.models.student.base import DESCRIPTION, HEADS, Student, StudentDescription
from rerank_ray.models.student.linear import LinearStudent
from rerank_ray.models.student.similarity import SimilarityStudent, is_gated
from rerank_ray.settings.distill import StudentHead
from rerank_ray.settings.models import ModelSettings


def is_student(resolved: ResolvedModel) -> bool:
    return resolved.folder is not None and (resolved.folder / DESCRIPTION).exists()


def load_student(settings: ModelSettings, *, max_query_length: int | None = None, dtype=torch.float32) -> Student:
    """Load a cross-encoder: a student of ours, or any sequence-classification checkpoint with one output.

    Raises:
        ModelError: the model is missing, has no trained head, or has several outputs.
    """
    resolved = resolve(settings)
    tokenizer = load(AutoTokenizer, resolved, settings)
    if is_student(resolved):
        return _load_described(resolved, settings, tokenizer, dtype)
    model, info = load(AutoModelForSequenceClassification, resolved, settings, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ModelError(
            f"{settings.path}: not a cross-encoder: the checkpoint has no weights for {sorted(info['missing_keys'])}, "
            "which would be random; use a sequence-classification checkpoint, or distil one"
        )
    if model.config.num_labels != 1:
        raise ModelError(f"{settings.path}: the head has {model.config.num_labels} outputs; a reranker's has one")
    max_length = min(settings.max_length, tokenizer.model_max_length)
    description = StudentDescription(
        head="linear",
        layers=(model.config.num_hidden_layers,),
        max_length=max_length,
        max_query_length=max_query_length or max_length // 2,
    )
    return LinearStudent(description, tokenizer, model).eval()


def _load_described(resolved: ResolvedModel, settings: ModelSettings, tokenizer, dtype) -> Student:
    folder = resolved.folder
    description = StudentDescription.model_validate_json((folder / DESCRIPTION).read_text())
    heads = load_file(folder / HEADS) if (folder / HEADS).exists() else {}
    if description.head == "linear":
        model = load(AutoModelForSequenceClassification, resolved, settings, dtype=dtype)
        student: Student = LinearStudent(description, tokenizer, model)
        student.early_heads.load_state_dict(heads)
        student.early_heads.to(dtype)
    else:
        backbone = load(AutoModel, resolved, settings, dtype=dtype, attn_implementation=GATED)
        student = SimilarityStudent(description, tokenizer, backbone, gate=0.0, scale=1.0, interaction=0.0)
        with torch.no_grad():
            for name, parameter in student.head_parameters().items():
                parameter.copy_(heads[name])
    return student.eval()


def new_student(
    settings: ModelSettings,
    *,
    head: StudentHead,
    layers: tuple[int, ...] | None,
    max_query_length: int,
    gate: float,
    scale: float | Sequence[float],
    interaction: float | Sequence[float],
) -> Student:
    """Start a student from a pretrained encoder: weights in float32, heads new.

    Args:
        layers: layers that get a head; None is the last only.
        scale: the similarity head's, one for all layers or one for each; `interaction` likewise.

    Raises:
        ModelError: a layer that the backbone does not have, or attention that the similarity head can't gate.
    """
    resolved = resolve(settings)
    tokenizer = load(AutoTokenizer, resolved, settings)
    if head == "linear":
        model = load(AutoModelForSequenceClassification, resolved, settings, dtype=torch.float32, num_labels=1)
    else:
        model = load(AutoModel, resolved, settings, dtype=torch.float32, attn_implementation=GATED)
    depth = model.config.num_hidden_layers
    layers = layers or (depth,)
    if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] != depth:
        raise ModelError(f"layers: {list(layers)}: give ascending layers of 1..{depth} that end with {depth}")
    description = StudentDescription(
        head=head, layers=layers, max_length=settings.max_length, max_query_length=max_query_length
    )
    if head == "linear":
        return LinearStudent(description, tokenizer, model)
    student = SimilarityStudent(description, tokenizer, model, gate=gate, scale=scale, interaction=interaction)
    if not is_gated(student):
        raise ModelError(
            f"{settings.path}: {type(model).__name__} does not use transformers' attention interface, so its attention "
            "can't be gated (BERT, RoBERTa, ELECTRA and ModernBERT kinds can); use head: linear"
        )
    return student
