"""A language model's output layer, of which a pass computes what it asks for and no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from rerank_ray.models import engine

Indices = Sequence[int] | torch.Tensor | int
"""One index for all places, or one for each."""


@dataclass(slots=True)
class _Asked:
    rows: torch.Tensor
    positions: torch.Tensor
    ids: torch.Tensor | None
    states: torch.Tensor | None = None


class OutputLayer:
    """Computes logits at some places of a batch, and of some tokens alone where these are all that is read.

    Logits of some tokens are a float32 product of the states and the weights: a bfloat16 one rounds a logit between 16
    and 32 to a step of 0.125, and half of the passages of a list come to have the score of another.

    By hooks, because models do more to logits than this layer (scales, soft caps), each in its own way.
    """

    def __init__(self, model: PreTrainedModel, *, in_float32: bool = True) -> None:
        """`in_float32` is false of a model that is trained: its own product has the gradient, however its weights are
        divided."""
        self.layer = model.get_output_embeddings()
        self._reads_weights = in_float32 and type(self.layer) is nn.Linear
        self._asked: _Asked | None = None
        self.layer.register_forward_pre_hook(self._select)
        self.layer.register_forward_hook(self._of_tokens)

    @contextmanager
    def asked(self, rows: Indices, positions: Indices, tokens: Indices | None = None) -> Iterator[None]:
        """A pass of the model inside gives logits [1, N, vocabulary] at (row, position) pairs, or [1, N, tokens]."""
        # A tensor without dimensions, as an index, would be read by Python, and a GPU waited for.
        places = (torch.as_tensor(given, dtype=torch.long).reshape(-1) for given in (rows, positions))
        self._asked = _Asked(*places, None if tokens is None else torch.as_tensor(tokens, dtype=torch.long))
        try:
            yield
        finally:
            self._asked = None

    def _select(self, _layer: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Leave only the wanted hidden states [1, N, hidden] of [B, L, hidden], or none where their product is ours."""
        asked = self._asked
        if asked is None:
            return None
        rows, positions = (engine.moved(index, inputs[0].device) for index in (asked.rows, asked.positions))
        states = inputs[0][rows, positions][None]
        if asked.ids is None or not self._reads_weights:
            return (states,)
        asked.states = states
        return (states[:, :0],)

    def _of_tokens(self, layer: nn.Module, _inputs: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor | None:
        asked = self._asked
        if asked is None or asked.ids is None:
            return None
        ids = engine.moved(asked.ids, logits.device)
        if asked.states is None:
            return logits[..., ids].float()
        return product_in_float32(asked.states, layer.weight[ids], None if layer.bias is None else layer.bias[ids])


def product_in_float32(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """States [..., hidden] times weights [outputs, hidden], and the bias [outputs], without rounding to their type."""
    return functional.linear(states.float(), weight.float(), None if bias is None else bias.float())


def head_in_float32(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """A linear head's outputs in float32, whatever the states' type; of any other head its own, as float32."""
    if type(head) is nn.Linear:
        return product_in_float32(states, head.weight, head.bias)
    return head(states).float()


def give_float32(head: nn.Module) -> None:
    """Let a head's linear layers of one output give float32, in place."""
    for module in head.modules():
        if type(module) is nn.Linear and module.out_features == 1:
            module.forward = MethodType(head_in_float32, module)
