"""Sentence encoders: query and document embedded apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import AutoModel, AutoTokenizer

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.acceleration import accelerate
from rerank_ray.models.embedding_cache import EmbeddingCache
from rerank_ray.models.loading import load, load_adapted, read_beside
from rerank_ray.models.positions import check_positions, position_limit
from rerank_ray.models.protocol import Answer, Embed, Failure, Result
from rerank_ray.models.resolve import ResolvedModel, resolve
from rerank_ray.settings.models import BiEncoderSettings

if TYPE_CHECKING:
    from rerank_ray.models.student.base import StudentDescription

_MODULES_FILE = "modules.json"
_MODULES = {"Transformer", "Pooling", "Normalize"}
_POOLING_FILE = "1_Pooling/config.json"
_POOLING_KEYS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}


class BiEncoder:
    """Answers `Embed` with unit-length embeddings."""

    answers = frozenset({Embed})
    exit_layer = None

    def __init__(self, settings: BiEncoderSettings) -> None:
        resolved = resolve(settings)
        check_modules(resolved)
        self.name = f"bi_encoder:{resolved.identity}"
        self.pooling = settings.pooling or saved_pooling(resolved) or "mean"
        student = _student(resolved)
        self.prefix = _prefixes(settings, student)
        self.tokenizer = load(AutoTokenizer, resolved, settings)
        self.device = engine.pick_device(settings.device)
        dtype = engine.pick_dtype(settings.dtype, self.device)
        model = load_adapted(AutoModel, resolved, settings, unread="pooler.", dtype=dtype)
        self.model = model.to(self.device).eval()
        self.max_length = _max_lengths(student, min(settings.max_length, self.tokenizer.model_max_length))
        check_positions(self.model, max(self.max_length.values()), settings.path)
        self._positions = position_limit(self.model)
        self.parameters = engine.count_parameters(self.model)
        accelerate(self.model, settings)
        self.runner = engine.BatchRunner(settings.tokens_per_batch, self.device)
        self.cache = EmbeddingCache(settings.cache_mb << 20)

    def run(self, calls: Sequence[Embed]) -> list[Result]:
        failures = [self._too_long(c) for c in calls]
        fitting = [call for call, failure in zip(calls, failures, strict=True) if failure is None]
        answers = iter(self.cache.answer(fitting, self._embed))
        return [next(answers) if failure is None else failure for failure in failures]

    def _too_long(self, call: Embed) -> Failure | None:
        """Why a text that must not be cut can't be embedded; None when it can."""
        if call.truncate:
            return None
        length = len(self.tokenizer(self.prefix[call.role] + call.text, verbose=False)["input_ids"])
        limit = self.max_length[call.role]
        if length <= limit:
            return None
        return Failure(reason=f"the text takes {length} tokens and the model {limit}: show it less")

    def _embed(self, calls: Sequence[Embed]) -> list[Answer]:
        return self.runner.answer(calls, self._encode, self._forward)

    def _encode(self, calls: Sequence[Embed]) -> list[list[int]]:
        ids: list[list[int]] = [[]] * len(calls)
        for role, limit in self.max_length.items():
            chosen = [i for i, call in enumerate(calls) if call.role == role]
            if not chosen:
                continue
            texts = [self.prefix[role] + calls[i].text for i in chosen]
            for i, tokens in zip(chosen, token_ids(self.tokenizer, texts, limit), strict=True):
                ids[i] = tokens
        return ids

    @torch.inference_mode()
    def _forward(self, sequences: list[list[int]]) -> list[tuple[float, ...]]:
        ids, lengths = engine.right_pad(sequences, self.tokenizer.pad_token_id or 0, limit=self._positions)
        vectors = embedded(self.model, ids.to(self.device), lengths.to(self.device), self.pooling)
        return [tuple(v) for v in vectors.tolist()]


def _student(resolved: ResolvedModel) -> StudentDescription | None:
    """How a bi-encoder student of ours was trained; None for other checkpoints."""
    from rerank_ray.models.student.base import saved_description

    student = saved_description(resolved)
    return student if student is not None and student.head == "bi_encoder" else None


def _prefixes(settings: BiEncoderSettings, student: StudentDescription | None) -> dict[str, str]:
    """What stands before a text of each role.

    Raises:
        ModelError: another prefix is asked for than the student was trained with.
    """
    prefixes = {}
    for role in ("query", "document"):
        name = f"{role}_prefix"
        prefixes[role] = given = getattr(settings, name)
        if student is not None:
            prefixes[role] = trained = getattr(student, name)
            if given not in ("", trained):
                raise ModelError(
                    f"{settings.path}: {name} is {given!r}, but this student was trained with {trained!r}: leave it out"
                )
    return prefixes


def _max_lengths(student: StudentDescription | None, given: int) -> dict[str, int]:
    """The tokens that a text of each role is cut to."""
    if student is None:
        return {"query": given, "document": given}
    return {"query": student.max_query_length, "document": student.max_length - student.max_query_length}


def token_ids(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """Each text's tokens, cut to `max_length`. An empty text is the token that ends texts where the tokenizer has no
    special tokens to put around it, as Qwen 2's has none: of nothing there is no vector."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
    return [ids or [end] for ids in tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]]


def embedded(model: torch.nn.Module, ids: torch.Tensor, lengths: torch.Tensor, pooling: str) -> torch.Tensor:
    """Unit vectors [B, H], in float32, of texts of `lengths` [B] tokens, from their token ids [B, L]."""
    mask = torch.arange(ids.shape[1], device=ids.device)[None, :] < lengths[:, None]
    hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
    if pooling == "mean":
        vectors = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
    elif pooling == "cls":
        vectors = hidden[:, 0]
    else:
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    return torch.nn.functional.normalize(vectors, dim=-1)


def check_modules(resolved: ResolvedModel) -> None:
    """Refuse a sentence-transformers checkpoint whose embeddings are not those of encoder and pooling alone.

    Raises:
        ModelError: naming the module that would be left out, for example the Dense layers of LaBSE.
    """
    text = read_beside(resolved, _MODULES_FILE)
    for module in json.loads(text or "[]"):
        kind = module["type"].rpartition(".")[2]
        if kind not in _MODULES:
            raise ModelError(
                f"{resolved.source}/{_MODULES_FILE}: module {module['path']!r} is a {kind}, without which embeddings "
                f"would be others; a bi-encoder here has {', '.join(sorted(_MODULES))} alone: use another checkpoint"
            )


def saved_pooling(resolved: ResolvedModel) -> str | None:
    """The pooling that sentence-transformers' files name, if the checkpoint has them.

    Raises:
        ModelError: a pooling this backend does not compute.
    """
    text = read_beside(resolved, _POOLING_FILE)
    return None if text is None else _read_pooling(text, f"{resolved.source}/{_POOLING_FILE}")


def _read_pooling(text: str, path: str) -> str:
    content = json.loads(text)
    if "pooling_mode" in content:
        modes = [content["pooling_mode"]]
    else:
        modes = [k for k, v in content.items() if k.startswith("pooling_mode_") and v]
    pooling = _POOLING_KEYS.get(modes[0], modes[0]) if len(modes) == 1 else None
    if pooling not in _POOLING_KEYS.values():
        raise ModelError(f"{path}: pooling {modes} is none of mean, cls, last; set pooling: to choose one")
    return pooling
