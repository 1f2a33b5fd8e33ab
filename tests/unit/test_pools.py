"""Every backend that torch runs encodes its next calls while it answers the present ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fixtures import pools, published
from fixtures.students import DOCUMENTS, QUERIES, start, stirred

from rerank_ray.models import engine
from rerank_ray.models.bi_encoder import BiEncoder
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.models.late_interaction import ColBERT
from rerank_ray.models.layerwise import Layerwise
from rerank_ray.models.protocol import Embed, EmbedTokens, Pair, PairList
from rerank_ray.models.scalar_head import ScalarHead
from rerank_ray.settings.models import (
    BiEncoderSettings,
    ColBERTSettings,
    CrossEncoderSettings,
    LayerwiseSettings,
    ScalarHeadSettings,
)

COUNT = 20
PAIRS = [Pair(query=QUERIES[i % 3], text=DOCUMENTS[i % 8]) for i in range(COUNT)]
"""The last ones come again."""
ROLES = ("query", "document")


def scalar_head(folder: Path) -> tuple:
    base, adapter = published.rankllama(folder)
    backend = ScalarHead(ScalarHeadSettings(path=str(base), adapter=str(adapter), dtype="float32"))
    return backend, PAIRS, "encode", "_forward"


def layerwise(folder: Path) -> tuple:
    path = published.minicpm_layerwise(folder / "m")
    return Layerwise(LayerwiseSettings(path=str(path), dtype="float32", max_length=256)), PAIRS, "_encode", "_forward"


def colbert(folder: Path) -> tuple:
    backend = ColBERT(ColBERTSettings(path=str(published.colbert(folder / "c")), dtype="float32", cache_mb=0))
    calls = [EmbedTokens(text=DOCUMENTS[i % 8], role=ROLES[i % 2]) for i in range(COUNT)]
    return backend, calls, "_encode", "_forward"


@pytest.fixture
def make(tiny_bert: Path, tiny_cross_encoder: Path, tmp_path: Path) -> Callable[[str], tuple]:
    """A backend by its kind, 20 calls, and its methods that encode and that answer."""

    def bi_encoder(_: Path) -> tuple:
        backend = BiEncoder(BiEncoderSettings(path=str(tiny_bert), dtype="float32", max_length=48, cache_mb=0))
        calls = [Embed(text=DOCUMENTS[i % 8], role=ROLES[i % 2]) for i in range(COUNT)]
        return backend, calls, "_encode", "_forward"

    def cross_encoder(_: Path) -> tuple:
        settings = CrossEncoderSettings(path=str(tiny_cross_encoder), dtype="float32", max_length=64)
        return CrossEncoder(settings), PAIRS, "_encode", "_forward"

    def adaptive(folder: Path) -> tuple:
        student = stirred(start(tiny_bert, "similarity", layers=(1, 2, 3), gate=-1.0, interaction=1.0))
        student.description = student.description.model_copy(update={"exit_margins": (0.5, 0.5)})
        student.save(folder)
        backend = CrossEncoder(CrossEncoderSettings(path=str(folder), exit_layer="adaptive", dtype="float32"))
        calls = [PairList(query=QUERIES[i % 3], texts=tuple(DOCUMENTS[: i % 8]) * 2) for i in range(COUNT)]
        return backend, calls, "_encode_lists", "_answer_lists"

    made = (bi_encoder, cross_encoder, adaptive, scalar_head, layerwise, colbert)
    return lambda kind: {function.__name__: function for function in made}[kind](tmp_path)


@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder", "adaptive", "scalar_head", "layerwise", "colbert"])
def test_the_next_calls_are_encoded_meanwhile(kind: str, make: Callable[[str], tuple], monkeypatch: pytest.MonkeyPatch):
    """An eighth of the calls first, and then seven at a time; each result is that of its call alone."""
    backend, calls, encode, answer = make(kind)
    alone = [backend.run([call])[0] for call in calls]
    monkeypatch.setattr(engine, "_POOL", 7)
    encoded = pools.watch(monkeypatch, backend, encode, answer)
    together = backend.run(calls)
    assert encoded == [calls[:3], calls[3:10], calls[10:17], calls[17:]]
    assert [result.usage for result in together] == [result.usage for result in alone]
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found.value, expected.value, atol=1e-4)
