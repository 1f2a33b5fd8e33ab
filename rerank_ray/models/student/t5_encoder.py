"""Students of a seq2seq model's encoder (RankT5's encoder kind, Zhuang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rerank_ray.models.output_layer import give_float32
from rerank_ray.models.student.base import Student, StudentDescription, encode_pairs


class T5EncoderStudent(Student):
    """A linear map of the mean of the encoder's last hidden states; the decoder is left out.

    transformers has no classifier of this kind: the folder loads as the encoder, and with its head only here.
    """

    def __init__(self, description: StudentDescription, tokenizer, model: PreTrainedModel) -> None:
        super().__init__(description, tokenizer)
        self.model = model
        self.linear = nn.Linear(model.config.d_model, 1)

    @property
    def positions(self) -> None:
        return None

    def head_tensors(self) -> dict[str, torch.Tensor]:
        return self.linear.state_dict()

    def load_head_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.linear.load_state_dict(tensors)

    def new_parameters(self) -> list[nn.Parameter]:
        return list(self.linear.parameters())

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        encoded = encode_pairs(self.texts, self.description, queries, documents)
        return [{"input_ids": e["input_ids"]} for e in encoded]

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(hidden.dtype)
        return self.linear((hidden * weights).sum(1) / weights.sum(1)).T

    def score_in_float32(self) -> None:
        give_float32(self.linear)
