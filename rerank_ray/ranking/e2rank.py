"""E²Rank (Liu et al. 2025): a listwise prompt, embedded, is a better query than the query alone."""

from __future__ import annotations

from collections.abc import Sequence

from rerank_ray.errors import RowError
from rerank_ray.models.protocol import Answer, Backend, Embed, Failure, Result
from rerank_ray.prompts.passages import scores_to_show, shown_passage
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.pointwise import Steps, cosine, scores_from
from rerank_ray.records import CandidateList, Scores
from rerank_ray.settings.rankers import E2RankSettings


class E2Rank:
    """Score = cosine of a document with the pseudo-query: instruction, the `documents` of highest cosine with the query
    alone, and the query, embedded as a query. N + 2 calls in two rounds; the documents' embeddings serve both.
    """

    needs = frozenset({Embed})

    def __init__(self, settings: E2RankSettings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "e2rank")
        self.name = (
            f"e2rank:{backend.name}:prompt={self.template.digest}:documents={settings.documents}"
            f":words={settings.passage_words}"
        )

    def rank(self, request: CandidateList) -> Steps:
        if not len(request):
            return Scores(scores=())
        query, *documents = yield [
            Embed(text=request.query.text, role="query"),
            *(Embed(text=c.contents, role="document") for c in request.candidates),
        ]
        alone = _cosines(query, documents, "the query")
        embedded = [i for i, cosine in enumerate(alone) if not isinstance(cosine, Failure)]
        best = sorted(embedded, key=lambda i: -alone[i])
        (pseudo,) = yield [
            Embed(text=self._pseudo_query(request, best[: self.settings.documents]), role="query", truncate=False)
        ]
        return scores_from(request, _cosines(pseudo, documents, "the pseudo-query"))

    def _pseudo_query(self, request: CandidateList, members: Sequence[int]) -> str:
        chosen = [request.candidates[i] for i in members]
        scores = scores_to_show(self.template, CandidateList(query=request.query, candidates=tuple(chosen)))
        texts = [shown_passage(c, self.settings.passage_words) for c in chosen]
        return self.template.list_prompt(request.query, texts, self.template.identifiers(len(texts)), scores).body


def _cosines(query: Result, documents: Sequence[Result], name: str) -> list[float | Failure]:
    """Cosine of each document's embedding, or why it has none.

    Raises:
        RowError: the query has none.
    """
    if not isinstance(query, Answer):
        raise RowError(f"{name} has no embedding: {query.reason}")
    return [cosine(query, document) for document in documents]
