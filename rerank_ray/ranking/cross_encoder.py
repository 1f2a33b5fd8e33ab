"""Cross-encoder reranking (Nogueira & Cho 2019), students included."""

from __future__ import annotations

from rerank_ray.errors import RowError
from rerank_ray.models.protocol import Backend, Failure, Pair, PairList
from rerank_ray.ranking.pointwise import Steps, score_each, scores_from
from rerank_ray.records import CandidateList, Scores
from rerank_ray.settings.rankers import CrossEncoderRankerSettings


class CrossEncoderRanker:
    """Score = the model's raw output for (query, document), beside the list's other documents where it compares them;
    with adaptive exits, of a document that left early, one below all that went on."""

    def __init__(self, settings: CrossEncoderRankerSettings, backend: Backend) -> None:
        self.asks_lists = PairList in backend.answers
        self.needs = frozenset({PairList if self.asks_lists else Pair})
        layer = "" if backend.exit_layer is None else f":layer={backend.exit_layer}"
        self.name = f"cross_encoder:{backend.name.removeprefix('cross_encoder:')}{layer}"

    def rank(self, request: CandidateList) -> Steps:
        texts = tuple(c.contents for c in request.candidates)
        if not self.asks_lists:
            calls = [Pair(query=request.query.text, text=text) for text in texts]
            return (yield from score_each(request, calls, lambda score: score))
        if not texts:
            return Scores(scores=())
        (result,) = yield [PairList(query=request.query.text, texts=texts)]
        if isinstance(result, Failure):
            raise RowError(result.reason)
        return scores_from(request, result.value)
