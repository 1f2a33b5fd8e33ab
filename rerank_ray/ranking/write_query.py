"""An LLM writes a search query for a passage: the first stage of `rerank-ray synthesize`, run like a ranking method."""

from __future__ import annotations

import hashlib

from rerank_ray.errors import RowError
from rerank_ray.models.protocol import Answer, Backend, Generate
from rerank_ray.prompts.parse.words import parse_query
from rerank_ray.prompts.render import load_template
from rerank_ray.ranking.pointwise import Steps
from rerank_ray.records import Candidate, CandidateList, Defect, DefectKind, Query, Scores
from rerank_ray.settings.synthesize import QueryWriterSettings


class QueryWriter:
    """Writes one query for a list's first candidate, as its rationale; the list's own query is not looked at.

    The score is the query's log-probability by the model, where the backend tells it, and 0 elsewhere. An answer that
    holds no query is an error of the row.
    """

    needs = frozenset({Generate})

    def __init__(self, settings: QueryWriterSettings, backend: Backend) -> None:
        self.settings = settings
        self.template = load_template(settings.prompt, "write_query")
        if hasattr(backend, "check_fits"):
            backend.check_fits(self.template.example(), settings.max_tokens)
        self.name = (
            f"write_query:{backend.name}:prompt={self.template.digest}"
            f":temperature={settings.temperature:g}:max_tokens={settings.max_tokens}"
        )

    def rank(self, request: CandidateList) -> Steps:
        call = Generate(
            prompt=self.template.prompt(request.query, request.candidates[0]),
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            seed=_seed(request.query.query_id),
            # A chat ends its turn; text that is continued would go on with the next passage.
            stop=() if self.template.chat else ("\n",),
        )
        (result,) = yield [call]
        if not isinstance(result, Answer):
            defect = Defect(kind=DefectKind.UNSCORED, detail=result.reason)
            raise RowError(f"the model gave no answer: {result.reason}", (defect,))
        parsed = parse_query(self.template.prefill + result.value, cut_off=result.cut_off)
        if parsed.query is None:
            raise RowError(f"the model wrote no query: {parsed.defects[0]}", parsed.defects)
        return Scores(scores=(result.log_probability or 0.0,), rationales=(parsed.query,))


def _seed(query_id: str) -> int:
    """The id stands for the run's seed and the number of the query; 31 bits are what every server takes."""
    return int.from_bytes(hashlib.blake2b(query_id.encode(), digest_size=4).digest(), "big") >> 1


def passage_of(row: dict) -> CandidateList:
    """A row of the `passages` schema as the writer takes it."""
    return CandidateList(
        query=Query(query_id=row["query_id"], text=""),
        candidates=(Candidate(doc_id=row["doc_id"], title=row["title"], text=row["text"]),),
    )
