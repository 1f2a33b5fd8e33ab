"""Student cross-encoders: a backbone with a `linear` or `similarity` head on its last layer or on several.

On disk a student is a transformers folder plus `student.json` (head, layers, lengths). A `linear` student of one layer
needs nothing more and loads anywhere; every other one adds `heads.safetensors`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from rerank_ray.config import Settings
from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.attention import GATED
from rerank_ray.models.loading import load
from rerank_ray.models.resolve import ResolvedModel, resolve
from rerank_ray.settings.distill import StudentHead
from rerank_ray.settings.models import ModelSettings

DESCRIPTION = "student.json"
HEADS = "heads.safetensors"


class StudentDescription(Settings):
    """What `student.json` records beside the transformers config."""

    head: StudentHead
    layers: tuple[int, ...]
    """Layers that carry a head, counted from 1, ascending; the last is the depth of the backbone."""
    max_length: int
    """Tokens of query and document together, special tokens included."""
    max_query_length: int
    """Tokens of the query, special tokens included."""
    version: int = 1


class Student(nn.Module):
    """Scores of (query, document) pairs at each of its `layers`; subclasses add the head."""

    def __init__(self, description: StudentDescription, tokenizer) -> None:
        super().__init__()
        self.description = description
        self.tokenizer = tokenizer

    @property
    def layers(self) -> tuple[int, ...]:
        return self.description.layers

    @property
    def positions(self) -> int | None:
        """The longest sequence that the position table holds; None when the student numbers positions itself."""
        raise NotImplementedError  # abstract

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        """Tokenise pairs; the query is cut to `max_query_length`, the document to what `max_length` leaves."""
        raise NotImplementedError  # abstract

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Scores [layers, B] of a padded batch from `collate`."""
        raise NotImplementedError  # abstract

    def collate(self, encoded: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pad encoded pairs on the right into tensors [B, L]; no mask is made when nothing is padded."""
        length = engine.padded_length(max(len(e["input_ids"]) for e in encoded), self.positions)
        pad = {"input_ids": self.tokenizer.pad_token_id or 0, "segment_sign": -1}
        batch = {
            name: torch.tensor([e[name] + [pad.get(name, 0)] * (length - len(e[name])) for e in encoded])
            for name in encoded[0]
        }
        if any(len(e["input_ids"]) < length for e in encoded):
            batch["attention_mask"] = torch.tensor(
                [[1] * len(e["input_ids"]) + [0] * (length - len(e["input_ids"])) for e in encoded]
            )
        return batch

    def truncated(self, layer: int) -> Student:
        """The student that ends at `layer`: same scores as this one's at that layer, with the layers above removed."""
        raise NotImplementedError  # abstract

    def save(self, folder: Path) -> None:
        raise NotImplementedError  # abstract

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that the pretrained checkpoint did not have."""
        raise NotImplementedError  # abstract

    def _describe(self, folder: Path, heads: dict[str, torch.Tensor]) -> None:
        if heads:
            save_file({k: v.detach().contiguous().clone() for k, v in heads.items()}, folder / HEADS)
        (folder / DESCRIPTION).write_text(json.dumps(self.description.model_dump(mode="json"), indent=2) + "\n")


class LinearStudent(Student):
    """The architecture's own classification head, one copy for each layer.

    The last layer's head is the model's own, so the folder loads as `AutoModelForSequenceClassification` and
    sentence-transformers' `CrossEncoder` whether or not earlier layers have heads too.
    """

    def __init__(self, description: StudentDescription, tokenizer, model: nn.Module) -> None:
        super().__init__(description, tokenizer)
        self.model = model
        self.early_heads = nn.ModuleDict(
            {str(layer): copy.deepcopy(classification_head(model)) for layer in description.layers[:-1]}
        )

    @property
    def positions(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        queries = _clipped(self.tokenizer, queries, self.description.max_query_length)
        encoded = self.tokenizer(
            list(queries), list(documents), truncation="only_second", max_length=self.description.max_length
        )
        names = [n for n in ("input_ids", "token_type_ids") if n in encoded]
        return [{n: encoded[n][i] for n in names} for i in range(len(queries))]

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        early = len(self.early_heads) > 0
        output = self.model(**inputs, output_hidden_states=early)
        scores = [output.logits[:, 0]]
        if early:
            # hidden_states[0] is the embedding layer's, so index n is the output of layer n.
            scores = [self.early_heads[str(n)](output.hidden_states[n])[:, 0] for n in self.layers[:-1]] + scores
        return torch.stack(scores)

    def truncated(self, layer: int) -> LinearStudent:
        _check_layer(layer, self.layers)
        model = copy.deepcopy(self.model)
        if layer != self.layers[-1]:
            classification_head(model).load_state_dict(self.early_heads[str(layer)].state_dict())
        keep_layers(model, layer)
        student = LinearStudent(_described_at(self.description, self.layers, layer), self.tokenizer, model)
        for n, head in student.early_heads.items():
            head.load_state_dict(self.early_heads[n].state_dict())
        return student.eval()

    def new_parameters(self) -> list[nn.Parameter]:
        pretrained = {id(p) for p in self.model.base_model.parameters()}
        own_head = [p for p in self.model.parameters() if id(p) not in pretrained]
        return [*self.early_heads.parameters(), *own_head]

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        _save_tokenizer(self.tokenizer, folder)
        self._describe(folder, self.early_heads.state_dict())


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
    """

    def __init__(
        self,
        description: StudentDescription,
        tokenizer,
        backbone: nn.Module,
        *,
        gate: float,
        scale: float,
        interaction: float,
    ) -> None:
        super().__init__(description, tokenizer)
        self.backbone = backbone
        config = backbone.config
        count = len(description.layers)
        self.gate = nn.Parameter(torch.full((config.num_hidden_layers, config.num_attention_heads), gate))
        self.log_scale = nn.Parameter(torch.full((count,), scale).log())
        self.interaction = nn.Parameter(torch.full((count,), interaction))
        self.linear = nn.Parameter(torch.zeros(count, config.hidden_size))
        self.register_buffer("special_ids", torch.tensor(tokenizer.all_special_ids), persistent=False)
        # RoBERTa's kind counts positions from the padding token's id + 1, and marks that in its position embeddings.
        positions = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
        padding_position = getattr(positions, "padding_idx", None)
        self.first_position = 0 if padding_position is None else padding_position + 1

    @property
    def positions(self) -> None:
        return None

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[dict[str, list[int]]]:
        head = self.tokenizer(list(queries), truncation=True, max_length=self.description.max_query_length)["input_ids"]
        room = self.description.max_length - self.description.max_query_length
        tail = self.tokenizer(list(documents), truncation=True, max_length=room)["input_ids"]
        start = self.first_position
        return [
            {
                "input_ids": q + d,
                "position_ids": [*range(start, start + len(q)), *range(start, start + len(d))],
                "segment_sign": [1] * len(q) + [-1] * len(d),
            }
            for q, d in zip(head, tail, strict=True)
        ]

    def forward(self, *, input_ids, position_ids, segment_sign, attention_mask=None) -> torch.Tensor:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output = self.backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            gate=self.gate,
            segment_sign=segment_sign,
            output_hidden_states=len(self.layers) > 1,
        )
        segments = real * (segment_sign > 0), real * (segment_sign < 0)
        words = real * ~torch.isin(input_ids, self.special_ids)
        hidden = [output.hidden_states[n] for n in self.layers[:-1]] if len(self.layers) > 1 else []
        return torch.stack(
            [self._score(i, h, segments, words) for i, h in enumerate([*hidden, output.last_hidden_state])]
        )

    def _score(
        self, i: int, hidden: torch.Tensor, segments: tuple[torch.Tensor, torch.Tensor], words: torch.Tensor
    ) -> torch.Tensor:
        """Scores [B] of the i-th head on hidden states [B, L, H], in float32.

        Args:
            segments: masks [B, L] of the query's and of the document's tokens.
            words: mask [B, L] of tokens that are not special.
        """
        in_query, in_document = segments
        maxsim = _maxsim(hidden, in_query * words, in_document * words, self.description.max_query_length)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            query, document = _mean(hidden, in_query), _mean(hidden, in_document)
            cosine = nn.functional.cosine_similarity(query, document, dim=-1)
            similarity = cosine + self.interaction[i] * maxsim.float()
            return self.log_scale[i].exp() * similarity + hidden[:, 0] @ self.linear[i]

    def truncated(self, layer: int) -> SimilarityStudent:
        _check_layer(layer, self.layers)
        backbone = copy.deepcopy(self.backbone)
        keep_layers(backbone, layer)
        description = _described_at(self.description, self.layers, layer)
        student = SimilarityStudent(description, self.tokenizer, backbone, gate=0.0, scale=1.0, interaction=0.0)
        count = len(description.layers)
        with torch.no_grad():
            student.gate.copy_(self.gate[:layer])
            student.log_scale.copy_(self.log_scale[:count])
            student.interaction.copy_(self.interaction[:count])
            student.linear.copy_(self.linear[:count])
        return student.eval()

    def new_parameters(self) -> list[nn.Parameter]:
        return list(self.head_parameters().values())

    def save(self, folder: Path) -> None:
        self.backbone.save_pretrained(folder)
        _save_tokenizer(self.tokenizer, folder)
        self._describe(folder, self.head_parameters())

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """What the head adds to the backbone: gate [layers, heads], log_scale and interaction [exits], linear [exits,
        hidden]."""
        return {name: getattr(self, name) for name in ("gate", "log_scale", "interaction", "linear")}


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


def _save_tokenizer(tokenizer, folder: Path) -> None:
    """Save without the truncation that the last call left set, so that the same student is the same bytes."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def _clipped(tokenizer, texts: Sequence[str], max_tokens: int) -> list[str]:
    """Cut texts at a token's end so that they encode to at most `max_tokens` tokens, special tokens included."""
    room = max_tokens - tokenizer.num_special_tokens_to_add(pair=False)
    offsets = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [t if len(o) <= room else t[: o[room - 1][1]] for t, o in zip(texts, offsets, strict=True)]


def _check_layer(layer: int, layers: Sequence[int]) -> None:
    if layer not in layers:
        raise ModelError(f"exit_layer: {layer}: this student has heads on layers {list(layers)}")


def _described_at(description: StudentDescription, layers: Sequence[int], layer: int) -> StudentDescription:
    return description.model_copy(update={"layers": tuple(n for n in layers if n <= layer)})


class PooledHead(nn.Module):
    """A head of BERT's kind: pooler on the first token, then a linear layer."""

    def __init__(self, pooler: nn.Module, dropout: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.pooler, self.dropout, self.classifier = pooler, dropout, classifier

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.pooler(hidden)))


def classification_head(model: nn.Module) -> nn.Module:
    """A sequence-classification model's own head as one module from hidden states [B, L, H] to logits [B, 1].

    The module shares the model's parameters.

    Raises:
        ModelError: the architecture's head is not one that can be put on another layer.
    """
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


def keep_layers(model: nn.Module, count: int) -> None:
    """Remove every layer above the first `count` from a transformers model and its config."""
    base = model.base_model
    stack = getattr(base, "encoder", base)
    name = next((n for n in ("layer", "layers") if isinstance(getattr(stack, n, None), nn.ModuleList)), None)
    if name is None:
        raise ModelError(f"{type(model).__name__}: can't tell its layers apart, so it can't be truncated")
    setattr(stack, name, getattr(stack, name)[:count])
    model.config.num_hidden_layers = count
    base.config.num_hidden_layers = count


# Loading


def is_student(resolved: ResolvedModel) -> bool:
    return resolved.folder is not None and (resolved.folder / DESCRIPTION).exists()


def load_student(settings: ModelSettings, *, max_query_length: int | None = None, dtype=torch.float32) -> Student:
    """Load a cross-encoder: a student of ours, or any sequence-classification checkpoint with one output.

    Raises:
        ModelError: the model is missing, has no trained head, or has several outputs.
    """
    resolved = resolve(settings)
    tokenizer = load(AutoTokenizer, resolved, settings)
    if is_student(resolved):
        return _load_described(resolved, settings, tokenizer, dtype)
    model, info = load(AutoModelForSequenceClassification, resolved, settings, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ModelError(
            f"{settings.path}: not a cross-encoder: the checkpoint has no weights for {sorted(info['missing_keys'])}, "
            "which would be random; use a sequence-classification checkpoint, or distil one"
        )
    if model.config.num_labels != 1:
        raise ModelError(f"{settings.path}: the head has {model.config.num_labels} outputs; a reranker's has one")
    max_length = min(settings.max_length, tokenizer.model_max_length)
    description = StudentDescription(
        head="linear",
        layers=(model.config.num_hidden_layers,),
        max_length=max_length,
        max_query_length=max_query_length or max_length // 2,
    )
    return LinearStudent(description, tokenizer, model).eval()


def _load_described(resolved: ResolvedModel, settings: ModelSettings, tokenizer, dtype) -> Student:
    folder = resolved.folder
    description = StudentDescription.model_validate_json((folder / DESCRIPTION).read_text())
    heads = load_file(folder / HEADS) if (folder / HEADS).exists() else {}
    if description.head == "linear":
        model = load(AutoModelForSequenceClassification, resolved, settings, dtype=dtype)
        student: Student = LinearStudent(description, tokenizer, model)
        student.early_heads.load_state_dict(heads)
        student.early_heads.to(dtype)
    else:
        backbone = load(AutoModel, resolved, settings, dtype=dtype, attn_implementation=GATED)
        student = SimilarityStudent(description, tokenizer, backbone, gate=0.0, scale=1.0, interaction=0.0)
        with torch.no_grad():
            for name, parameter in student.head_parameters().items():
                parameter.copy_(heads[name])
    return student.eval()


def new_student(
    settings: ModelSettings,
    *,
    head: StudentHead,
    layers: tuple[int, ...] | None,
    max_query_length: int,
    gate: float,
    scale: float,
    interaction: float,
) -> Student:
    """Start a student from a pretrained encoder: weights in float32, heads new.

    Args:
        layers: layers that get a head; None is the last only.

    Raises:
        ModelError: a layer that the backbone does not have, or attention that the similarity head can't gate.
    """
    resolved = resolve(settings)
    tokenizer = load(AutoTokenizer, resolved, settings)
    if head == "linear":
        model = load(AutoModelForSequenceClassification, resolved, settings, dtype=torch.float32, num_labels=1)
    else:
        model = load(AutoModel, resolved, settings, dtype=torch.float32, attn_implementation=GATED)
    depth = model.config.num_hidden_layers
    layers = layers or (depth,)
    if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] != depth:
        raise ModelError(f"layers: {list(layers)}: give ascending layers of 1..{depth} that end with {depth}")
    description = StudentDescription(
        head=head, layers=layers, max_length=settings.max_length, max_query_length=max_query_length
    )
    if head == "linear":
        return LinearStudent(description, tokenizer, model)
    student = SimilarityStudent(description, tokenizer, model, gate=gate, scale=scale, interaction=interaction)
    if not _is_gated(student):
        raise ModelError(
            f"{settings.path}: {type(model).__name__} does not use transformers' attention interface, so its attention "
            "can't be gated (BERT, RoBERTa, ELECTRA and ModernBERT kinds can); use head: linear"
        )
    return student


def _is_gated(student: SimilarityStudent) -> bool:
    """Whether the gate has a part in a score; a backbone that ignores it would not start as the bi-encoder."""
    try:
        scores = student(**student.collate(student.encode(["a"], ["b"])))
    except (TypeError, AttributeError):
        return False
    return torch.autograd.grad(scores[-1].sum(), student.gate, allow_unused=True)[0] is not None
