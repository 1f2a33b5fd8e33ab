"""ColBERT: one embedding a token (Khattab & Zaharia 2020; Santhanam et al. 2022), in the layout of its checkpoints."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertPreTrainedModel

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.acceleration import accelerate
from rerank_ray.models.embedding_cache import EmbeddingCache
from rerank_ray.models.loading import load, read_beside, refuse_random
from rerank_ray.models.protocol import Answer, EmbedTokens, Result
from rerank_ray.models.resolve import ResolvedModel, resolve
from rerank_ray.settings.models import ColBERTSettings

METADATA = "artifact.metadata"
# Of checkpoints without metadata: what ColBERT's own code takes.
_DEFAULTS = {
    "query_token_id": "[unused0]",
    "doc_token_id": "[unused1]",
    "query_maxlen": 32,
    "doc_maxlen": 220,
    "dim": 128,
    "mask_punctuation": True,
    "attend_to_mask_tokens": False,
    "similarity": "cosine",
}


class ColBERTModel(BertPreTrainedModel):
    """BERT and a linear layer, under the checkpoints' weight names; the pooler that they hold is not used."""

    _keys_to_ignore_on_load_unexpected = (r"^bert\.pooler\.",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.linear = nn.Linear(config.hidden_size, config.dim, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, L, dim] in float32."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.normalize(self.linear(hidden).float(), dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """Token ids of a text, how many of them (from the first) are attended to, and which ones' embeddings are kept."""

    ids: list[int]
    attended: int
    kept: list[int]


class TextEncoder:
    """Texts to tokens in a checkpoint's own format.

    A query is `[CLS] [Q] tokens [SEP]` filled up with `[MASK]` to its full length: the masks look at the query, are not
    looked at (unless the checkpoint was trained so), and their embeddings count. A document is `[CLS] [D] tokens [SEP]`
    without the embeddings of punctuation.
    """

    def __init__(self, tokenizer, metadata: dict, path: str, *, query_length: int, document_length: int) -> None:
        if min(query_length, document_length) < 4:
            raise ModelError(f"{path}: max_query_length and max_document_length need at least 4 tokens")
        self.tokenizer = tokenizer
        self.length = {"query": query_length, "document": document_length}
        self.attend_to_masks = metadata["attend_to_mask_tokens"]
        self.marker = {
            role: self._marker(metadata[key], path)
            for role, key in (("query", "query_token_id"), ("document", "doc_token_id"))
        }
        symbols = self._ids(list(string.punctuation)) if metadata["mask_punctuation"] else []
        self.skipped = frozenset(ids[0] for ids in symbols if ids)

    def encode(self, texts: Sequence[str], roles: Sequence[str]) -> list[EncodedText]:
        return [self._encode(ids, role) for ids, role in zip(self._ids(list(texts)), roles, strict=True)]

    def _encode(self, ids: list[int], role: str) -> EncodedText:
        full = self.length[role]
        ids = [self.tokenizer.cls_token_id, self.marker[role], *ids[: full - 3], self.tokenizer.sep_token_id]
        if role == "document":
            kept = [i for i, token in enumerate(ids) if token not in self.skipped]
            return EncodedText(ids=ids, attended=len(ids), kept=kept)
        masks = [self.tokenizer.mask_token_id] * (full - len(ids))
        attended = full if self.attend_to_masks else len(ids)
        return EncodedText(ids=ids + masks, attended=attended, kept=list(range(full)))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _marker(self, token: str, path: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ModelError(
                f"{path}: the tokenizer lacks {token}, which marks queries or documents in this checkpoint"
            )
        return token_id


class ColBERT:
    """Answers `EmbedTokens`."""

    answers = frozenset({EmbedTokens})
    exit_layer = None

    def __init__(self, settings: ColBERTSettings) -> None:
        resolved = resolve(settings)
        self.name = f"colbert:{resolved.identity}"
        metadata = read_metadata(resolved)
        self.tokenizer = load(AutoTokenizer, resolved, settings)
        self.tokens = TextEncoder(
            self.tokenizer,
            metadata,
            settings.path,
            query_length=min(settings.max_query_length or metadata["query_maxlen"], settings.max_length),
            document_length=min(settings.max_document_length or metadata["doc_maxlen"], settings.max_length),
        )
        self.device = engine.pick_device(settings.device)
        dtype = engine.pick_dtype(settings.dtype, self.device)
        config = load(BertConfig, resolved, settings)
        config.dim = metadata["dim"]
        model, info = load(ColBERTModel, resolved, settings, config=config, dtype=dtype, output_loading_info=True)
        refuse_random(info["missing_keys"], settings.path, ": it is no ColBERT checkpoint")
        lengths = self.tokens.length
        if max(lengths.values()) > config.max_position_embeddings:
            raise ModelError(
                f"{settings.path}: max_query_length {lengths['query']} or max_document_length {lengths['document']} is"
                f" beyond the model's {config.max_position_embeddings} tokens"
            )
        self.model = model.to(self.device).eval()
        self.parameters = engine.count_parameters(self.model)
        accelerate(self.model, settings)
        self.runner = engine.BatchRunner(settings.tokens_per_batch, self.device)
        self.cache = EmbeddingCache(settings.cache_mb << 20)

    def run(self, calls: Sequence[EmbedTokens]) -> list[Result]:
        return self.cache.answer(calls, self._embed)

    def _embed(self, calls: Sequence[EmbedTokens]) -> list[Answer]:
        return self.runner.answer(calls, self._encode, self._forward, length=lambda text: len(text.ids))

    def _encode(self, calls: Sequence[EmbedTokens]) -> list[EncodedText]:
        return self.tokens.encode([c.text for c in calls], [c.role for c in calls])

    @torch.inference_mode()
    def _forward(self, batch: list[EncodedText]) -> list[np.ndarray]:
        ids, _ = engine.right_pad(
            [e.ids for e in batch], self.tokenizer.pad_token_id, limit=self.model.config.max_position_embeddings
        )
        attended = torch.tensor([e.attended for e in batch])
        mask = (torch.arange(ids.shape[1])[None, :] < attended[:, None]).long()
        vectors = self.model(ids.to(self.device), mask.to(self.device)).cpu().numpy()
        return [vectors[i, e.kept] for i, e in enumerate(batch)]


def read_metadata(resolved: ResolvedModel) -> dict:
    """What the checkpoint says of its own format, with ColBERT's defaults for what it leaves out.

    Raises:
        ModelError: another similarity than cosine.
    """
    text = read_beside(resolved, METADATA)
    metadata = _DEFAULTS | {k: v for k, v in (json.loads(text) if text else {}).items() if k in _DEFAULTS}
    if metadata["similarity"] != "cosine":
        raise ModelError(f"{resolved.source}: similarity {metadata['similarity']!r} is not supported, only cosine")
    return metadata
