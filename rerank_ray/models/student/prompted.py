"""Students that stay language models: the score is read off the logits of the token that follows a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rerank_ray.errors import ModelError
from rerank_ray.models import engine, packed_decoder
from rerank_ray.models.continuations import continuation_ids, label_ids
from rerank_ray.models.output_layer import OutputLayer
from rerank_ray.models.positions import check_causal
from rerank_ray.models.protocol import NextToken
from rerank_ray.models.student.base import Student, StudentDescription, clipped
from rerank_ray.models.tokenizing import PromptEncoder, PromptTooLongError


class PromptedStudent(Student):
    """logit(yes) − logit(no) after the prompt, or one token's logit (RankT5, Zhuang et al. 2023).

    A decoder's token is the one behind the prompt, a seq2seq model's the first of its answer. Nothing is new: the
    folder is an ordinary `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`, and a `yes_no` ranker with the same
    template reads the same score off it.
    """

    def __init__(self, description: StudentDescription, tokenizer, model: PreTrainedModel) -> None:
        super().__init__(description, tokenizer)
        self.model = model
        self._output: OutputLayer | None = None
        self._in_float32 = False
        self.is_seq2seq = model.config.is_encoder_decoder
        prompt = description.prompt
        self.encoder = PromptEncoder(tokenizer, description.max_length, chat=False if self.is_seq2seq else None)
        if self.is_seq2seq:
            prefill = continuation_ids(tokenizer, "", prompt.prefill)
            self.begun = [model.config.decoder_start_token_id, *prefill]
            self.label_ids = label_ids(tokenizer, prompt.labels, [prompt.prefill] * len(prompt.labels))
        else:
            check_causal(model, type(model).__name__, "use head: bi_encoder")
            self.label_ids = list(self.encoder.label_ids(prompt.fill("query", "word"), prompt.labels))

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        """Raises `ModelError` where the prompt and its query leave no room for a document."""
        queries = clipped(self.tokenizer, queries, self.description.max_query_length)
        prompts = [self.description.prompt.fill(q, d) for q, d in zip(queries, documents, strict=True)]
        if self.is_seq2seq:
            prompts = [dataclasses.replace(p, prefill="") for p in prompts]
        else:
            labels = self.description.prompt.labels
            prompts = [self.encoder.asked(NextToken(prompt=p, labels=labels)) for p in prompts]
        encoded = self.encoder.encode(prompts, [0] * len(prompts))
        if failed := next((e for e in encoded if isinstance(e, PromptTooLongError)), None):
            raise ModelError(f"student: {failed}")
        return [{"input_ids": ids} for ids in encoded]

    @property
    def is_causal(self) -> bool:
        return not self.is_seq2seq

    @property
    def packs(self) -> bool:
        return packed_decoder.is_packable(self.model)

    def make_packable(self) -> None:
        packed_decoder.make_packable(self.model, self.description.max_length)

    def collate(self, encoded: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return (
            super().collate(encoded)
            if self.is_seq2seq
            else packed_decoder.collate_padded([e["input_ids"] for e in encoded], self.positions)
        )

    def collate_packed(self, encoded: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return packed_decoder.collate_packed([e["input_ids"] for e in encoded])

    def forward(self, *, input_ids: torch.Tensor, attention_mask=None, **batch: torch.Tensor) -> torch.Tensor:
        if self.is_seq2seq:
            begun = engine.moved(torch.tensor([self.begun]), input_ids.device).expand(len(input_ids), -1)
            inputs = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "decoder_input_ids": begun,
                "use_cache": False,
            }
            at = torch.arange(len(begun), device=begun.device), len(self.begun) - 1
        else:
            inputs, at = packed_decoder.inputs_and_ends(
                self.model, input_ids=input_ids, attention_mask=attention_mask, **batch
            )
        with self._output_layer().asked(*at, self.label_ids):
            labels = self.model(**inputs).logits[0]
        return (labels[:, 0] - labels[:, 1] if len(self.label_ids) == 2 else labels[:, 0])[None]

    def _output_layer(self) -> OutputLayer:
        """Of the layer that the model has now: adapters put another in its place."""
        if self._output is None or self._output.layer is not self.model.get_output_embeddings():
            self._output = OutputLayer(self.model, in_float32=self._in_float32)
        return self._output

    def score_in_float32(self) -> None:
        self._in_float32 = True

    @property
    def stacks(self) -> Sequence[nn.Module]:
        """Without the output layer, of which a few columns are read."""
        base = self.model.base_model
        return (self.model.encoder, self.model.decoder) if base is self.model else (base,)

    def new_parameters(self) -> list[nn.Parameter]:
        return []
