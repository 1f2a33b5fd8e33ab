"""E²Rank (Liu et al. 2025): a listwise prompt, embedded, is a better query than the query alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rerank_ray.errors import RowError
from rerank_ray.models.protocol import Answer, Backend, Embed, Failure, Result
from rerank_ray.prompts.passages import prompt_over
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
        best = sorted(embedded, key=lambda i: -alone[i])[: self.settings.documents]
        # A list of its own: only of these candidates may the prompt need first-stage scores.
        shown = replace(request, candidates=tuple(request.candidates[i] for i in best))
        prompt = prompt_over(self.template, shown, range(len(best)), self.settings.passage_words)
        (pseudo,) = yield [Embed(text=prompt.body, role="query", truncate=False)]
        return scores_from(request, _cosines(pseudo, documents, "the pseudo-query"))


def _cosines(query: Result, documents: Sequence[Result], name: str) -> list[float | Failure]:
    """Cosine of each document's embedding, or why it has none.

    Raises:
        RowError: the query has none.
    """
    if not isinstance(query, Answer):
        raise RowError(f"{name} has no embedding: {query.reason}")
    return [cosine(query, document) for document in documents]
