"""Students with the architecture's own classification head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rerank_ray.errors import ModelError
from rerank_ray.models.output_layer import give_float32
from rerank_ray.models.packing import Packing, is_packable
from rerank_ray.models.positions import first_position
from rerank_ray.models.student.base import Student, StudentDescription, check_layer, described_at, encode_pairs
from rerank_ray.models.student.first_token import compute_first_token_alone, computes_first_token_alone
from rerank_ray.models.student.source import keep_layers

_IDENTITY = "torch.nn.modules.linear.Identity"


class LinearStudent(Student):
    """The architecture's own classification head, one copy for each layer.

    The last layer's head is the model's own, so the folder loads as `AutoModelForSequenceClassification` and
    sentence-transformers' `CrossEncoder` whether or not earlier layers have heads too.
    """

    def __init__(self, description: StudentDescription, tokenizer, model: PreTrainedModel) -> None:
        super().__init__(description, tokenizer)
        self.model = model
        self.early_heads = nn.ModuleDict(
            {str(layer): copy.deepcopy(classification_head(model)) for layer in description.layers[:-1]}
        )

    def head_tensors(self) -> dict[str, torch.Tensor]:
        return self.early_heads.state_dict()

    def load_head_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.early_heads.load_state_dict(tensors)

    def save(self, folder: Path) -> None:
        # Where sentence-transformers' CrossEncoder cuts pairs.
        self.tokenizer.model_max_length = self.description.max_length
        # It puts a sigmoid on one output unless told otherwise, and float32 has no numbers between 1 and that of 17.
        self.model.config.sentence_transformers = {"activation_fn": _IDENTITY}
        super().save(folder)

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        return encode_pairs(self.texts, self.description, queries, documents)

    @property
    def packs(self) -> bool:
        return is_packable(self.model)

    def forward(self, *, places: torch.Tensor | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        if places is not None:
            return self._packed(Packing(places=places, mask=inputs.pop("attention_mask")), inputs)
        early = len(self.early_heads) > 0
        output = self.model(**inputs, output_hidden_states=early)
        scores = [output.logits[:, 0]]
        if early:
            # hidden_states[0] is the embedding layer's, so index n is the output of layer n.
            scores = [self.early_heads[str(n)](output.hidden_states[n])[:, 0] for n in self.layers[:-1]] + scores
        return torch.stack(scores)

    def _packed(self, packing: Packing, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scores [layers, B]: heads read unpacked hidden states, which the model's own forward has none of."""
        ids = tokens["input_ids"]
        start = first_position(self.model)
        tokens["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
        output = self.model.base_model(**packing.inputs(tokens), output_hidden_states=len(self.early_heads) > 0)
        heads = [*self.early_heads.values(), classification_head(self.model)]
        states = [packing.unpack(output.hidden_states[n]) for n in self.layers[:-1]]
        last = output.last_hidden_state
        states.append(last if computes_first_token_alone(self.model) else packing.unpack(last))
        return torch.stack([head(h)[:, 0] for head, h in zip(heads, states, strict=True)])

    def leave_out_what_is_not_read(self) -> None:
        compute_first_token_alone(self.model)

    def score_in_float32(self) -> None:
        own = (child for child in self.model.children() if child is not self.model.base_model)
        for head in (*self.early_heads.values(), *own):
            give_float32(head)

    def truncated(self, layer: int, *, alone: bool = False) -> LinearStudent:
        check_layer(layer, self.layers)
        model = copy.deepcopy(self.model)
        if layer != self.layers[-1]:
            classification_head(model).load_state_dict(self.early_heads[str(layer)].state_dict())
        keep_layers(model, layer)
        student = type(self)(described_at(self.description, layer, alone=alone), self.tokenizer, model)
        for n, head in student.early_heads.items():
            head.load_state_dict(self.early_heads[n].state_dict())
        return student.eval()

    def new_parameters(self) -> list[nn.Parameter]:
        pretrained = {id(p) for p in self.model.base_model.parameters()}
        own_head = [p for p in self.model.parameters() if id(p) not in pretrained]
        return [*self.early_heads.parameters(), *own_head]


class PooledHead(nn.Module):
    """A head of BERT's kind: pooler on the first token, then a linear layer."""

    def __init__(self, pooler: nn.Module, dropout: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.pooler, self.dropout, self.classifier = pooler, dropout, classifier

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.pooler(hidden)))


def classification_head(model: nn.Module) -> nn.Module:
    """A sequence-classification model's own head as one module from hidden states [B, L, H] to logits [B, 1]; a
    decoder's, from any [..., H] to [..., 1].

    The module shares the model's parameters.

    Raises:
        ModelError: the architecture's head is not one that can be put on another layer.
    """
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear):
        return score
    classifier = getattr(model, "classifier", None)
    pooler = getattr(model.base_model, "pooler", None) or getattr(model, "pooler", None)
    if isinstance(classifier, nn.Linear) and pooler is not None:
        return PooledHead(pooler, getattr(model, "dropout", nn.Identity()), classifier)
    if classifier is not None and not isinstance(classifier, nn.Linear):
        return classifier
    raise ModelError(
        f"{type(model).__name__}: layer-wise linear heads need a classification head that reads hidden states (BERT, "
        "RoBERTa, ELECTRA, DeBERTa kinds); use head: similarity"
    )
