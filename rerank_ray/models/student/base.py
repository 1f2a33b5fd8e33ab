"""What every student has: its description on disk, and what training and inference ask of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from rerank_ray import storage
from rerank_ray.config import Settings
from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.models import engine
from rerank_ray.models.acceleration import compiles_in_parts
from rerank_ray.models.packing import make_packable
from rerank_ray.models.positions import position_limit
from rerank_ray.models.protocol import Prompt
from rerank_ray.models.resolve import ResolvedModel
from rerank_ray.models.student import lora
from rerank_ray.models.text_tokens import TextTokens
from rerank_ray.settings.models import TorchSettings
from rerank_ray.settings.student import StudentHead

DESCRIPTION = "student.json"
HEADS = "heads.safetensors"
Encoded = dict[str, list[int]]
"""One tokenised pair, as `Student.encode` returns it."""


class StudentPrompt(Settings):
    """The prompt of a student that stays a language model, its instruction filled in."""

    text: str
    """With the slots {query} and {passage}."""
    system: str | None = None
    chat: bool = True
    prefill: str = ""
    labels: tuple[str, ...]
    """Two answers, whose log-odds is the score, or one token, whose logit it is."""

    def fill(self, query: str, document: str) -> Prompt:
        parts = tuple(part.replace("{query}", query) for part in self.text.split("{passage}"))
        return Prompt(parts=parts, passages=(document,), system=self.system, chat=self.chat, prefill=self.prefill)


class StudentDescription(Settings):
    """What `student.json` records beside the transformers config."""

    head: StudentHead
    layers: tuple[int, ...]
    """Layers that carry a head, counted from 1, ascending; the last is the depth of the backbone."""
    max_length: int
    """Tokens of query and document together, special tokens included."""
    max_query_length: int
    """Tokens of the query, special tokens included."""
    query_prefix: str = ""
    document_prefix: str = ""
    instruction: str | None = None
    """What stands after a decoder's pairs, in FlagEmbedding's form."""
    prompt: StudentPrompt | None = None
    """Of heads yes_no and token_logit."""
    views: int | None = None
    """Of head mvp: vectors of each passage."""
    branch_layers: int = 0
    """Layers that each early exit has to itself."""
    exit_margins: tuple[float | None, ...] | None = None
    """Of adaptive exits, one for each of `layers` but the last (`exit_margins.calibrate`)."""
    chat_template: str | None = None
    """A decoder's, which its folder's tokenizer must do without, for the models that start from it and write."""
    version: int = 1

    @model_validator(mode="before")
    @classmethod
    def _without_thresholds(cls, given: Any) -> Any:
        """Adaptive exits had thresholds on another measure once, which mean nothing as margins."""
        return {k: v for k, v in given.items() if k != "exit_thresholds"} if isinstance(given, dict) else given


class Student(nn.Module):
    """Scores of (query, document) pairs at each of its `layers`; subclasses add the head."""

    packs = False
    """Whether batches can be packed."""
    is_causal = False
    """Whether it is a decoder."""
    reads_lists = False
    """Whether a pair's score depends on the other pairs of its list."""
    saves_adapter = False
    """Whether the saved folder holds LoRA adapters alone, without the model that they are for."""

    def __init__(self, description: StudentDescription, tokenizer) -> None:
        super().__init__()
        self.description = description
        self.tokenizer = tokenizer
        self.texts = TextTokens(tokenizer, description.max_length)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.description.layers

    @property
    def positions(self) -> int | None:
        """The longest sequence that the position table holds; None when the student numbers positions itself."""
        return position_limit(self.pretrained)

    def encode(self, queries: Sequence[str], documents: Sequence[str]) -> list[Encoded]:
        """Tokenise pairs; the query is cut to `max_query_length`, the document to what `max_length` leaves."""
        raise NotImplementedError  # abstract

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Scores [layers, B] of a padded batch from `collate`; of students that read lists what `scores` makes them of,
        [layers, B, …]."""
        raise NotImplementedError  # abstract

    def scores(self, outputs: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores [layers, pairs] of whole lists, and each list's views [lists, V, H] where the student has several.

        Args:
            outputs: what `forward` gave of the pairs, [layers, pairs, …], list by list.
            sizes: how many pairs each list has.
        """
        return outputs, None

    def collate(self, encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Pad encoded pairs on the right into tensors [B, L]; no mask is made when nothing is padded."""
        pad = {"input_ids": self.tokenizer.pad_token_id or 0, "segment_sign": -1}
        batch = {}
        for name in encoded[0]:
            batch[name], lengths = engine.right_pad([e[name] for e in encoded], pad.get(name, 0), self.positions)
        mask = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        return batch if mask.all() else batch | {"attention_mask": mask.long()}

    def collate_packed(self, encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """What `collate` makes, with `places` of the real tokens where others are padding."""
        batch = self.collate(encoded)
        if "attention_mask" in batch:
            batch["places"] = batch["attention_mask"].flatten().nonzero()[:, 0]
        return batch

    def batch(self, encoded: Sequence[Encoded], *, packed: bool = False) -> dict[str, torch.Tensor]:
        """What `collate` makes, on the student's device.

        Args:
            packed: with `places` of the real tokens, which alone are then computed, where the student `packs`.
        """
        device = next(self.parameters()).device
        # On the CPU: how many places there are is the shape of what follows.
        batch = self.collate_packed(encoded) if packed and self.packs else self.collate(encoded)
        return {name: engine.moved(tensor, device) for name, tensor in batch.items()}

    def make_packable(self) -> None:
        """Let batches be packed, where the architecture can."""
        make_packable(self.pretrained)

    def pack_in_scoring(self, settings: TorchSettings) -> bool:
        """Let batches be packed where that is known to be faster, and say whether they can be: on CPUs, unless the
        whole is compiled."""
        compiles_whole = settings.compile and not all(map(compiles_in_parts, self.stacks))
        if compiles_whole or next(self.parameters()).device.type != "cpu":
            return False
        self.make_packable()
        return self.packs

    def leave_out_what_is_not_read(self) -> None:
        """Compute of the last layer no more than the head reads, where that is less: scores stay as they are, and the
        model's states are no longer all of them."""

    def score_in_float32(self) -> None:
        """Read scores off the last states in float32, for scoring: a bfloat16 product rounds those between 4 and 8 to
        steps of 0.03, and passages of a list come to have the same."""

    def truncated(self, layer: int, *, alone: bool = False) -> Student:
        """The student that ends at `layer`: same scores as this one's at that layer, with the layers above removed.

        Args:
            alone: without the heads of earlier layers: an ordinary cross-encoder.
        """
        raise ModelError(
            f"exit_layer: {layer}: a student with head {self.description.head} scores at its last layer alone"
        )

    @property
    def pretrained(self) -> PreTrainedModel:
        """The transformers model, which the saved folder holds."""
        return self.model

    @property
    def stacks(self) -> Sequence[nn.Module]:
        """The modules that a forward pass calls, as what compiles or quantises has to know."""
        return (self.pretrained,)

    def head_tensors(self) -> dict[str, torch.Tensor]:
        """What the student has beside the transformers model, by its name in `heads.safetensors`."""
        return {}

    def load_head_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take what `head_tensors` of a student with the same head and layers gave."""

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that the pretrained checkpoint did not have."""
        raise NotImplementedError  # abstract

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.saves_adapter:
            lora.save_adapter(self.pretrained, folder)
        else:
            lora.merged(self.pretrained).save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
        if heads := self.head_tensors():
            save_file({k: v.detach().contiguous().clone() for k, v in heads.items()}, folder / HEADS)
        (folder / DESCRIPTION).write_text(json.dumps(self.description.model_dump(mode="json"), indent=2) + "\n")


def saved_description(resolved: ResolvedModel) -> StudentDescription | None:
    """What a student's local folder says of it; None for other checkpoints, and on a hub."""
    path = None if resolved.folder is None else resolved.folder / DESCRIPTION
    if path is None or not path.exists():
        return None
    return StudentDescription.model_validate_json(path.read_text(encoding="utf-8"))


def description_of(folder: str) -> Path:
    """The file that describes a student.

    Raises:
        ConfigError: the folder has none, or lies on another filesystem.
    """
    if (local := storage.local_path(folder)) is None:
        raise ConfigError(f"{folder}: a student is read from this machine's disk here: copy its folder first")
    path = local / DESCRIPTION
    if not path.exists():
        raise ConfigError(f"{folder}: not a student of ours: it has no {DESCRIPTION}")
    return path


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Save without the truncation that the last call left set, so that the same student is the same bytes."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def clipped(tokenizer, texts: Sequence[str], max_tokens: int) -> list[str]:
    """Cut texts at a token's end so that they encode to at most `max_tokens` tokens, special tokens included."""
    room = max_tokens - tokenizer.num_special_tokens_to_add(pair=False)
    offsets = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [t if len(o) <= room else t[: o[room - 1][1]] for t, o in zip(texts, offsets, strict=True)]


def check_layer(layer: int, layers: Sequence[int]) -> None:
    if layer not in layers:
        raise ModelError(f"exit_layer: {layer}: this student has heads on layers {list(layers)}")


def described_at(description: StudentDescription, layer: int, *, alone: bool) -> StudentDescription:
    kept = (layer,) if alone else tuple(n for n in description.layers if n <= layer)
    own = description.branch_layers if len(kept) > 1 else 0
    return description.model_copy(update={"layers": kept, "branch_layers": own, "exit_margins": None})


def encode_pairs(
    texts: TextTokens, description: StudentDescription, queries: Sequence[str], documents: Sequence[str]
) -> list[Encoded]:
    """Tokenise pairs as the tokenizer joins them, each text behind its prefix; only documents are cut to fit."""
    heads = texts.ids([description.query_prefix + q for q in queries])
    tails = texts.ids([description.document_prefix + d for d in documents])
    longest = description.max_query_length - texts.single.length
    room = description.max_length - texts.pair.length
    encoded = []
    for head, tail in zip(heads, tails, strict=True):
        query = head[:longest]
        encoded.append(texts.pair.fill(query, tail[: room - len(query)]))
    return encoded
