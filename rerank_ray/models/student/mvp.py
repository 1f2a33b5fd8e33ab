"""Students that compare the passages of a list: multi-view-guided passage reranking (MVP, Na et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.student.base import Student, StudentDescription


class MVPStudent(Student):
    """The mean over views of anchor · vector.

    A passage's vectors are T5's encoder states at the sentinel tokens, one a view, that stand before query and passage.
    A view's anchor is the decoder's first state, which attends to that view's vectors of all the list's passages; their
    order changes nothing, since T5's cross-attention knows no positions. Nothing is new: the folder is an ordinary
    `AutoModelForSeq2SeqLM`.
    """

    reads_lists = True

    def __init__(self, description: StudentDescription, tokenizer, model: PreTrainedModel, path: str) -> None:
        super().__init__(description, tokenizer)
        self.model = model
        self.before_query = [*self._sentinels(path), *self.texts.ids(["| Query:"])[0]]
        (self.before_passage,) = self.texts.ids(["| Context:"])
        taken = len(self.before_query) + len(self.before_passage) + description.max_query_length
        if taken > description.max_length - 8:
            raise ModelError(
                f"max_length ({description.max_length}) leaves no room for a passage: the views, the words around and "
                f"a query of max_query_length ({description.max_query_length}) take {taken} tokens; raise max_length"
            )

    def _sentinels(self, path: str) -> list[int]:
        names = [f"<extra_id_{number}>" for number in range(self.description.views)]
        found = self.texts.ids(names)
        for name, ids in zip(names, found, strict=True):
            if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
                raise ModelError(
                    f"{path}: the tokenizer has no token {name}, at which a view is read (views: {len(names)}): take "
                    "fewer views, or a T5 whose tokenizer has its sentinel tokens"
                )
        return [token for (token,) in found]

    @property
    def stacks(self) -> Sequence[nn.Module]:
        return (self.model.encoder, self.model.decoder)

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        """`<extra_id_0><extra_id_1>… | Query: {query} | Context: {passage}</s>`."""
        frame = self.texts.single
        longest = self.description.max_query_length - frame.length
        encoded = []
        for query, passage in zip(self.texts.ids(queries), self.texts.ids(documents), strict=True):
            before = [*self.before_query, *query[:longest], *self.before_passage]
            room = self.description.max_length - frame.length - len(before)
            encoded.append({"input_ids": frame.fill([*before, *passage[:room]])["input_ids"]})
        return encoded

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors [1, B, V, H]."""
        hidden = self.model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # A copy, which does not hold the states of all the other tokens.
        return hidden[None, :, : self.description.views].clone()

    def scores(self, outputs: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = pad_sequence(outputs[0].split(list(sizes)), batch_first=True)  # [lists, N, V, H]
        lists, longest, views, _ = vectors.shape
        counts = engine.moved(torch.tensor(sizes), vectors.device)
        mask = torch.arange(longest, device=vectors.device) < counts[:, None]
        start = self.model.config.decoder_start_token_id
        anchors = self.model.decoder(
            input_ids=torch.full((lists * views, 1), start, device=vectors.device),
            encoder_hidden_states=vectors.transpose(1, 2).flatten(0, 1),
            encoder_attention_mask=mask.repeat_interleave(views, 0),
            use_cache=False,
        ).last_hidden_state.view(lists, views, -1)
        # A sum and not a matrix product, which autocast would round.
        scores = (vectors.float() * anchors.float()[:, None]).sum(-1).mean(-1)
        return torch.cat([row[:size] for row, size in zip(scores, sizes, strict=True)])[None], anchors

    def new_parameters(self) -> list[nn.Parameter]:
        return []
