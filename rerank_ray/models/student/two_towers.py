"""Students that embed query and document apart, so that documents can be embedded once: bi-encoders and ColBERT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rerank_ray.models import engine
from rerank_ray.models.bi_encoder import embedded, token_ids
from rerank_ray.models.late_interaction import METADATA, ColBERTModel, TextEncoder
from rerank_ray.models.student.base import Student, StudentDescription


class TwoTowerStudent(Student):
    """Scores from embeddings, times a learned scale; one transformers model embeds both sides.

    A pair's `input_ids` are its document's, by which pairs are batched; a query is embedded once a batch.
    """

    def __init__(self, description: StudentDescription, tokenizer, model: PreTrainedModel, scale: float = 1.0) -> None:
        super().__init__(description, tokenizer)
        self.model = model
        self.log_scale = nn.Parameter(torch.tensor([scale]).flatten().log())

    @property
    def max_document_length(self) -> int:
        return self.description.max_length - self.description.max_query_length

    def head_tensors(self) -> dict[str, torch.Tensor]:
        return {"log_scale": self.log_scale}

    def load_head_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.log_scale.data.copy_(tensors["log_scale"])

    def new_parameters(self) -> list[nn.Parameter]:
        return [self.log_scale]

    def collate(self, encoded: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Documents [B, L] and the batch's different queries [Q, L'], their lengths, and each document's query [B]."""
        distinct: dict[tuple[int, ...], int] = {}
        of_document = [distinct.setdefault(tuple(e["query_ids"]), len(distinct)) for e in encoded]
        padding = self.tokenizer.pad_token_id or 0
        documents, lengths = engine.right_pad([e["input_ids"] for e in encoded], padding, self.positions)
        queries, query_lengths = engine.right_pad(list(distinct), padding, self.positions)
        return {
            "input_ids": documents,
            "lengths": lengths,
            "query_ids": queries,
            "query_lengths": query_lengths,
            "query_of": torch.tensor(of_document),
        }


class BiEncoderStudent(TwoTowerStudent):
    """scale · cosine of the two texts' pooled vectors; the folder is a sentence-transformers one."""

    def __init__(
        self, description: StudentDescription, tokenizer, model: PreTrainedModel, pooling: str, scale: float = 1.0
    ) -> None:
        super().__init__(description, tokenizer, model, scale)
        self.pooling = pooling

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        description = self.description
        heads = [description.query_prefix + q for q in queries]
        heads = token_ids(self.tokenizer, heads, description.max_query_length)
        tails = [description.document_prefix + d for d in documents]
        tails = token_ids(self.tokenizer, tails, self.max_document_length)
        return [{"input_ids": d, "query_ids": q} for q, d in zip(heads, tails, strict=True)]

    def forward(self, *, input_ids, lengths, query_ids, query_lengths, query_of) -> torch.Tensor:
        queries = embedded(self.model, query_ids, query_lengths, self.pooling)
        documents = embedded(self.model, input_ids, lengths, self.pooling)
        return self.log_scale.exp() * (queries[query_of] * documents).sum(-1)[None]

    def save(self, folder: Path) -> None:
        super().save(folder)
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        listed = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ]
        modes = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
        pooling = {f"pooling_mode_{name}": kind == self.pooling for kind, name in modes.items()}
        prompts = {"query": self.description.query_prefix, "document": self.description.document_prefix}
        for name, content in {
            "modules.json": listed,
            "1_Pooling/config.json": {"word_embedding_dimension": self.model.config.hidden_size, **pooling},
            "sentence_bert_config.json": {"max_seq_length": self.max_document_length, "do_lower_case": False},
            "config_sentence_transformers.json": {"prompts": prompts, "similarity_fn_name": "cosine"},
        }.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


class ColBERTStudent(TwoTowerStudent):
    """scale · mean over the query's tokens of the highest cosine with a document's token (Khattab & Zaharia 2020).

    ColBERT sums over the query's tokens, of which there are always `max_query_length`: the same order. The folder is a
    ColBERT checkpoint.
    """

    def __init__(
        self,
        description: StudentDescription,
        tokenizer,
        model: ColBERTModel,
        metadata: dict,
        path: str,
        scale: float = 1.0,
    ) -> None:
        super().__init__(description, tokenizer, model, scale)
        lengths = {"query_maxlen": description.max_query_length, "doc_maxlen": self.max_document_length}
        self.metadata = metadata | lengths
        self.tokens = TextEncoder(
            tokenizer,
            metadata,
            path,
            query_length=description.max_query_length,
            document_length=self.max_document_length,
        )

    def new_parameters(self) -> list[nn.Parameter]:
        return [self.log_scale, *self.model.linear.parameters()]

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        heads = self.tokens.encode(queries, ["query"] * len(queries))
        tails = self.tokens.encode(documents, ["document"] * len(documents))
        return [
            {"input_ids": d.ids, "kept": d.kept, "query_ids": q.ids, "attended": [q.attended]}
            for q, d in zip(heads, tails, strict=True)
        ]

    def collate(self, encoded: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """As documents and queries of a bi-encoder; `query_lengths` are what is attended to, and `kept` [B, L] is the
        document's tokens that count."""
        batch = super().collate(encoded)
        kept = torch.zeros_like(batch["input_ids"])
        for row, e in zip(kept, encoded, strict=True):
            row[e["kept"]] = 1
        attended = {n: e["attended"][0] for n, e in zip(batch["query_of"].tolist(), encoded, strict=True)}
        lengths = torch.tensor([attended[n] for n in range(len(attended))])
        # Masks that fill a query up count, so it is never padded.
        queries = batch["query_ids"][:, : self.description.max_query_length]
        return batch | {"kept": kept, "query_lengths": lengths, "query_ids": queries}

    def forward(self, *, input_ids, lengths, kept, query_ids, query_lengths, query_of) -> torch.Tensor:
        queries, documents = self._embed(query_ids, query_lengths), self._embed(input_ids, lengths)
        cosines = queries[query_of] @ documents.transpose(1, 2)
        highest = cosines.masked_fill(kept[:, None, :] == 0, -1.0).amax(-1)
        return self.log_scale.exp() * highest.mean(-1)[None]

    def _embed(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(ids.shape[1], device=ids.device)[None, :] < lengths[:, None]
        return self.model(ids, mask.long())

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / METADATA).write_text(json.dumps(self.metadata, indent=2) + "\n")
