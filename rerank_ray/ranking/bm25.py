"""BM25 over a collection as a ranking method (Robertson & Zaragoza 2009; Lucene's idf)."""

from __future__ import annotations

import math

from rerank_ray.formats.lines import BadLines
from rerank_ray.formats.trec import read_collection
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.records import CandidateList, Defect, DefectKind, Scores
from rerank_ray.retrieval.bm25 import BM25Index
from rerank_ray.settings.rankers import BM25Settings


class BM25:
    """Score = BM25 of the document in its collection; a document the collection lacks stays unscored."""

    needs = frozenset()

    def __init__(self, settings: BM25Settings, backend: None) -> None:
        documents = ((d.doc_id, d.contents) for d in read_collection(settings.corpus, BadLines()))
        self.index = BM25Index.build(documents, k1=settings.k1, b=settings.b, source=settings.corpus)
        self.name = f"bm25:{settings.corpus}:k1={settings.k1}:b={settings.b}"

    def rank(self, request: CandidateList) -> Steps:
        yield []
        scores = tuple(self.index.scores(request.query.text, [c.doc_id for c in request.candidates]))
        defects = tuple(
            Defect(kind=DefectKind.NOT_IN_CORPUS, detail=c.doc_id)
            for c, score in zip(request.candidates, scores, strict=True)
            if math.isnan(score)
        )
        return Scores(scores=scores, defects=defects)
