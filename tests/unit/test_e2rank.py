"""E²Rank: embeddings, and a listwise prompt as pseudo-query."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.oracles import (
    USAGE,
    Recorder,
    outcome_of,
)
from fixtures.rows import make_list
from fixtures.tiny_models import tiny_bert_folder

from rerank_ray.models.protocol import Answer, Embed, Failure
from rerank_ray.ranking.e2rank import E2Rank
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.records import Candidate, CandidateList
from rerank_ray.settings.models import BiEncoderSettings, FakeSettings
from rerank_ray.settings.rankers import (
    E2RankSettings,
)

FAKE = FakeSettings()


class Embedder(Recorder):
    """Unit vectors by text; the pseudo-query is any other text."""

    answers = frozenset({Embed})

    def __init__(self, vectors: dict[str, tuple[float, ...] | None], pseudo: tuple[float, ...] | None) -> None:
        super().__init__()
        self.vectors, self.pseudo = vectors, pseudo

    def answer(self, call):
        vector = self.vectors.get(call.text, self.pseudo)
        return Failure(reason="too long") if vector is None else Answer(value=vector, usage=USAGE)


def e2rank(backend, **options) -> E2Rank:
    return E2Rank(E2RankSettings(model=FAKE, **options), backend)


def embedder(pseudo: tuple[float, ...] | None = (0.0, 1.0), **failing) -> tuple[CandidateList, Embedder]:
    """Query (1, 0); documents at cosines 0, 1 and 0.6 with it."""
    request = make_list(size=3)
    vectors = [(0.0, 1.0), (1.0, 0.0), (0.6, 0.8)]
    texts = [c.text for c in request.candidates]
    known = {"query": (1.0, 0.0)} | dict(zip(texts, vectors, strict=True)) | failing
    return request, Embedder(known, pseudo)


def test_e2rank_by_hand():
    """The two nearest documents, 1 and 2, stand in the prompt, nearest first; scores are cosines with (0, 1)."""
    request, backend = embedder()
    outcome = outcome_of(e2rank(backend, documents=2), backend, request)
    assert outcome.scores.scores == pytest.approx((1.0, 0.0, 0.8))
    assert [len(batch) for batch in backend.batches] == [4, 1]
    (pseudo,) = backend.batches[1]
    texts = [c.text for c in request.candidates]
    assert (pseudo.role, pseudo.truncate) == ("query", False)
    assert f"[1] {texts[1]}\n[2] {texts[2]}\n" in pseudo.text
    assert texts[0] not in pseudo.text
    assert pseudo.text.endswith("Query: query")


def test_e2rank_failures():
    request, backend = embedder(query=None)
    assert outcome_of(e2rank(backend), backend, request).error == "the query has no embedding: too long"
    request, backend = embedder(pseudo=None)
    assert outcome_of(e2rank(backend), backend, request).error == "the pseudo-query has no embedding: too long"
    request, backend = embedder(**{make_list(size=3).candidates[1].text: None})
    outcome = outcome_of(e2rank(backend), backend, request)
    assert outcome.scores.scores[0::2] == pytest.approx((1.0, 0.8))
    assert math.isnan(outcome.scores.scores[1])
    assert [str(d) for d in outcome.scores.defects] == ["unscored: d1: too long"]
    assert "epsilon" not in backend.batches[1][0].text


def test_e2rank_never_loses_the_query_to_the_context(tmp_path: Path):
    """The query stands last, where a text too long is cut: it is an error, while long documents are cut as ever."""
    model = BiEncoderSettings(path=str(tiny_bert_folder(tmp_path)), device="cpu", dtype="float32", max_length=64)
    wider = model.model_copy(update={"max_length": 96})
    few = Ranker(E2RankSettings(model=wider, documents=1, passage_words=3))
    request = make_list(size=4)
    long = Candidate(doc_id="long", text="cat " * 200)
    request = replace(request, candidates=(*request.candidates, long))
    (outcome,) = few.rank([request])
    assert outcome.error is None
    assert math.isfinite(outcome.scores.scores[-1])
    many = Ranker(E2RankSettings(model=model))
    assert "the model 64: show it less" in many.rank([request])[0].error
