"""Decoders with a scalar head: RankLLaMA (Ma et al. 2023), and its layer-wise kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rerank_ray.errors import ModelError
from rerank_ray.models import packed_decoder
from rerank_ray.models.instructed_pairs import InstructedPairs
from rerank_ray.models.positions import check_causal
from rerank_ray.models.student.base import StudentDescription
from rerank_ray.models.student.linear import LinearStudent
from rerank_ray.models.student.source import final_norm


class DecoderStudent(LinearStudent):
    """head(norm(hidden state of the pair's last token)), one head for each layer, as MiniCPM's layer-wise rerankers
    have.

    The folder is an `AutoModelForSequenceClassification`, which finds the last token by what is no padding: the
    end-of-sequence token stands for that where the tokenizer has none.
    """

    def __init__(self, description: StudentDescription, tokenizer, model: PreTrainedModel) -> None:
        check_causal(model, type(model).__name__, "use head: bi_encoder")
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise ModelError(
                f"{type(model).__name__}: a decoder's scalar head is a linear layer on its last token, called 'score', "
                "as Llama's kind has it, and this one's is another: use head: yes_no, or another model"
            )
        super().__init__(description, tokenizer, model)
        if len(self.layers) > 1 and final_norm(model) is None:
            raise ModelError(f"{type(model).__name__}: can't find its last norm: earlier layers can't have heads")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._pad_with_another_than_the_last()
        model.config.pad_token_id = tokenizer.pad_token_id
        # These models take no segments, and some tokenizers would hand them over.
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        # Where there is a chat template, sentence-transformers' CrossEncoder puts pairs into it.
        if tokenizer.chat_template is not None:
            self.description = description.model_copy(update={"chat_template": tokenizer.get_chat_template()})
            tokenizer.chat_template = None
        self.instructed = None
        if description.instruction is not None:
            # FlagEmbedding can't do without a first token.
            if tokenizer.bos_token_id is None:
                tokenizer.bos_token = tokenizer.eos_token
            self.instructed = InstructedPairs(
                tokenizer, description.instruction, description.max_length, description.max_query_length, "student"
            )

    def _pad_with_another_than_the_last(self) -> None:
        """Where texts end with the padding token, readers of the folder would take the one before for the last."""
        tokenizer = self.tokenizer
        last = super().encode([""], [""])[0]["input_ids"][-1:]
        if last != [tokenizer.pad_token_id]:
            return
        others = [t for t in tokenizer.all_special_tokens if [tokenizer.convert_tokens_to_ids(t)] != last]
        if not others:
            raise ModelError("the tokenizer ends texts with the token it pads with, and has no other special token")
        tokenizer.pad_token = others[0]

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        if self.instructed is None:
            return super().encode(queries, documents)
        queries = [self.description.query_prefix + q for q in queries]
        documents = [self.description.document_prefix + d for d in documents]
        return [{"input_ids": ids} for ids in self.instructed.encode(queries, documents)]

    is_causal = True

    @property
    def packs(self) -> bool:
        return packed_decoder.is_packable(self.model)

    @property
    def stacks(self) -> Sequence[nn.Module]:
        return (self.model.base_model,)

    def make_packable(self) -> None:
        packed_decoder.make_packable(self.model, self.description.max_length)

    def collate(self, encoded: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return packed_decoder.collate_padded([e["input_ids"] for e in encoded], self.positions)

    def collate_packed(self, encoded: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return packed_decoder.collate_packed([e["input_ids"] for e in encoded])

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        early = len(self.early_heads) > 0
        inputs, at = packed_decoder.inputs_and_ends(self.model, **batch, all_states=early)
        output = self.model.base_model(**inputs, output_hidden_states=early)
        scores = [self.model.score(output.last_hidden_state[at])[:, 0]]
        if early:
            norm = final_norm(self.model)
            # hidden_states[0] is the embedding layer's, so index n is the output of layer n.
            hidden = {n: norm(output.hidden_states[n][at]) for n in self.layers[:-1]}
            scores = [self.early_heads[str(n)](h)[:, 0] for n, h in hidden.items()] + scores
        return torch.stack(scores)
