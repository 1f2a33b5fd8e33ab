"""Documents are embedded once, memory stays bounded, and no answer changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.models.embedding_cache import EmbeddingCache
from rerank_ray.models.protocol import Answer, Embed, EmbedTokens
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Candidate, CandidateList, Query, Usage
from rerank_ray.settings.models import BiEncoderSettings
from rerank_ray.settings.rankers import BiEncoderRankerSettings

ENTRY = 512 + 4 * 4  # what the cache counts beside the numbers, and four float32


class Counter:
    """Embeds a text as four numbers made of its characters, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, calls: Sequence[Embed | EmbedTokens]) -> list[Answer]:
        self.asked += [c.text for c in calls]
        return [self.answer(c) for c in calls]

    @staticmethod
    def answer(call: Embed | EmbedTokens) -> Answer:
        value = tuple(float(ord((call.text * 4)[i])) for i in range(4))
        array = np.array([value], dtype=np.float32)
        return Answer(
            value=value if isinstance(call, Embed) else array, usage=Usage(calls=1, prompt_tokens=len(call.text))
        )


def documents(texts: str) -> list[Embed]:
    return [Embed(text=t, role="document") for t in texts]


def test_a_document_is_computed_once_and_then_costs_no_call():
    compute, cache = Counter(), EmbeddingCache(1 << 20)
    first = cache.answer(documents("ab"), compute)
    again = cache.answer(documents("bca"), compute)
    assert compute.asked == ["a", "b", "c"]
    assert [a.value for a in again] == [first[1].value, (99.0,) * 4, first[0].value]
    assert [a.usage for a in again] == [
        Usage(prompt_tokens=1, cached_tokens=1),
        Usage(calls=1, prompt_tokens=1),
        Usage(prompt_tokens=1, cached_tokens=1),
    ]


def test_queries_are_not_kept_nor_mistaken_for_documents():
    compute, cache = Counter(), EmbeddingCache(1 << 20)
    calls = [Embed(text="a", role="query"), Embed(text="a", role="document")]
    cache.answer(calls, compute)
    cache.answer(calls, compute)
    assert compute.asked == ["a", "a", "a"]


def test_the_least_recently_used_goes_first():
    """Room for two: after a, b, a, c the one not used for longest is b."""
    compute, cache = Counter(), EmbeddingCache(2 * ENTRY)
    for text in "abac":
        cache.answer(documents(text), compute)
    compute.asked.clear()
    cache.answer(documents("ac"), compute)
    cache.answer(documents("b"), compute)
    assert compute.asked == ["b"]


@given(
    st.sampled_from([Embed, EmbedTokens]),
    st.lists(st.text(alphabet="abcdef", min_size=1, max_size=8), max_size=30),
    st.integers(0, 5 * ENTRY),
)
def test_answers_are_what_they_are_without_a_cache_and_memory_is_bounded(kind, batches: list[str], max_bytes: int):
    cache = EmbeddingCache(max_bytes)
    for batch in batches:
        calls = [kind(text=text, role="document") for text in batch]
        for call, answer in zip(calls, cache.answer(calls, Counter()), strict=True):
            np.testing.assert_array_equal(answer.value, Counter.answer(call).value)
            assert isinstance(answer.value, type(Counter.answer(call).value))
        assert cache.bytes <= max_bytes


def test_a_bi_encoders_documents_are_embedded_once_over_many_queries(tiny_bert: Path):
    """Ten queries over the same five documents, list by list: the calls are 5 + 10, and no score changes."""
    candidates = tuple(Candidate(doc_id=f"d{i}", text=f"document {i}") for i in range(5))
    lists = [
        CandidateList(query=Query(query_id=f"q{i}", text=f"query {i}"), candidates=candidates[i % 3 :])
        for i in range(10)
    ]
    scores = {}
    for cache_mb, calls in ((256, 15), (0, sum(1 + len(c) for c in lists))):
        model = BiEncoderSettings(path=str(tiny_bert), dtype="float32", cache_mb=cache_mb)
        ranker = Ranker(BiEncoderRankerSettings(model=model))
        outcomes = [ranker.rank([one])[0] for one in lists]
        assert sum(o.usage.calls for o in outcomes) == calls
        scores[cache_mb] = [s for o in outcomes for s in o.scores.scores]
    assert scores[256] == pytest.approx(scores[0], abs=1e-5)
