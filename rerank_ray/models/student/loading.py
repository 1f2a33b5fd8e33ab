"""Students from pretrained checkpoints, and from the folders that they were saved to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PreTrainedModel,
)

from rerank_ray.errors import ModelError
from rerank_ray.models.attention import GATED
from rerank_ray.models.bi_encoder import check_modules, saved_pooling
from rerank_ray.models.hf_seq2seq import T5_FAMILY
from rerank_ray.models.instructed_pairs import DOCUMENT_PREFIX, QUERY_PREFIX
from rerank_ray.models.late_interaction import ColBERTModel, read_metadata
from rerank_ray.models.loading import refuse_random
from rerank_ray.models.positions import check_positions
from rerank_ray.models.student.base import HEADS, Student, StudentDescription, StudentPrompt, saved_description
from rerank_ray.models.student.decoder import DecoderStudent
from rerank_ray.models.student.linear import LinearStudent
from rerank_ray.models.student.mvp import MVPStudent
from rerank_ray.models.student.prompted import PromptedStudent
from rerank_ray.models.student.similarity import SimilarityStudent, is_gated
from rerank_ray.models.student.source import Source
from rerank_ray.models.student.t5_encoder import T5EncoderStudent
from rerank_ray.models.student.two_towers import BiEncoderStudent, ColBERTStudent
from rerank_ray.settings.models import ModelSettings
from rerank_ray.settings.student import StudentHead, StudentSettings

Heads = dict[str, torch.Tensor]
_WRAPPED = {r"^encoder\.encoder\.": "encoder.", r"^encoder\.block\.(\d+)\.module\.": r"encoder.block.\1."}
"""How MVP's authors call the encoder's weights, and what they are to transformers."""


def load_student(settings: ModelSettings, *, dtype=torch.float32, views: int | None = None) -> Student:
    """Load a cross-encoder: a student of ours, or any sequence-classification checkpoint with one output.

    Args:
        views: of a T5 that was trained as an MVP elsewhere, and whose folder does not tell.

    Raises:
        ModelError: the model is missing, has no trained head, or has several outputs; or its pairs stand in a chat
            template, which is not done here.
    """
    source = Source.open(settings)
    description = saved_description(source.resolved)
    _check_tokenizer(source, description.head if description is not None else "mvp" if views else "linear")
    if description is not None:
        if views is not None:
            raise ModelError(f"{settings.path}: views: a student of ours tells how many it has, if any: leave it out")
        return _READ[description.head](source, description, _saved_heads(source), dtype).eval()
    if views is not None:
        _check_is_t5(source)
        model = source.read(AutoModelForSeq2SeqLM, dtype, key_mapping=_WRAPPED)
        description = _describe_foreign("mvp", model, settings.max_length, views=views)
        return MVPStudent(description, source.tokenizer, model, settings.path).eval()
    if source.is_decoder and source.tokenizer.chat_template is not None:
        raise ModelError(
            f"{settings.path}: a decoder with a chat template, into which sentence-transformers puts its pairs, and "
            "which kind cross_encoder does not fill: use kind: scalar_head with its pairs' formats if it was trained "
            "on bare text, or method: yes_no with a language model that answers a prompt"
        )
    model, info = source.load(AutoModelForSequenceClassification, dtype, output_loading_info=True)
    refuse_random(
        info["missing_keys"],
        f"{settings.path}: not a cross-encoder",
        "; use a sequence-classification checkpoint, or distil one; of an MVP's checkpoint set views",
    )
    if model.config.num_labels != 1:
        raise ModelError(f"{settings.path}: the head has {model.config.num_labels} outputs; a reranker's has one")
    max_length = min(settings.max_length, source.tokenizer.model_max_length)
    check_positions(model, max_length, settings.path)
    description = _describe_foreign("linear", model, max_length)
    return _linear_class(source)(description, source.tokenizer, model).eval()


def new_student(settings: StudentSettings, prompt: StudentPrompt | None = None, *, weights: bool = True) -> Student:
    """Start a student from a pretrained model: weights in float32, heads new; from a student of ours with the same
    head, that head too.

    Args:
        prompt: of heads yes_no and token_logit.
        weights: without, no weight is read, and the student is good for finding what is wrong with it.

    Raises:
        ModelError: a head that the architecture can't carry, or a layer that it does not have; or a trained head of
            other layers.
    """
    source = Source.open(settings.model_settings(), weights=weights)
    _check_tokenizer(source, settings.head)
    student = _START[settings.head](source, settings, prompt)
    trained = saved_description(source.resolved)
    if trained is not None and trained.head == settings.head and (heads := _saved_heads(source)):
        _check_trained_head(trained, student.description, settings.base)
        if weights:
            student.load_head_tensors(heads)
    return student


def _saved_heads(source: Source) -> Heads:
    file = source.resolved.folder / HEADS
    return load_file(file) if file.exists() else {}


def _check_trained_head(trained: StudentDescription, wanted: StudentDescription, path: str) -> None:
    for name in ("layers", "branch_layers"):
        was, asked = getattr(trained, name), getattr(wanted, name)
        if was != asked:
            raise ModelError(
                f"{path}: is a student whose head {trained.head} was trained with {name}: {was}, and {asked} is asked "
                "for: give the same, or a copy of the folder without student.json, to train a new head"
            )


def _check_tokenizer(source: Source, head: StudentHead) -> None:
    """Texts that are read together are joined and cut here, by what the tokenizer tells of each token."""
    if not source.tokenizer.is_fast and head not in ("bi_encoder", "colbert"):
        raise ModelError(
            f"{source.settings.path}: head {head} needs a tokenizer that transformers runs with the tokenizers "
            f"library, and {type(source.tokenizer).__name__} is written in Python: take another model, or head: "
            "bi_encoder"
        )


def _linear_class(source: Source) -> type[LinearStudent]:
    return DecoderStudent if source.is_decoder else LinearStudent


def _start_linear(source: Source, settings: StudentSettings, _: None) -> Student:
    prefixes = ("query: ", "document: ") if source.is_decoder else ("", "")
    kind = source.config.model_type
    if settings.instruction is not None:
        if not source.is_decoder:
            raise ModelError(f"{settings.base}: a {kind} is no decoder, so no instruction can stand behind its pairs")
        prefixes = (QUERY_PREFIX, DOCUMENT_PREFIX)
    if source.is_seq2seq and kind not in T5_FAMILY:
        raise ModelError(
            f"{settings.base}: a {kind} is an encoder and a decoder, of which only T5's kind can have a linear head: "
            "use head: yes_no or token_logit"
        )
    if kind in T5_FAMILY:
        prefixes = ("Query: ", "Document: ")
        model = source.start(AutoModelForTextEncoding, settings.take_layers)
    else:
        model = source.start(AutoModelForSequenceClassification, settings.take_layers, num_labels=1)
    given = (settings.query_prefix, settings.document_prefix)
    query, document = (p if g is None else g for g, p in zip(given, prefixes, strict=True))
    description = _describe(
        settings,
        model.config.num_hidden_layers,
        query_prefix=query,
        document_prefix=document,
        instruction=settings.instruction,
    )
    if kind in T5_FAMILY:
        if settings.layers is not None:
            raise ModelError("layers: a T5 encoder has a head on its last layer only: leave it out")
        return T5EncoderStudent(description, source.tokenizer, model)
    student = _linear_class(source)(description, source.tokenizer, model)
    # A decoder's early heads read what its last norm gives, and it may be too large for a copy beside it.
    if source.weights and not source.is_decoder:
        _check_exits(student, settings.base, LinearStudent.forward)
    return student


@torch.no_grad()
def _check_exits(student: Student, path: str, read: Callable[..., Sequence[torch.Tensor]]) -> None:
    """Refuse an architecture that does more to its last layer's states than its earlier layers' heads are shown: the
    student that ends at one of them would have other scores than its head learnt to give.

    Args:
        read: of a student and a batch, what there is at each of its layers.
    """
    if len(student.layers) == 1:
        return
    inputs = student.collate(student.encode(["query"], ["document"]))
    expected = read(student.truncated(student.layers[0], alone=True), **inputs)
    if not torch.allclose(read(student, **inputs)[0], expected[0], rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{path}: layers: {type(student.pretrained).__name__} ends with more than its layers, so its earlier "
            "layers can't have heads: leave layers out"
        )


def _read_linear(source: Source, description: StudentDescription, heads: Heads, dtype: torch.dtype) -> Student:
    if source.config.model_type in T5_FAMILY:
        encoder = T5EncoderStudent(description, source.tokenizer, source.read(AutoModelForTextEncoding, dtype))
        encoder.load_head_tensors(heads)
        encoder.linear.to(dtype)
        return encoder
    model = source.read(AutoModelForSequenceClassification, dtype)
    student = _linear_class(source)(description, source.tokenizer, model)
    student.load_head_tensors(heads)
    student.early_heads.to(dtype)
    return student


def _start_similarity(source: Source, settings: StudentSettings, _: None) -> Student:
    if source.is_seq2seq or source.is_decoder:
        raise ModelError(f"{settings.base}: a {source.config.model_type} is no encoder: use head: yes_no or linear")
    model = source.start(AutoModel, settings.take_layers, attn_implementation=GATED)
    _check_branches(settings, getattr(model.config, "layer_types", None))
    student = SimilarityStudent(
        _describe(settings, model.config.num_hidden_layers),
        source.tokenizer,
        model,
        gate=settings.gate,
        scale=settings.scale,
        interaction=settings.interaction,
    )
    if source.weights and not is_gated(student):
        raise ModelError(
            f"{settings.base}: {type(model).__name__} does not use transformers' attention interface, so its attention "
            "can't be gated (BERT, RoBERTa, ELECTRA and ModernBERT kinds can); use head: linear"
        )
    if source.weights:
        _check_exits(student, settings.base, SimilarityStudent.states)
    return student


def _check_branches(settings: StudentSettings, types: Sequence[str] | None) -> None:
    """A branch's layers are called as those whose place they take, so must attend as those do."""
    own = settings.branch_layers
    for exit_layer in settings.layers[:-1] if own and types else ():
        if types[exit_layer - own : exit_layer] != types[-own:]:
            raise ModelError(
                f"{settings.base}: branch_layers: {own}: layers {exit_layer - own + 1} to {exit_layer} have other "
                f"attention than the last {own} ({types}), which can't take their place: leave branch_layers out"
            )


def _read_similarity(source: Source, description: StudentDescription, heads: Heads, dtype: torch.dtype) -> Student:
    backbone = source.read(AutoModel, dtype, attn_implementation=GATED)
    student = SimilarityStudent(description, source.tokenizer, backbone, gate=0.0, scale=1.0, interaction=0.0)
    student.load_head_tensors(heads)
    return student


def _start_prompted(source: Source, settings: StudentSettings, prompt: StudentPrompt) -> Student:
    if not source.is_seq2seq and not source.is_decoder:
        raise ModelError(
            f"{settings.base}: a {source.config.model_type} is no language model that goes on with a text, so "
            f"{settings.head} has nothing to read; use head: linear"
        )
    if source.is_seq2seq and source.config.decoder_start_token_id is None:
        raise ModelError(
            f"{settings.base}: a {source.config.model_type} has no token that every answer begins with "
            "(decoder_start_token_id; mBART's kinds begin with a language's): take a T5 or BART, or an encoder"
        )
    model = source.start(_language_model(source), settings.take_layers)
    description = _describe(settings, model.config.num_hidden_layers, prompt=prompt)
    student = PromptedStudent(description, source.tokenizer, model)
    (bare,) = student.encode(["a " * settings.max_query_length], [""])
    if len(bare["input_ids"]) > settings.max_length - 8:
        raise ModelError(
            f"max_length ({settings.max_length}) leaves no room for a document: the prompt and a query of "
            f"max_query_length take {len(bare['input_ids'])} tokens; raise max_length"
        )
    return student


def _read_prompted(source: Source, description: StudentDescription, _: Heads, dtype: torch.dtype) -> Student:
    return PromptedStudent(description, source.tokenizer, source.read(_language_model(source), dtype))


def _language_model(source: Source) -> type:
    return AutoModelForSeq2SeqLM if source.is_seq2seq else AutoModelForCausalLM


def _start_mvp(source: Source, settings: StudentSettings, _: None) -> Student:
    _check_is_t5(source)
    model = source.start(AutoModelForSeq2SeqLM, settings.take_layers)
    description = _describe(settings, model.config.num_hidden_layers, views=settings.views)
    return MVPStudent(description, source.tokenizer, model, settings.base)


def _check_is_t5(source: Source) -> None:
    kind = source.config.model_type
    if kind not in T5_FAMILY:
        raise ModelError(f"{source.settings.path}: a {kind} can't be an MVP, only {', '.join(sorted(T5_FAMILY))} can")


def _read_mvp(source: Source, description: StudentDescription, _: Heads, dtype: torch.dtype) -> Student:
    model = source.read(AutoModelForSeq2SeqLM, dtype)
    return MVPStudent(description, source.tokenizer, model, source.settings.path)


def _start_bi_encoder(source: Source, settings: StudentSettings, _: None) -> Student:
    if source.is_seq2seq:
        raise ModelError(f"{settings.base}: a {source.config.model_type} is no encoder: use head: linear")
    check_modules(source.resolved)
    model = source.start(AutoModel, settings.take_layers)
    prefixes = {"query_prefix": settings.query_prefix or "", "document_prefix": settings.document_prefix or ""}
    description = _describe(settings, model.config.num_hidden_layers, **prefixes)
    pooling = saved_pooling(source.resolved) or "mean"
    return BiEncoderStudent(description, source.tokenizer, model, pooling, settings.scale)


def _read_bi_encoder(source: Source, description: StudentDescription, heads: Heads, dtype: torch.dtype) -> Student:
    model = source.read(AutoModel, dtype)
    student = BiEncoderStudent(description, source.tokenizer, model, saved_pooling(source.resolved))
    student.load_head_tensors(heads)
    return student


def _start_colbert(source: Source, settings: StudentSettings, _: None) -> Student:
    if source.config.model_type != "bert":
        raise ModelError(f"{settings.base}: a ColBERT is a BERT with a linear layer, not a {source.config.model_type}")
    metadata = read_metadata(source.resolved)
    source.config.dim = metadata["dim"]
    model = source.start(ColBERTModel, settings.take_layers, config=source.config)
    description = _describe(settings, model.config.num_hidden_layers)
    return ColBERTStudent(description, source.tokenizer, model, metadata, settings.base, settings.scale)


def _read_colbert(source: Source, description: StudentDescription, heads: Heads, dtype: torch.dtype) -> Student:
    model = source.read(ColBERTModel, dtype)
    metadata, path = read_metadata(source.resolved), source.settings.path
    student = ColBERTStudent(description, source.tokenizer, model, metadata, path)
    student.load_head_tensors(heads)
    return student


_START = {
    "linear": _start_linear,
    "similarity": _start_similarity,
    "yes_no": _start_prompted,
    "token_logit": _start_prompted,
    "bi_encoder": _start_bi_encoder,
    "colbert": _start_colbert,
    "mvp": _start_mvp,
}
_READ = {
    "linear": _read_linear,
    "similarity": _read_similarity,
    "yes_no": _read_prompted,
    "token_logit": _read_prompted,
    "bi_encoder": _read_bi_encoder,
    "colbert": _read_colbert,
    "mvp": _read_mvp,
}


def _describe(settings: StudentSettings, depth: int, **more) -> StudentDescription:
    layers = settings.layers or (depth,)
    if list(layers) != sorted(set(layers)) or layers[-1] != depth:
        raise ModelError(f"layers: {list(layers)}: give ascending layers of 1..{depth} that end with {depth}")
    return StudentDescription(
        head=settings.head,
        layers=layers,
        max_length=settings.max_length,
        max_query_length=settings.max_query_length,
        branch_layers=settings.branch_layers,
        **more,
    )


def _describe_foreign(head: StudentHead, model: PreTrainedModel, max_length: int, **more) -> StudentDescription:
    return StudentDescription(
        head=head,
        layers=(model.config.num_hidden_layers,),
        max_length=max_length,
        max_query_length=max_length // 2,
        **more,
    )
