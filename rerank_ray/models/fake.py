"""A backend without a model: answers are a hash of the call. It tests everything around a model."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence

import numpy as np

from rerank_ray.models.protocol import (
    Answer,
    Attention,
    Call,
    Embed,
    EmbedTokens,
    Failure,
    Generate,
    LogLikelihood,
    NextToken,
    Pair,
    Result,
)
from rerank_ray.records import Usage
from rerank_ray.settings.models import FakeSettings

_DIMENSION = 4


class Fake:
    """Answers calls with numbers in (−1, 0], rankings and unit rows that depend on the call and the seed alone."""

    answers = frozenset({NextToken, LogLikelihood, Generate, Attention, Pair, Embed, EmbedTokens})
    tells_raw_logits = True
    exit_layer = None
    parameters = 0
    attention_shape = (2, 2)

    def __init__(self, settings: FakeSettings) -> None:
        self.settings = settings
        self.name = f"fake:seed={settings.seed}"

    def run(self, calls: Sequence[Call]) -> list[Result]:
        return [self._answer(call) for call in calls]

    def _answer(self, call: Call) -> Result:
        text = repr(call)
        if self.settings.crash_on is not None and self.settings.crash_on in text:
            os._exit(139)
        if self.settings.fail_on is not None and self.settings.fail_on in text:
            return Failure(reason=f"the call holds {self.settings.fail_on!r}")
        time.sleep(self.settings.seconds_per_call)
        if isinstance(call, Attention):
            usage = Usage(calls=1 if call.calibration is None else 2, prompt_tokens=len(text.split()))
            return Answer(value=_attention(call, self.attention_shape, self.settings.seed), usage=usage)
        usage = Usage(calls=1, prompt_tokens=len(text.split()))
        if isinstance(call, Generate) and self.settings.writes == "queries":
            return Answer(value=_words(call.prompt.passages[0], f"{self.settings.seed}:{call.seed}"), usage=usage)
        return Answer(value=_value(call, f"{self.settings.seed}:{text}"), usage=usage)


def _value(call: Call, text: str) -> float | str | tuple[float, ...] | np.ndarray:
    match call:
        case NextToken():
            return _numbers(text, len(call.labels))
        case LogLikelihood():
            return _numbers(text, len(call.continuation.split()) or 1)
        case Generate():
            return _permutation(text, len(call.prompt.passages))
        case Pair():
            return _numbers(text, 1)[0]
        case Embed():
            return _numbers(text, _DIMENSION)
        case EmbedTokens():
            count = len(call.text.split()) or 1
            rows = np.array(_numbers(text, count * _DIMENSION), dtype=np.float32).reshape(count, _DIMENSION)
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _permutation(text: str, count: int) -> str:
    """A ranking of the prompt's passages as listwise methods ask for it: `[2] > [1] > [3]`."""
    numbers = _numbers(text, count)
    return " > ".join(f"[{i + 1}]" for i in sorted(range(count), key=numbers.__getitem__))


def _words(passage: str, text: str) -> str:
    """Four different words of a passage, in an order of their own."""
    words = sorted(dict.fromkeys(passage.split()), key=lambda word: _numbers(f"{text}:{word}", 1))
    return " ".join(words[:4])


def _attention(call: Attention, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, ...]:
    """A passage's tokens are its words; what a head pays to them depends on the query and the passage alone."""
    layers, width = shape
    heads = call.heads or [(layer, head) for layer in range(layers) for head in range(width)]

    def paid_by(query: str, passage: str) -> np.ndarray:
        rows = [_numbers(f"{seed}:{head}:{query}:{passage}", len(passage.split())) for head in heads]
        return -np.array(rows, dtype=np.float32).T

    values = [paid_by(call.query, passage) for passage in call.prompt.passages]
    if call.calibration is not None:
        values = [v - paid_by(call.calibration, p) for v, p in zip(values, call.prompt.passages, strict=True)]
    return tuple(v if call.each_head else v.sum(1) for v in values)


def _numbers(text: str, count: int) -> tuple[float, ...]:
    return tuple(
        -int.from_bytes(hashlib.sha256(f"{i}:{text}".encode()).digest()[:6], "big") / 2**48 for i in range(count)
    )
