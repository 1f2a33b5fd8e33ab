"""The heads file: how well each attention head of a model tells relevant passages from others."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from rerank_ray import storage
from rerank_ray.config import Settings, validate
from rerank_ray.errors import ConfigError, InputError


class HeadScore(Settings):
    """One attention head and its CoRe score."""

    layer: NonNegativeInt
    head: NonNegativeInt
    score: Annotated[float, Field(ge=0.0, le=1.0)]
    """Mean over queries of softmax([a(d⁺), a(d⁻₁), …] / T) at the positive."""


class HeadsFile(Settings):
    """All heads of a model with their scores, as `rerank-ray detect-heads` writes them."""

    model: str
    """Kind, model and revision: heads of one model say nothing about another."""
    prompt: str
    """Digest of the template."""
    layers: PositiveInt
    """Layers of the model."""
    temperature: float
    """T of the softmax."""
    queries: PositiveInt
    """Queries that the scores are means of."""
    heads: Annotated[tuple[HeadScore, ...], Field(min_length=1)]
    """Best first."""

    @model_validator(mode="after")
    def _heads_of_the_model(self) -> HeadsFile:
        pairs = [(h.layer, h.head) for h in self.heads]
        if len(set(pairs)) != len(pairs):
            raise ValueError("heads names a head twice")
        if max(layer for layer, _ in pairs) >= self.layers:
            raise ValueError(f"heads names a layer beyond the model's {self.layers} (the first is 0)")
        return self

    def best(self, count: int, prune: float) -> tuple[tuple[int, int], ...]:
        """The (layer, head) pairs with the highest scores in the first int(layers · (1 − prune)) layers.

        Raises:
            ConfigError: those layers hold fewer heads.
        """
        # 30 · (1 − 0.9) is 2.9999999999999996.
        kept = int(self.layers * (1 - prune) + 1e-9)
        inside = [h for h in self.heads if h.layer < kept]
        if len(inside) < count:
            raise ConfigError(
                f"count is {count}, but the first {kept} of {self.layers} layers hold {len(inside)} heads in the heads "
                "file: lower count or prune"
            )
        ranked = sorted(inside, key=lambda h: (-h.score, h.layer, h.head))
        return tuple((h.layer, h.head) for h in ranked[:count])


def save_heads(path: str, heads: HeadsFile) -> None:
    storage.write_text(path, json.dumps(heads.model_dump(mode="json"), indent=1) + "\n")


def load_heads(path: str) -> HeadsFile:
    """Read a heads file.

    Raises:
        InputError: it is not there, or no JSON.
        ConfigError: it is no heads file; lists every fault.
    """
    if not storage.exists(path):
        raise InputError(f"{path}: no such heads file; `rerank-ray detect-heads` writes one")
    try:
        content = json.loads(storage.read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    return validate(HeadsFile, content, path)


def check_model(heads: HeadsFile, path: str, model: str) -> None:
    """Raise `ConfigError` unless the heads were detected in this model."""
    if heads.model != model:
        raise ConfigError(
            f"{path}: these are heads of {heads.model}, not of {model}: run `rerank-ray detect-heads` with this model"
        )
