"""Students that start from a bi-encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rerank_ray.models.packing import Packing, is_packable
from rerank_ray.models.positions import first_position
from rerank_ray.models.student.base import Student, StudentDescription, check_layer, described_at
from rerank_ray.models.student.source import final_norm, keep_layers, layers_of, renumber

_BRANCHES = "branches."


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTexts:
    """Texts encoded by themselves: hidden states [B, L, H] at each exit, masks [B, L] of real tokens and of words."""

    states: list[torch.Tensor]
    mask: torch.Tensor
    words: torch.Tensor


class SimilarityStudent(Student):
    """Warm start from a bi-encoder: after joint encoding, scale · (cosine + interaction · MaxSim), plus a
    zero-initialised linear term on the first token.

    The cosine is that of the mean of the query's tokens and the mean of the document's; MaxSim is the mean over the
    query's tokens, special ones left out, of the highest cosine with a token of the document (ColBERT, Khattab &
    Zaharia 2020). A pooled vector blurs rare terms, which MaxSim sees, so a few hundred labelled lists need not teach
    them.

    The gate β (one a layer and head) is added to attention between the segments, whose positions and special tokens
    start anew: at β = −8 and interaction 0 the untrained student is the bi-encoder, at β = 0 attention is
    unrestricted.

    With `branch_layers` b each early exit has its last b layers to itself: the side branches of BranchyNet
    (Teerapittayanon et al. 2016). What an early layer must do to be scored is not what the layers above need of it.
    They start as copies of the backbone's last b, whose states are the ones that were trained to be compared.
    """

    def __init__(
        self,
        description: StudentDescription,
        tokenizer,
        backbone: PreTrainedModel,
        *,
        gate: float,
        scale: float | Sequence[float],
        interaction: float | Sequence[float],
    ) -> None:
        super().__init__(description, tokenizer)
        self.backbone = backbone
        config = backbone.config
        count = len(description.layers)
        self.gate = nn.Parameter(torch.full((config.num_hidden_layers, config.num_attention_heads), gate))
        # One number is every layer's.
        self.log_scale = nn.Parameter(torch.tensor(scale).expand(count).log())
        self.interaction = nn.Parameter(torch.tensor(interaction).expand(count).clone())
        self.linear = nn.Parameter(torch.zeros(count, config.hidden_size))
        own = description.branch_layers
        early = description.layers[:-1] if own else ()
        self.branches = nn.ModuleList(_branch(backbone, own, n) for n in early)
        self.register_buffer("special_ids", torch.tensor(tokenizer.all_special_ids), persistent=False)
        self.first_position = first_position(backbone)

    @property
    def pretrained(self) -> PreTrainedModel:
        return self.backbone

    def head_tensors(self) -> dict[str, torch.Tensor]:
        branches = {f"{_BRANCHES}{name}": tensor for name, tensor in self.branches.state_dict().items()}
        return self.head_parameters() | branches

    def load_head_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.head_parameters().items():
                parameter.copy_(tensors[name])
        branches = {n.removeprefix(_BRANCHES): t for n, t in tensors.items() if n.startswith(_BRANCHES)}
        self.branches.load_state_dict(branches)

    @property
    def positions(self) -> None:
        return None

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        longest = self.description.max_query_length
        head = self._alone(queries, longest)
        tail = self._alone(documents, self.description.max_length - longest)
        start = self.first_position
        return [
            {
                "input_ids": q + d,
                "position_ids": [*range(start, start + len(q)), *range(start, start + len(d))],
                "segment_sign": [1] * len(q) + [-1] * len(d),
            }
            for q, d in zip(head, tail, strict=True)
        ]

    def encode_alone(self, texts: Sequence[str], max_length: int) -> list[dict[str, list[int]]]:
        """Tokenise texts for `states`, as one segment each."""
        start = self.first_position
        return [
            {
                "input_ids": ids,
                "position_ids": list(range(start, start + len(ids))),
                "segment_sign": [1] * len(ids),
            }
            for ids in self._alone(texts, max_length)
        ]

    def _alone(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of each text with the special tokens around it, at most `max_length` together."""
        frame = self.texts.single
        room = max_length - frame.length
        return [frame.fill(ids[:room])["input_ids"] for ids in self.texts.ids(texts)]

    @property
    def packs(self) -> bool:
        return is_packable(self.backbone)

    def states(self, *, input_ids, position_ids, segment_sign, attention_mask=None, places=None) -> list[torch.Tensor]:
        """Hidden states [B, L, H] after each layer that has a head, as they are when the model ends there."""
        early = self.layers[:-1]
        tokens = {"input_ids": input_ids, "position_ids": position_ids}
        packing = None if places is None else Packing(places=places, mask=attention_mask)
        with self._layer_inputs() as inputs:
            output = self.backbone(
                **({**tokens, "attention_mask": attention_mask} if packing is None else packing.inputs(tokens)),
                gate=self.gate,
                segment_sign=segment_sign,
                output_hidden_states=bool(early) and not self.branches,
            )
        if self.branches:
            states = [self._along(branch, n, inputs) for branch, n in zip(self.branches, early, strict=True)]
        else:
            states = [output.hidden_states[n] for n in early]
        if (norm := final_norm(self.backbone)) is not None:
            states = [norm(hidden) for hidden in states]
        states.append(output.last_hidden_state)
        return states if packing is None else [packing.unpack(hidden) for hidden in states]

    @contextmanager
    def _layer_inputs(self) -> Iterator[dict[int, tuple[tuple, dict[str, Any]]]]:
        """What the backbone's layers that have a copy in a branch are called with, by their number."""
        inputs: dict[int, tuple[tuple, dict[str, Any]]] = {}
        own = self.description.branch_layers
        copied = {i for n in self.layers[:-1] for i in range(n - own, n)} if self.branches else ()
        layers = layers_of(self.backbone) if copied else ()

        def keep(index: int):
            return lambda _, positional, named: inputs.update({index: (positional, named)})

        hooks = [layers[i].register_forward_pre_hook(keep(i), with_kwargs=True) for i in copied]
        try:
            yield inputs
        finally:
            for hook in hooks:
                hook.remove()

    def _along(self, branch: nn.ModuleList, exit_layer: int, inputs: dict[int, tuple]) -> torch.Tensor:
        """Hidden states [B, L, H] at a branch's end."""
        first = exit_layer - len(branch)
        hidden = inputs[first][0][0]
        for index, layer in enumerate(branch, start=first):
            (_, *positional), named = inputs[index]
            hidden = layer(hidden, *positional, **named)
        return hidden

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        states = self.states(**inputs)
        ids, sign = inputs["input_ids"], inputs["segment_sign"]
        real = inputs.get("attention_mask", torch.ones_like(ids))
        segments = real * (sign > 0), real * (sign < 0)
        words = real * self._are_words(ids)
        return torch.stack([self._score(i, h, segments, words) for i, h in enumerate(states)])

    def encoded(self, batch: dict[str, torch.Tensor]) -> EncodedTexts:
        """A batch [B, L] of `encode_alone` at each exit."""
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        return EncodedTexts(states=self.states(**batch), mask=mask, words=mask * self._are_words(batch["input_ids"]))

    def score_all(self, queries: EncodedTexts, documents: Sequence[EncodedTexts]) -> torch.Tensor:
        """Scores [layers, Q, D] of every query with every document, each encoded alone: what the pairs' scores are with
        the gate shut and without the linear term.

        Args:
            documents: D of them together; batches of one length take least.
        """
        with torch.autocast(queries.mask.device.type, enabled=False):
            return torch.stack(
                [torch.cat([self._score_all(i, queries, d) for d in documents], -1) for i in range(len(queries.states))]
            )

    def _score_all(self, i: int, queries: EncodedTexts, documents: EncodedTexts) -> torch.Tensor:
        """Scores [Q, D] of the i-th head, in float32."""
        query, document = queries.states[i].float(), documents.states[i].float()
        pooled = _mean(query, queries.mask)[:, None], _mean(document, documents.mask)[None]
        cosine = nn.functional.cosine_similarity(*pooled, dim=-1)
        maxsim = _maxsim_all(query, queries.words, document, documents.words)
        return self.log_scale[i].exp() * (cosine + self.interaction[i] * maxsim)

    def _are_words(self, input_ids: torch.Tensor) -> torch.Tensor:
        # By comparison: torch.isin has no counterpart in ONNX.
        return (input_ids[..., None] != self.special_ids).all(-1)

    def _score(
        self, i: int, hidden: torch.Tensor, segments: tuple[torch.Tensor, torch.Tensor], words: torch.Tensor
    ) -> torch.Tensor:
        """Scores [B] of the i-th head on hidden states [B, L, H], in float32.

        Args:
            segments: masks [B, L] of the query's and of the document's tokens.
            words: mask [B, L] of tokens that are not special.
        """
        in_query, in_document = segments
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            maxsim = _maxsim(hidden, in_query * words, in_document * words, self.description.max_query_length)
            query, document = _mean(hidden, in_query), _mean(hidden, in_document)
            cosine = nn.functional.cosine_similarity(query, document, dim=-1)
            similarity = cosine + self.interaction[i] * maxsim
            return self.log_scale[i].exp() * similarity + hidden[:, 0] @ self.linear[i]

    def truncated(self, layer: int, *, alone: bool = False) -> SimilarityStudent:
        check_layer(layer, self.layers)
        backbone = copy.deepcopy(self.backbone)
        keep_layers(backbone, layer)
        if self.branches and layer != self.layers[-1]:
            branch = copy.deepcopy(self.branches[self.layers.index(layer)])
            for index, own in enumerate(branch, start=layer - len(branch)):
                layers_of(backbone)[index] = own
        description = described_at(self.description, layer, alone=alone)
        student = SimilarityStudent(description, self.tokenizer, backbone, gate=0.0, scale=1.0, interaction=0.0)
        kept = [self.layers.index(n) for n in description.layers]
        for branch, number in zip(student.branches, kept, strict=False):
            branch.load_state_dict(self.branches[number].state_dict())
        with torch.no_grad():
            student.gate.copy_(self.gate[:layer])
            student.log_scale.copy_(self.log_scale[kept])
            student.interaction.copy_(self.interaction[kept])
            student.linear.copy_(self.linear[kept])
        return student.eval()

    def new_parameters(self) -> list[nn.Parameter]:
        return list(self.head_parameters().values())

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """What the head adds to the backbone: gate [layers, heads], log_scale and interaction [exits], linear [exits,
        hidden]."""
        return {name: getattr(self, name) for name in ("gate", "log_scale", "interaction", "linear")}


def _branch(backbone: PreTrainedModel, own: int, exit_layer: int) -> nn.ModuleList:
    """Copies of the backbone's last `own` layers, in the place of those that end with `exit_layer`."""
    branch = copy.deepcopy(layers_of(backbone)[-own:])
    renumber(branch, first=exit_layer - own)
    return branch


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean [B, H] of hidden states [B, L, H] where the mask [B, L] is 1."""
    weights = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)


def _maxsim(
    hidden: torch.Tensor, in_query: torch.Tensor, in_document: torch.Tensor, max_query_length: int
) -> torch.Tensor:
    """Mean [B] over the query's tokens of the highest cosine with a document's token, from hidden states [B, L, H].

    The query stands within the first `max_query_length` tokens. Without a token on either side it is 0.
    """
    unit = nn.functional.normalize(hidden, dim=-1)
    cosines = unit[:, :max_query_length] @ unit.transpose(1, 2)
    highest = cosines.masked_fill(in_document[:, None, :] == 0, -1.0).amax(-1)
    weights = (in_query * in_document.any(-1, keepdim=True))[:, :max_query_length].to(highest.dtype)
    return (highest * weights).sum(-1) / weights.sum(-1).clamp(min=1.0)


def _maxsim_all(
    queries: torch.Tensor, query_words: torch.Tensor, documents: torch.Tensor, document_words: torch.Tensor
) -> torch.Tensor:
    """MaxSim [Q, D] as `_maxsim` has it, of every query [Q, L, H] with every document [D, L', H]."""
    queries, documents = (nn.functional.normalize(side, dim=-1) for side in (queries, documents))
    cosines = torch.einsum("qih,djh->qdij", queries, documents)
    highest = cosines.masked_fill(document_words[None, :, None, :] == 0, -1.0).amax(-1)
    weights = (query_words[:, None] * document_words.any(-1)[None, :, None]).to(highest.dtype)
    return (highest * weights).sum(-1) / weights.sum(-1).clamp(min=1.0)


def is_gated(student: SimilarityStudent) -> bool:
    """Whether the gate has a part in a score; a backbone that ignores it would not start as the bi-encoder."""
    try:
        scores = student(**student.collate(student.encode(["a"], ["b"])))
    except (TypeError, AttributeError):
        return False
    return torch.autograd.grad(scores[-1].sum(), student.gate, allow_unused=True)[0] is not None
